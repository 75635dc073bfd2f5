"""What the benchmarks share: arguments, paired repeats, and the one object that each prints."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any


def arguments(argv: list[str], **defaults: str) -> dict[str, str]:
    """``key=value`` arguments over ``defaults``; ``json`` is always among them.

    Raises:
        SystemExit: a key that is not among the defaults.
    """
    given = {"json": "false", **defaults}
    for argument in argv:
        key, _, value = argument.partition("=")
        if key not in given:
            raise SystemExit(f"no `{key}`; there are {', '.join(given)}")
        given[key] = value
    return given


def repeat(rows: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every row once, unmeasured; then ``repeats`` times all of them one after another, so that they share noise."""
    for row in rows.values():
        row()
    seen: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, row in rows.items():
            seen[name].append(row())
    return seen


def medians(seen: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seen.items()}


def versions(*packages: str, **settings: Any) -> dict[str, Any]:
    """Of Python, the cores and ``packages``; and the settings that the figures hold for (``json`` is none)."""
    settings.pop("json", None)
    found = {"python": platform.python_version(), "cores": os.cpu_count()}
    return {**found, **{name: version(name) for name in packages}, **settings}


def report(result: dict[str, Any], rows: list[dict[str, Any]], given: dict[str, str], script: str) -> None:
    """Prints the rows as a table and the command that repeats it, or with ``json=true`` one object.

    Args:
        result: `ours`, `peer`, `ratio`, `goal`, `unit` and `versions` (DESIGN section 9).
        rows: the table, each with the same keys.
        given: what `arguments` gave.
        script: the benchmark's file.
    """
    if given["json"] == "true":
        print(json.dumps({**result, "rows": rows}))
        return
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    for line in (names, *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"\n{_cell(result['ratio'])} times the peer, goal {result['goal']} ({result['unit']})")
    print(" ".join(["python", os.path.relpath(script), *sys.argv[1:]]))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "-" if value is None else str(value)
