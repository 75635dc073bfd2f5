"""What the WebShop logs share: ``search[..] click[..] think[..]``, the instruction, the score, and blocks of text."""

from __future__ import annotations

import re
from typing import Any

from offline_lm.logs._records import Bad

GRAMMAR = "webshop"
INVALID = "Invalid action!"
BUY = "click[Buy Now]"
# A model stops at the end of the line, so the closing bracket may be missing; the shop takes such an action too.
_ACTION = re.compile(r"\A\s*(\w+)\[(.*?)\]?\s*\Z", re.DOTALL)
_ARGUMENT = {"search": "query", "click": "button", "think": "thought"}
_GOAL = re.compile(r"^Instruction:[ \t]*\n?[ \t]*([^\n]+)", re.MULTILINE)
_SCORE = re.compile(r"Your score \(min 0\.0, max 1\.0\): (\d+(?:\.\d+)?(?:[eE]-?\d+)?)")


def action_fields(action: str) -> dict[str, Any]:
    """The columns of one action. Text that is not ``name[argument]`` keeps its words and gets no name."""
    fields: dict[str, Any] = {"action": action, "action_grammar": GRAMMAR}
    if found := _ACTION.match(action):
        name, argument = found.groups()
        fields |= {"action_name": name, "action_args": {_ARGUMENT.get(name, "argument"): argument}}
        if name == "think":
            fields["thought"] = argument
    return fields


def goal(page: str) -> str | None:
    """The instruction on the shop's first page."""
    found = _GOAL.search(page)
    return found[1].strip() if found else None


def score(page: str) -> float | None:
    """The score that the shop shows after Buy Now. Raises Bad (``out_of_range``)."""
    found = _SCORE.search(page)
    if found is None:
        return None
    value = float(found[1])
    if value > 1:
        raise Bad("out_of_range", f"the score is {found[1][:40]}; the shop's are from 0 to 1. Was the log changed?")
    return value


def decode(data: bytes) -> str:
    """The text of one episode. Raises Bad (``invalid_utf8``)."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Bad("invalid_utf8", f"byte {error.start} is not UTF-8; re-encode the file as UTF-8") from None
