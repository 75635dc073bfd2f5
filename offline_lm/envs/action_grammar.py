"""Actions on a page as text: ``click('e3')``. They are parsed, never run.

The names and their arguments are those of BrowserGym (`browsergym/core/action/functions.py`), so that its logs and
these speak of the same things; references are those of the page's snapshot.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

GRAMMAR = "browsergym"
LONGEST = 8192
"""Characters of an action."""

_KEY = re.compile(r"(?:(?:Control|Shift|Alt|Meta|ControlOrMeta)\+){0,3}(?:[A-Za-z0-9]|[A-Z][A-Za-z0-9]{1,19})")
_ARGUMENTS: dict[str, tuple[tuple[str, type], ...]] = {
    "noop": (),
    "click": (("bid", str),),
    "dblclick": (("bid", str),),
    "hover": (("bid", str),),
    "focus": (("bid", str),),
    "clear": (("bid", str),),
    "fill": (("bid", str), ("value", str)),
    "select_option": (("bid", str), ("options", str)),
    "press": (("bid", str), ("key_comb", str)),
    "keyboard_press": (("key", str),),
    "drag_and_drop": (("from_bid", str), ("to_bid", str)),
    "mouse_click": (("x", float), ("y", float)),
    "scroll": (("delta_x", float), ("delta_y", float)),
}
NAMES = tuple(_ARGUMENTS)


class BadAction(ValueError):
    """A text that is no action; the message says why, as an agent may read it."""


@dataclass(frozen=True, slots=True)
class Action:
    """An action's name, and its arguments by name: texts and numbers."""

    name: str
    args: dict[str, str | float]

    @property
    def refs(self) -> list[str]:
        """The elements that it names."""
        return [str(value) for key, value in self.args.items() if key.endswith("bid")]

    def __str__(self) -> str:
        return call(self.name, *self.args.values())


def call(name: str, *args: str | float) -> str:
    """The text of an action: ``call("fill", "e2", "it's")`` is ``fill('e2', "it's")``."""
    return f"{name}({', '.join(repr(arg) if isinstance(arg, str) else f'{arg:g}' for arg in args)})"


def parse(text: str) -> Action:
    """Reads one call with literal arguments.

    Raises:
        BadAction: anything else: code, several calls, an unknown name, arguments that do not fit.
    """
    if len(text) > LONGEST:
        raise BadAction(f"an action of {len(text)} characters: at most {LONGEST} are read")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # all that ast.parse raises
        raise BadAction("no action: one call such as click('e3') is wanted") from error
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise BadAction("no action: one call such as click('e3') is wanted")
    name = node.func.id
    if name not in _ARGUMENTS:
        raise BadAction(f"{name}: there are {', '.join(NAMES)}")
    kinds = dict(_ARGUMENTS[name])
    given = dict(zip(kinds, map(_literal, node.args), strict=False))
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in given:
            raise BadAction(f"{name}: an argument is given twice, or has no name")
        given[keyword.arg] = _literal(keyword.value)
    if len(node.args) > len(kinds) or given.keys() != kinds.keys():
        raise BadAction(f"{name} takes {', '.join(kinds) or 'no argument'}")
    for key, value in given.items():
        if not isinstance(value, kinds[key]):
            raise BadAction(f"{name}: {key} is a {'text' if kinds[key] is str else 'number'}")
    for key in ("key", "key_comb"):
        if key in given and not _KEY.fullmatch(str(given[key])):
            raise BadAction(f"{name}: {given[key]!r} is no key; Enter, ArrowDown, a, Control+a are")
    return Action(name, given)


def _literal(node: ast.expr) -> str | float:
    sign = 1.0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1.0, node.operand
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, str) and sign > 0:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9:
        return sign * float(value)
    raise BadAction("arguments are texts and numbers")
