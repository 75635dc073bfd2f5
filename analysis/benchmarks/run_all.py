"""Every benchmark that has a peer, one after another, as the README's table.

    python analysis/benchmarks/run_all.py [readme=README.md] [names=heads,embed,...] [keep=bench.jsonl]

Each runs in a process of its own with ``json=true``; nothing else should be running. With ``readme`` the table between
the two marks in that file is replaced by the new one: all rows, or those named.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _measure import arguments

HERE = Path(__file__).parent
NAMES = ("critic_update", "actor_update", "heads", "embed", "candidates", "ingest", "sampling", "sql_score", "returns")
BEGIN, END = "<!-- make bench writes from here -->", "<!-- to here -->"
HEAD = "| benchmark | ours | peer | unit | ratio | goal | measured |\n|---|---|---|---|---|---|---|"


def run(name: str) -> dict[str, Any]:
    """The object that a benchmark prints last.

    Raises:
        subprocess.CalledProcessError: it failed; its own message stands above.
    """
    command = [sys.executable, str(HERE / f"{name}.py"), "json=true"]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip().splitlines()
    return json.loads(lines[-1])


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    ratio, goal = result["ratio"], result["goal"]
    met = "" if goal is None else f"{goal:g}" + ("" if ratio >= goal else " (missed)")
    cells = (
        f"`{name}`", _number(result["ours"]), _number(result["peer"]), result["unit"], _number(ratio), met,
        f"{datetime.now(UTC):%Y-%m-%d}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def replaced(readme: str, rows: dict[str, str]) -> str:
    """``readme`` with `rows` in its table; rows of benchmarks that were not run stay.

    Raises:
        SystemExit: the marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the file has no lines `{BEGIN}` and `{END}`: put them where the table belongs")
    kept = {line.split("`")[1]: line for line in old.splitlines() if line.startswith("| `")}
    table = {name: line for name in NAMES if (line := rows.get(name) or kept.get(name))}
    return "\n".join([f"{before}{BEGIN}", HEAD, *table.values(), f"{END}{after}"])


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def main(argv: list[str]) -> None:
    given = arguments(argv, readme="", names=",".join(NAMES), keep="")
    if unknown := set(given["names"].split(",")) - set(NAMES):
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    rows = {}
    print(HEAD, flush=True)
    for name in given["names"].split(","):
        result = run(name)
        if result["peer"] is None:
            print(f"{name}: its peer is not installed, so its row stays as it was", file=sys.stderr)
            continue
        rows[name] = row(name, result)
        print(rows[name], flush=True)
        if given["keep"]:
            with Path(given["keep"]).open("a", encoding="utf-8") as kept:
                kept.write(json.dumps({"benchmark": name, **result}) + "\n")
        if given["readme"]:  # after each, so that a run that is cut short keeps what it has
            file = Path(given["readme"])
            file.write_text(replaced(file.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
