"""Which of an episode's actions typed into a password field, and what.

The field is known by its role: the step's target, the page's line (or HTML tag) that has the element's ref, another
argument of the action (a label, a selector), or browser-use's record of the element in ``extra``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from offline_lm.store._patterns import hidden
from offline_lm.types import Episode, Step

WORDS = (
    *(
        "passw",
        "pwd",
        "passcode",
        "passphrase",
        "kennwort",
        "contrase",
        "mot de passe",
        "senha",
        "парол",
        "密码",
        "密碼",
    ),
    *("パスワード", "비밀번호"),
)
"""Every text that `_FIELD` finds holds one of these."""
_FIELD = re.compile(
    r"(?i)passw|\bpwd\b|_pwd|passcode|passphrase|kennwort|contrase|mot de passe|\bsenha\b"
    r"|парол|密码|密碼|パスワード|비밀번호"
)
_VERB = r"[\w.]*?(?:fill|type|input|enter|write|insert|send_?keys|set_?value|set_?text|press_sequentially|\bdo)\w*"
_CALL = re.compile(rf"(?i)(?<!\w)({_VERB})\s*\(")
_SOME_VERB = re.compile(r"(?i)fill|type|input|enter|write|insert|send|set|press|do")
"""Found in every text where `_CALL`, `_BRACKETS`, `_BARE` or `_ARROW` is, and many times faster."""
_ARGUMENT = re.compile(
    r"""(?:(\w+)\s*=\s*)?("(?:[^"\\]|\\.)*(?:"|\Z)|'(?:[^'\\]|\\.)*(?:'|\Z)|[^\s,()'"=]+)""", re.DOTALL
)
_BRACKETS = re.compile(r"(?i)\btype\s*\[([^\]\n]{1,80})\]\s*[;:,]?\s*\[?(.+?)\]?(?:\s*\[[01]\])?\s*$", re.MULTILINE)
_BARE = re.compile(r"(?i)\btype\s+(\d{1,6})\s*[;:]\s*\[?(.+?)\]?\s*$", re.MULTILINE)
_ARROW = re.compile(r"(?i)^(.{1,300}?)\s*->\s*TYPE:\s*(.+)$", re.MULTILINE)
_NAMES_OF_REF = ("ref", "bid", "index", "id", "element_id", "node_id", "uid", "selector", "element", "target", "xpath")
_NAMES_OF_TEXT = ("text", "value", "content", "string", "keys", "argument", "input", "input_text", "characters")
_CLICK = re.compile(r"(?i)\bclick\w*\s*[\[(;\s]\s*[\"']?\[?([\w-]{1,40})")


_WORDS_OF_PAGES = {"password", "passwort", "passcode", "passphrase", "passwd", "username", "required", "secret"}


class Typed(NamedTuple):
    ref: str | None
    text: str
    rest: str
    """what else the action says of the element"""


def is_word(text: str) -> bool:
    """Whether `text` is what pages call the field: replaced everywhere, it would only make them unreadable."""
    return text.lower() in (
        "password",
        "passwort",
        "passcode",
        "passphrase",
        "passwd",
        "username",
        "required",
        "secret",
    )


def passwords(episode: Episode) -> Iterator[tuple[int, str]]:
    """(position of the step, literal) of each text typed into a password field."""
    pages = _Pages()
    for i, step in enumerate(episode.steps):
        pages.add(_page(step))
        before = episode.steps[i - 1] if i else None
        elements = _elements(step.extra)
        for action in _actions(step):
            typed = list(_typed_in(action))
            for j, one in enumerate(typed):
                element = elements[j] if len(elements) == len(typed) else None
                if one.text.strip() and not hidden(one.text) and "[redacted" not in one.text:
                    alone = len(typed) == 1
                    if _is_password(one, step, element, elements, pages, before, alone=alone):
                        yield i, one.text


def _actions(step: Step) -> Iterator[Any]:
    """Each thing that says what was, or could have been, done; browser-use lists several in one."""
    if step.action is not None:
        yield step.action
    if step.response is not None and step.response != step.action:
        yield step.response
    if step.action_args is not None:
        yield {step.action_name or "": step.action_args}
    yield from step.sub_actions or ()
    for candidate in step.candidates or ():
        yield candidate.action
        if candidate.response is not None:
            yield candidate.response
    for key in ("tool_calls", "action", "actions", "model_output", "input"):
        if step.extra and isinstance(step.extra.get(key), dict | list):
            yield step.extra[key]


def _typed_in(action: Any, name: str = "", depth: int = 0) -> Iterator[Typed]:
    if depth > 12:
        return
    if isinstance(action, str):
        yield from _typed_in_text(action, name, depth)
    elif isinstance(action, list | tuple):
        for item in action:
            yield from _typed_in(item, name, depth + 1)
    elif isinstance(action, dict):
        texts = [action[key] for key in _NAMES_OF_TEXT if isinstance(action.get(key), str)]
        refs = [action[key] for key in _NAMES_OF_REF if isinstance(action.get(key), str | int)]
        if texts and (refs or re.fullmatch(f"(?i){_VERB}", name)):
            rest = " ".join(str(item) for item in action.values() if isinstance(item, str) and item != texts[0])
            yield Typed(str(refs[0]) if refs else None, texts[0], rest)
            return
        name = next((action[key] for key in ("name", "function", "action") if isinstance(action.get(key), str)), name)
        for key, item in action.items():
            inner = name if key in ("arguments", "args", "input", "params", "parameters", "kwargs") else str(key)
            yield from _typed_in(item, inner, depth + 1)


def _typed_in_text(text: str, name: str, depth: int) -> Iterator[Typed]:
    for start in _starts_of_json(text):
        try:
            value = orjson.loads(text[start : text.rindex((text[start] == "{" and "}") or "]") + 1])
        except ValueError:
            continue
        if isinstance(value, dict | list):
            yield from _typed_in(value, name, depth + 1)
            return
    if not _SOME_VERB.search(text):
        return
    calls = list(_CALL.finditer(text))
    for i, call in enumerate(calls):
        end = calls[i + 1].start() if i + 1 < len(calls) else len(text)
        if typed := _of_call(text, call, end):
            yield typed
    for pattern in (_BRACKETS, _BARE):
        for match in pattern.finditer(text):
            yield Typed(match[1], match[2], "")
    for match in _ARROW.finditer(text):
        yield Typed(None, match[2].strip(), match[1])


def _starts_of_json(text: str) -> list[int]:
    """Where an action written as JSON may begin: at the text's start, or after a tag or fence of a tool call."""
    found = re.finditer(r"(?:\A|<tool_call>|```(?:json)?|[Aa]ction:)\s*(?=[{\[])", text[:200_000])
    return [match.end() for match in found][:4]


