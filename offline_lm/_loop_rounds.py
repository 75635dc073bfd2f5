"""The rounds of a `loop` as rows of the table `diagnostics`, as lines, and as a picture.

A row is a figure: `run_id` is the loop, `suite` "loop", `group` the arm, `split` where it was measured; round, run and
critic stand in `extra`. The row named `settings` holds the configuration that the loop began with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from offline_lm._loop_judge import Figure
from offline_lm.errors import UserError
from offline_lm.store import Store

SUITE = "loop"
LOGS = "logs"
"""The arm of round 0, from which both others start."""

_FREE = (
    "rounds online store plot json fit.json fit.threads fit.device fit.logger fit.run_dir fit.data.store"
    " fit.data.resident collect.json collect.store collect.pages collect.chromium collect.sandbox collect.miniwob_html"
    " collect.device collect.timeout_s collect.retries"
).split()
"""Keys that may change while a loop goes on."""


@dataclass(frozen=True)
class Round:
    """What came of a round.

    Attributes:
        arm: online, offline, or LOGS for round 0.
        run, critic: of `fit`; the same run where it trained a critic alone, None for LOGS.
        split: where success was measured: unseen, pages that no training sees; or logs.
        figures: by name.
    """

    number: int
    arm: str
    run: str | None
    critic: str | None
    split: str
    figures: dict[str, Figure]

    def told(self) -> dict[str, Any]:
        """For JSON."""
        figures = {
            name: {k: x for k, x in f._asdict().items() if x is not None and x == x} for name, f in self.figures.items()
        }
        return {"round": self.number, "arm": self.arm, "run": self.run, "critic": self.critic, **figures}


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What stays the same while a loop goes on, by dotted key."""
    return dict(_leaves(config))


