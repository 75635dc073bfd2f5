"""What an action acts on that names an element by its number: the element's line of the page.

Recorders number a page's elements, and agents answer `click('17')`. What 17 is, a critic would have to look up across
the page. So it reads an action with the line that it names, as Mind2Web (Deng et al. 2023) represents candidates by
their elements.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST = 120
"""Characters of a line that are shown."""

_NUMBER = r"[A-Za-z]{0,4}\d{1,6}"
_LINE = re.compile(
    rf"""
      \[(?:ref=|aria-ref=)?({_NUMBER})\]                               # [17], [ref=e17]
    | \b(?:id|bid|ref|node|index|data-[\w-]+)=(["']?)({_NUMBER})\2(?=[\s/>\],)]|$)    # id="17"
    | ^\s*[-*]?\s*({_NUMBER})[:.)](?=\s)                               # 17: at the start of a line
    """,
    re.VERBOSE,
)
# a number by itself between quotes or brackets, rather than one within a text
_WHOLE = re.compile(rf"""(?:["'\[(=]|ref=)({_NUMBER})(?=["'\]),]|$)""")
_WORD = re.compile(rf"(?<![\w.])({_NUMBER})(?![\w.])")


def elements(page: str) -> dict[str, str]:
    """Lines of a page by the number that stands in them; numbers in several places name none.

    Of a line that holds several elements, each has its part: from its number, or the tag around it, to the next.
    """
    found: dict[str, str | None] = {}
    for line in page.split("\n"):
        matches = list(_LINE.finditer(line))
        starts = [0] * len(matches)
        for i in range(1, len(matches)):
            tag = line.rfind("<", matches[i - 1].end(), matches[i].start())
            starts[i] = tag if tag >= 0 else matches[i].start()
        for match, start, stop in zip(matches, starts, [*starts, len(line)][1:], strict=True):
            number = match[1] or match[3] or match[4]
            found[number] = None if number in found else line[start:stop]
    return {number: _shown(line) for number, line in found.items() if line is not None}


def notes(actions: Iterable[str], page: str | None) -> list[str]:
    """What is read behind each action done on `page`: the line of the element that it names first, "" if it names none.

    A page is searched only where some action holds a number.
    """
    numbers = [[match[1] for pattern in (_WHOLE, _WORD) for match in pattern.finditer(action)] for action in actions]
    named = elements(page) if page and any(numbers) else {}
    return [next((f" # {named[number]}" for number in own if number in named), "") for own in numbers]


def _shown(line: str) -> str:
    line = line.strip()
    return line if len(line) <= MOST else line[:MOST] + "…"