def _of_call(text: str, call: re.Match[str], end: int) -> Typed | None:
    named: dict[str, str] = {}
    placed: list[str] = []
    at = call.end()
    while at < end:
        if match := _ARGUMENT.match(text, at, end):
            value = match[2]
            if value[0] in "\"'":
                value = re.sub(r"\\(.)", r"\1", value[1:-1] if value[-1] == value[0] and len(value) > 1 else value[1:])
            if match[1]:
                named[match[1]] = value
            else:
                placed.append(value)
            at = match.end()
        elif text[at] == ")":
            break
        else:
            at += 1
    ref = next((named[key] for key in _NAMES_OF_REF if key in named), None)
    typed = next((named[key] for key in _NAMES_OF_TEXT if key in named), None)
    if typed is None and placed:
        if ref is None and len(placed) > 1:
            ref = placed.pop(0)
        typed = placed[0]
    if typed is None:
        return None
    if ref is None and placed:
        ref = placed[0] if placed[0] != typed else None
    line = text.rfind("\n", 0, call.start()) + 1
    rest = " ".join([text[line : call.start()], ref or "", *(item for item in named.values() if item != typed)])
    return Typed(ref, typed, rest)


# --- the field ----------------------------------------------------------------------------------------------


class _Pages:
    """What the agent has seen so far."""

    def __init__(self) -> None:
        self._pages: list[str] = []
        self._may_say: list[bool] = []
        self._told: dict[str, bool | None] = {}

    def add(self, page: str) -> None:
        folded = page.casefold()
        self._pages.append(page)
        self._may_say.append(any(word in folded for word in WORDS))
        self._told.clear()

    def last(self, count: int) -> list[str]:
        """Those of the last pages that may speak of passwords."""
        pages = zip(self._pages[-count:], self._may_say[-count:], strict=True)
        return [page for page, may_say in pages if may_say]

    def says(self, ref: str, otherwise: bool) -> bool:
        """Whether the newest page with the element calls it a password field; `otherwise` if no page has it."""
        if not otherwise and not any(self._may_say):
            return False
        if ref not in self._told:
            self._told[ref] = self._look_for(ref)
        told = self._told[ref]
        return otherwise if told is None else told

    def _look_for(self, ref: str) -> bool | None:
        for page, may_say in zip(reversed(self._pages), reversed(self._may_say), strict=True):
            if not may_say:
                if any(True for _ in _places_of(ref, page)):
                    return False
            elif lines := list(_lines_of(ref, page)):
                return any(_FIELD.search(line) for line in lines)
        return None


