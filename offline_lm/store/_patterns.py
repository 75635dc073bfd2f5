"""Regular expressions for secrets, run only where one can begin."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import numpy as np

from offline_lm.errors import UserError

PLACEHOLDER = re.compile(r"\[redacted:([\w.-]+):(\d+)\]")
_STARTS = re.compile(r"\(\?#starts ([^)]*)\)")
_HOLDS = re.compile(r"\(\?#holds ([^)]*)\)")
_SHORT, _FEW = 400, 4
"""Characters of a text, and words, up to which plain search is faster than the screen."""
_HIDDEN = re.compile(
    r"[\W_]*|<secret>\w+</secret>|<[A-Za-z_ ]+>|\{\{?[A-Za-z_. ]+\}?\}|\$\{?[A-Z_]+\}?|%[A-Za-z_]+%|[xX*]{3,}"
)


_Pattern = tuple[str, re.Pattern[str], frozenset[str], str]
"""kind, expression, texts that every match begins with (none: not known), text that every match holds"""


def hidden(text: str) -> bool:
    """Whether `text` shows no secret: bullets, stars, or the name of a variable that stands for one."""
    return _HIDDEN.fullmatch(text) is not None


class Patterns:
    """Kind -> expression. The group that matched is the secret, or the whole match.

    A comment ``(?#starts a|b)`` says that every match begins with one of these texts, whatever their case: the
    expression is then tried only there. One without it is searched for in every text. ``(?#holds x)`` says that every
    match holds this text, as it is written.

    Raises:
        UserError: an expression that does not compile or can match nothing at all, a kind that is no name.
    """

    def __init__(self, patterns: Mapping[str, str], words: Iterable[str] = ()) -> None:
        self._patterns: list[_Pattern] = [
            (kind, _compiled(kind, regex), _starts(kind, regex), holds[1] if (holds := _HOLDS.search(regex)) else "")
            for kind, regex in patterns.items()
        ]
        self._screen = _Screen({*words, *(word for _, _, starts, _ in self._patterns for word in starts)})

    def words(self, text: str) -> frozenset[str]:
        """The words, of those given and of the starts, that `text` may hold; no word is missed."""
        return self._screen(text)

    def may_match(self, text: str, words: frozenset[str]) -> bool:
        return any(
            holds in text and (not starts or not words.isdisjoint(starts)) for _, _, starts, holds in self._patterns
        )

    def replacer(self, words: frozenset[str], put: Callable[[str, str], str]) -> Callable[[str], str]:
        """What replaces each secret of a text by ``put(secret, kind)``; `words` are those of the text, or of more."""
        active = [one for one in self._patterns if not one[2] or not words.isdisjoint(one[2])]
        starts = words.intersection(chain.from_iterable(one[2] for one in active))
        always = any(not one[2] for one in active)
        shortest = 1 if always else min(map(len, starts), default=1)

        def replace(text: str) -> str:
            if len(text) < shortest:
                return text
            if len(text) > _SHORT and len(starts) > _FEW:
                here = starts & self._screen(text)
            else:
                folded = text.lower()
                here = [word for word in starts if word in folded]
            return _replace(text, active, frozenset(here), put) if here or always else text

        return replace


def _replace(text: str, patterns: list[_Pattern], here: frozenset[str], put: Callable[[str, str], str]) -> str:
    marks: _Marks | None = None
    folded: str | None = None
    for kind, pattern, starts, holds in patterns:
        if (starts and here.isdisjoint(starts)) or holds not in text:
            continue
        if marks is None:
            marks = _Marks(text)
            text = marks.text
        if folded is None and starts:
            folded = _fold(text)
        parts, end = [], 0
        for match in _matches(pattern, text, folded or "", starts & here if starts else None):
            if match.start() < end:
                continue
            start, stop = _span(match)
            secret = text[start:stop]
            if start < stop and not hidden(secret):
                parts += [text[end:start], marks.of(put(marks.undo(secret), kind))]
                end = stop
        if parts:
            text = "".join([*parts, text[end:]])
            folded = None
    return text if marks is None else marks.undo(text)


def _matches(
    pattern: re.Pattern[str], text: str, folded: str, starts: frozenset[str] | None
) -> Iterable[re.Match[str]]:
    if starts is None:
        yield from pattern.finditer(text)
        return
    places: list[int] = []
    for word in starts:
        at = folded.find(word)
        while at >= 0:
            places.append(at)
            at = folded.find(word, at + 1)
    end = 0
    for at in sorted(places):
        if at >= end and (match := pattern.match(text, at)):
            end = match.end()
            yield match


def _span(match: re.Match[str]) -> tuple[int, int]:
    """Where the secret of a match stands: without the punctuation that ends a sentence, unless a quote follows."""
    start, stop = match.span(match.lastindex or 0)
    text = match.string
    if text[stop : stop + 1] not in ('"', "'", "\\", "`"):
        stop = start + len(text[start:stop].rstrip(".,;:!?")) or stop
    return start, stop


def _fold(text: str) -> str:
    """Lower case, letter by letter, so that places stay the same."""
    folded = text.lower()
    return folded if len(folded) == len(text) else "".join([c.lower() if len(c.lower()) == 1 else c for c in text])


def _compiled(kind: str, regex: str) -> re.Pattern[str]:
    if not isinstance(kind, str) or not re.fullmatch(r"[\w.-]+", kind):
        raise UserError(f"redact.patterns: {kind!r} is no name; use letters, digits and _")
    try:
        pattern = re.compile(regex, re.ASCII)
    except (re.error, TypeError, OverflowError) as error:
        raise UserError(f"redact.patterns.{kind} is no regular expression: {error}") from None
    for probe in ("", "a", " a1 "):
        if any(match.start() == match.end() for match in pattern.finditer(probe)):
            raise UserError(f"redact.patterns.{kind} can match nothing at all, so it would match everywhere; mend it")
    return pattern


def _starts(kind: str, regex: str) -> frozenset[str]:
    found = _STARTS.search(regex)
    starts = frozenset(found[1].lower().split("|")) if found else frozenset()
    for start in starts:
        if len(start.encode()) < 3:
            raise UserError(f"redact.patterns.{kind}: (?#starts {start}) is too short to look for; 3 bytes at least")
    return starts


class _Marks:
    """Placeholders stand as one private character each while patterns run: no pattern finds anything within one."""

    _FIRST, _LAST = 0xF0000, 0x10FFFD
    _ANY = re.compile("[\U000f0000-\U0010ffff]")

    def __init__(self, text: str) -> None:
        self._original = text
        self._next = self._FIRST
        self._mark: dict[str, str] = {}
        self._placeholder: dict[str, str] = {}
        self.text = PLACEHOLDER.sub(lambda match: self.of(match[0]), text) if "[redacted:" in text else text

    def of(self, placeholder: str) -> str:
        if not self._mark:
            self._given = set() if self._original.isascii() else set(self._ANY.findall(self._original))
        if placeholder not in self._mark:
            while chr(self._next) in self._given and self._next < self._LAST:
                self._next += 1
            mark = chr(self._next)
            self._next = min(self._next + 1, self._LAST)  # past 131,000 of them in one text, they share one
            self._mark[placeholder] = mark
            self._placeholder[mark] = placeholder
        return self._mark[placeholder]

    def undo(self, text: str) -> str:
        if not self._placeholder:
            return text
        return self._ANY.sub(lambda match: self._placeholder.get(match[0], match[0]), text)


class _Screen:
    """Tells which of many words may stand in a text, at memory speed and blind to ASCII case.

    Every 4-byte window of the text is looked up in a table by its hash; a word is there if all of its rarest windows
    are.
    """

    _FOLD, _MIX, _BITS = np.uint32(0x20202020), np.uint32(2654435761), 18
    _CHUNK = 1 << 18

    def __init__(self, words: Iterable[str]) -> None:
        self._words: dict[int, list[tuple[str, frozenset[int]]]] = {}
        for word in words:
            for choice in _windows(word.encode()):
                windows = frozenset(int.from_bytes(window, "little") | int(self._FOLD) for window in choice)
                for window in windows:
                    self._words.setdefault(window, []).append((word, windows))
        self._table = np.zeros(1 << self._BITS, dtype=bool)
        self._table[self._slots(np.array(list(self._words), dtype=np.uint32))] = True

    def _slots(self, windows: np.ndarray) -> np.ndarray:
        slots = windows * self._MIX
        slots >>= np.uint32(32 - self._BITS)
        return slots.astype(np.intp)

    def __call__(self, text: str) -> frozenset[str]:
        data = text.encode("utf-8", "replace") + b"\n\n\n\n"
        found: set[int] = set()
        for start in range(0, len(data) - 3, self._CHUNK):
            count = min(len(data) - 3 - start, self._CHUNK)
            windows = np.ndarray((count,), dtype="<u4", buffer=data, offset=start, strides=(1,)) | self._FOLD
            held = self._table.take(self._slots(windows))
            if held.any():
                found.update(windows[held].tolist())
        candidates = (one for window in found for one in self._words.get(window, ()))
        return frozenset(word for word, windows in candidates if windows <= found)


def _windows(word: bytes) -> list[list[bytes]]:
    """The three rarest windows of a word; of one with 3 bytes, each that it may continue to."""
    if len(word) == 3:
        return [[word + bytes([last])] for last in range(256)]
    common = b" etaoinsrhldcumfpgwybvk"
    windows = [word[i : i + 4] for i in range(len(word) - 3)]
    rarity = {window: sum(common.find(c) if c in common else 30 for c in window) for window in windows}
    return [sorted(rarity, key=rarity.__getitem__)[-3:]]