def check(store: Store, loop: str, wanted: dict[str, Any]) -> None:
    """Of a loop that goes on: they must be those that it began with, as far as its version had them.

    Raises:
        UserError: one of them is another.
    """
    with store.connect() as db:
        found = db.execute(
            "SELECT extra FROM diagnostics WHERE run_id = ? AND suite = ? AND name = 'settings'", [loop, SUITE]
        ).fetchall()
    begun = json.loads(found[0][0]) if found else wanted
    for key in sorted(begun.keys() & wanted.keys()):
        if wanted[key] != begun[key]:
            began = f"the loop {loop} of {store.url} began with {begun[key]}"
            raise UserError(f"{key}={wanted[key]}: {began}; give that, or another name=")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, without those that may change; a list is a value."""
    for key, value in node.items():
        path = f"{prefix}{key}"
        if path in _FREE:
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def write(store: Store, loop: str, made: Round, settings: dict[str, Any] | None) -> None:
    """All figures of a round, and the settings of a loop with those of its first, in one commit."""
    about = {"run_id": loop, "suite": SUITE, "group": made.arm, "split": made.split}
    about["extra"] = json.dumps({"round": made.number, "run": made.run, "critic": made.critic})
    rows = []
    for name, figure in made.figures.items():
        numbers = {k: None if x is None or math.isnan(x) else x for k, x in figure._asdict().items()}
        rows.append({**about, "name": name, **numbers})
    if settings is not None:
        rows.append({"run_id": loop, "suite": SUITE, "name": "settings", "extra": json.dumps(settings)})
    store.append("diagnostics", rows)


def read(store: Store, loop: str) -> dict[tuple[str, int], Round]:
    """The rounds that are in the store, by arm and number."""
    with store.connect() as db:
        rows = db.execute(
            'SELECT "group", split, extra, name, value, low, high, n FROM diagnostics'
            " WHERE run_id = ? AND suite = ? AND name <> 'settings'",
            [loop, SUITE],
        ).fetchall()
    done: dict[tuple[str, int], Round] = {}
    for arm, split, extra, name, *numbers, n in rows:
        about = json.loads(extra)
        key = arm, about["round"]
        made = done.setdefault(key, Round(about["round"], arm, about["run"], about["critic"], split, {}))
        value, low, high = (math.nan if x is None else float(x) for x in numbers)
        made.figures[name] = Figure(value, low, high, n)
    return done


# -- what is shown -----------------------------------------------------------------------------------------------

HEAD = "  ".join(
    [f"{'round':13}", f"{'success':>20}", *(f"{x:>8}" for x in ("V", "return", "KL", "episodes", "seconds"))]
)


def line(made: Round) -> str:
    """A round in the columns of `HEAD`."""
    won, seconds = made.figures["success"], sum(f.value for k, f in made.figures.items() if k.startswith("seconds_"))
    interval = f"{won.value:.3f} ({won.low:.3f}–{won.high:.3f})"
    cells = [
        f"{made.figures[key].value:.3f}" if key in made.figures else "" for key in ("v_first", "return_first", "kl")
    ]
    cells += [f"{made.figures['episodes'].value:.0f}", f"{seconds:.0f}"]
    return "  ".join([f"{made.number:2} {made.arm:10}", f"{interval:>20}", *(f"{cell:>8}" for cell in cells)])


_WIDTH, _HEIGHT, _GAP = 220, 130, 46
_PANELS = {
    "success on unseen pages": ("success",),
    "V of the first page (dashed: return)": ("v_first", "return_first"),
    "KL to the logs' policy, nats": ("kl",),
}
_COLOURS = {"online": "#0072b2", "offline": "#d55e00"}


def picture(made: Sequence[Round]) -> str:
    """SVG of success (with intervals), value and KL by round, a line for each arm; both start at the logs."""
    last = max(max(each.number for each in made), 1)
    out = []
    for i, (title, names) in enumerate(_PANELS.items()):
        left, base = _GAP + i * (_WIDTH + _GAP), _GAP + _HEIGHT
        shown = [f for each in made for name in names if (f := each.figures.get(name)) is not None]
        ends = [x for f in shown for x in f[:3] if x == x]
        low, high = min([0.0, *ends]), max([1.0 if i == 0 else 1e-9, *ends])

        def at(
            number: int, y: float, left: float = left, base: float = base, low: float = low, high: float = high
        ) -> str:
            return f"{left + _WIDTH * number / last:.1f},{base - _HEIGHT * (y - low) / (high - low):.1f}"

        out.append(f'<path d="M{left},{base - _HEIGHT} v{_HEIGHT} h{_WIDTH}" fill="none" stroke="grey"/>')
        out += [_text(left, base - _HEIGHT - 10, title), _text(left + _WIDTH - 40, base + 14, f"round {last}")]
        out += [_text(left - 34, base - _HEIGHT + 8, f"{high:.2f}"), _text(left - 34, base, f"{low:.2f}")]
        for arm, colour in _COLOURS.items():
            own = sorted((each for each in made if each.arm in (arm, LOGS)), key=lambda each: each.number)
            if all(each.arm == LOGS for each in own):
                continue
            for name, dashes in zip(names, ("", ' stroke-dasharray="4 3"'), strict=False):
                known = [(each.number, f) for each in own if (f := each.figures.get(name)) and f.value == f.value]
                points = " ".join(at(number, f.value) for number, f in known)
                out.append(f'<polyline points="{points}" fill="none" stroke="{colour}"{dashes}/>')
                if i == 0:
                    spans = [(at(n, f.low), at(n, f.high)) for n, f in known if f.low == f.low]
                    out += [f'<path d="M{a} L{b}" stroke="{colour}" stroke-width="0.7"/>' for a, b in spans]
    for j, (arm, colour) in enumerate(_COLOURS.items()):
        x, y = _GAP + 110 * j, 2 * _GAP + _HEIGHT
        out += [f'<path d="M{x},{y} h25" stroke="{colour}"/>', _text(x + 30, y + 4, arm)]
    size = f'width="{_GAP + len(_PANELS) * (_WIDTH + _GAP)}" height="{2 * _GAP + _HEIGHT + 20}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *out, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x}" y="{y}">{words}</text>'