def _is_password(
    one: Typed,
    step: Step,
    element: Any,
    elements: list[Any],
    pages: _Pages,
    before: Step | None,
    *,
    alone: bool,
) -> bool:
    if _FIELD.search(one.rest) or _FIELD.search(one.ref or ""):
        return True
    if element is not None:
        return _says(element)
    if alone and (_says(step.target) or _says(elements)):
        return True
    ref = (one.ref or "").strip("[]\"'# ")
    if ref:
        return pages.says(ref, not alone and (_says(step.target) or _says(elements)))
    last = pages.last(1)
    if any("focused" in line and _FIELD.search(line) for page in last for line in page.splitlines()):
        return True
    if before is None:
        return False
    clicked = _CLICK.search(before.action or "")
    if clicked is None:
        return False
    return _says(before.target) or any(
        _FIELD.search(line) for page in pages.last(2) for line in _lines_of(clicked[1], page)
    )


def _says(value: Any) -> bool:
    return value is not None and _FIELD.search(str(value)) is not None


def _elements(extra: dict[str, Any] | None) -> list[Any]:
    """What browser-use recorded of the elements acted on, one for each action."""
    for key in ("interacted_element", "interacted_elements", "element"):
        for place in (extra or {}, (extra or {}).get("state")):
            if isinstance(place, dict) and place.get(key):
                return place[key] if isinstance(place[key], list) else [place[key]]
    return []


def _page(step: Step) -> str:
    if step.observation is not None:
        return step.observation
    try:
        messages = orjson.loads(step.messages or "[]")
    except orjson.JSONDecodeError:
        return step.messages or ""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return "\n".join(text if isinstance(text, str) else str(text) for text in contents if text)


_BEFORE_REF, _AFTER_REF = "[\"'=#(<", "]\"':)>."
_INDENT = " \t*|-"
_NEIGHBOUR = re.compile(r"\[[\w-]*\d[\w-]*\]")


def _lines_of(ref: str, page: str) -> Iterator[str]:
    """What the page says of the element `ref`: its tag, or its line up to the neighbouring elements."""
    for start, end in _places_of(ref, page):
        tag = page.rfind("<", max(0, start - 1000), end)
        if tag > page.rfind(">", max(0, start - 1000), start) and tag >= 0:
            stop = page.find(">", end, end + 1000)
            yield page[tag : stop if stop >= 0 else end + 200]
            continue
        first = page.rfind("\n", max(0, start - 300), start) + 1 or max(0, start - 300)
        last = page.find("\n", end, end + 400)
        line_before, line_after = page[first:start], page[end : last if last >= 0 else end + 400]
        before_parts, after_parts = _NEIGHBOUR.split(line_before), _NEIGHBOUR.split(line_after)
        own = page[start:end] + after_parts[0]
        yield own if page[start] == "[" else before_parts[-1] + own


def _places_of(ref: str, page: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each mention of an element: ``[12]``, ``bid="12"``, ``BID:12``, ``ref=12``, ``| 12:``.

    Many times faster than one regular expression, which would have to be tried at every letter.
    """
    at = page.find(ref)
    while at >= 0:
        end = at + len(ref)
        start = _start_of(page, at) if end == len(page) or page[end] in _AFTER_REF or page[end].isspace() else -1
        if start >= 0:
            yield start, end
        at = page.find(ref, end if start >= 0 else at + 1)


def _start_of(page: str, at: int) -> int:
    """Where the mention of an element begins whose ref stands at `at`; -1 if it is none."""
    line = page.rfind("\n", max(0, at - 81), at) + 1
    if (line or at <= 80) and not page[line:at].strip(_INDENT):
        return line
    if page[max(0, at - 4) : at] in ("BID:", "ref=") and not (at > 4 and _is_letter(page[at - 5])):
        return at - 4
    return at - 1 if page[at - 1] in _BEFORE_REF else -1


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_"
