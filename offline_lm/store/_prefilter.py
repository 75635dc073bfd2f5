"""Which of many texts may hold something to redact: one pass of RE2 over all of them, at memory speed.

Most texts hold nothing, and Python's `re` is too slow to find that out. So every expression is widened to one that RE2
takes and that finds at least as much, and all of them are looked for at once. A text that is found is looked at
closely, in Python, by the expressions themselves; one that is not holds no match of any.

Widened also means: found where the text stands within JSON, escapes and all. So a dict is searched as its JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from re import _constants as sre  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_ESCAPED = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
"""Characters that stand in JSON as a backslash and another."""
_ALWAYS = r"\\[/u]"
"""Escapes that can hide any letter, and a slash: such a text is looked at closely."""
_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_SPACE: r"\s\x0b",  # RE2's \s lacks the vertical tab
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_NOT_WORD: r"\W",
    sre.CATEGORY_NOT_SPACE: r"\x00-\x08\x0e-\x1f\x21-\x{10ffff}",
}
_LONGEST = 100
"""Repetitions that are counted at most; RE2 takes 1,000."""


class Prefilter:
    """``prefilter(texts)``: for each text, whether it may hold a match of an expression.

    Where an expression cannot be widened, or RE2 does not take all of them together, that is every text; so it is of
    texts with less than ``least`` characters together: pyarrow compiles the expression at each call, for some ms.

    Args:
        patterns: of Python, ASCII classes, as `offline_lm.store._patterns` compiles them.
        texts: looked for too, whatever their case.
        others: expressions of RE2, taken as they are.
    """

    def __init__(
        self, patterns: Iterable[str], texts: Iterable[str], others: Iterable[str] = (), *, least: int = 512 << 10
    ) -> None:
        self.least = least
        widened = [widen(pattern) for pattern in patterns]
        known = [*(one for one in widened if one is not None), *map(re2_escape, texts), *others, _ALWAYS]
        union = "(?is)" + "|".join(known)
        self._regex = None if None in widened or _find(union, [""]) is None else union

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        if self._regex is None or sum(map(len, texts)) < self.least:
            return [True] * len(texts)
        found = _find(self._regex, texts)
        return [True] * len(texts) if found is None else found


def _find(regex: str, texts: Sequence[str]) -> list[bool] | None:
    """Whether RE2 finds `regex` in each text; None if it does not take the expression, or a text is none in UTF-8."""
    try:
        array = pa.array(texts, pa.large_string())
        return pc.match_substring_regex(array, regex).to_pylist()  # type: ignore[attr-defined]
    except (pa.ArrowInvalid, UnicodeEncodeError):
        return None


def re2_escape(text: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else f"\\x{{{ord(c):x}}}" for c in text)


def widen(pattern: str) -> str | None:
    """An expression of RE2 that, ignoring case, finds something in every text where `pattern` does, and in that text as
    it stands in JSON (if that has none of `_ALWAYS`). None: there is none that would not find every text.

    Assertions are dropped, repetitions may be longer, and whoever takes a character that JSON escapes takes the
    backslash too.
    """
    expression, _ = _sequence(_parser.parse(pattern, re.ASCII))
    return expression if _find(expression, [""]) == [False] else None


def _sequence(items: Any) -> tuple[str, bool]:
    """(expression, whether it is all of the sequence: if not, nothing may follow it)."""
    parts: list[str] = []
    for kind, value in items:
        part, whole = _item(kind, value)
        parts.append(part)
        if not whole:
            return "".join(parts), False
    return "".join(parts), True


def _item(kind: Any, value: Any) -> tuple[str, bool]:
    if kind is sre.LITERAL:
        return _literal(chr(value)), True
    if kind is sre.NOT_LITERAL:
        return _class([(sre.NEGATE, None), (sre.LITERAL, value)]), True
    if kind is sre.ANY:
        return ".", True
    if kind is sre.IN:
        return _class(value), True
    if kind in (sre.SUBPATTERN, sre.ATOMIC_GROUP):
        inner, whole = _sequence(value[-1] if kind is sre.SUBPATTERN else value)
        return f"(?:{inner})", whole
    if kind is sre.BRANCH:
        choices = [_sequence(choice) for choice in value[1]]
        return f"(?:{'|'.join(text for text, _ in choices)})", all(whole for _, whole in choices)
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
        return _repeat(*value)
    if kind in (sre.AT, sre.ASSERT, sre.ASSERT_NOT):
        return "", True
    return "", False  # a reference to a group, say: what follows is not looked for


def _repeat(least: int, most: Any, items: Any) -> tuple[str, bool]:
    inner, whole = _sequence(items)
    if not inner or not whole:
        return (f"(?:{inner})" if least else ""), whole
    if most == 1:
        return f"(?:{inner})" + ("" if least else "?"), True
    return f"(?:{inner})" + ({0: "*", 1: "+"}.get(least) or f"{{{min(least, _LONGEST)},}}"), True


def _literal(character: str) -> str:
    if character in _ESCAPED:
        return rf"(?:{re2_escape(character)}|\\+{re2_escape(_ESCAPED[character])})"
    return re2_escape(character)


def _class(items: Sequence[tuple[Any, Any]]) -> str:
    negated = items[0][0] is sre.NEGATE
    escaped = {c for raw, c in _ESCAPED.items() if _holds(items, raw)}
    wide = "".join(map(re2_escape, sorted(escaped | ({"\\"} if escaped else set()))))
    members = "".join(_member(kind, value) for kind, value in items if kind is not sre.NEGATE)
    if not negated:
        return f"[{members}{wide}]"
    # Its letters as they are written: otherwise `[^a]` would leave out an A that Python may take.
    return f"(?:(?-i:[^{members}])|[{wide}])" if wide else f"(?-i:[^{members}])"


def _holds(items: Sequence[tuple[Any, Any]], character: str) -> bool:
    """Whether a class holds `character`, letter for letter."""
    held, code = False, ord(character)
    for kind, value in items:
        if kind is sre.LITERAL:
            held = held or code == value
        elif kind is sre.RANGE:
            held = held or value[0] <= code <= value[1]
        elif kind is sre.CATEGORY:
            held = held or _find(f"[{_CATEGORIES[value]}]", [character]) == [True]
    return held != (items[0][0] is sre.NEGATE)


def _member(kind: Any, value: Any) -> str:
    if kind is sre.RANGE:
        return f"{re2_escape(chr(value[0]))}-{re2_escape(chr(value[1]))}"
    return _CATEGORIES[value] if kind is sre.CATEGORY else re2_escape(chr(value))
