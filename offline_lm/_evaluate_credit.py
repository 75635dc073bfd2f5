"""Suite `credit` of `evaluate`: the bias and variance of advantage estimators, against true advantages.

The tasks are those of the shop, its shelves made longer for each horizon; horizon 1 is the same purchase in a single
click. `offline_lm.ope.credit` says what is true, what is estimated, and how both are compared. Advantages have the
reward's unit; GRPO's alone are in standard deviations of a group: compare their sign and their correlation.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
from omegaconf import DictConfig, ListConfig

from offline_lm import cli
from offline_lm.envs import shop
from offline_lm.envs.exact import TextMDP
from offline_lm.errors import UserError
from offline_lm.losses.groups import group_advantages
from offline_lm.ope import credit
from offline_lm.ope.credit import Estimator
from offline_lm.store import Store

Array = np.ndarray

_LINES = {
    "exact": 'stroke="black"',
    "td_table": 'stroke="#0072b2"',
    "mc_table": 'stroke="#009e73"',
    "position": 'stroke="#d55e00"',
    "Dr. GRPO": 'stroke="grey" stroke-dasharray="4"',
}
_WIDTH, _HEIGHT, _GAP = 150, 120, 40  # of a panel, in pixels


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure every estimator on each horizon, `seeds` times with other tasks; print the table, write rows and plot.

    Returns:
        measurement: the id of its rows in the table `diagnostics` of the store, which `analysis/credit.sql` shows.
        logs: for each horizon, means over its episodes of `success` and `steps`, and `flat_groups`, the share of groups
            whose outcomes are all equal.
        rows: one for each horizon and estimator: what `credit.measure` returns, means over seeds.
    """
    settings = cfg.credit
    _check(settings)
    store = Store.create(cfg.store)
    found = [row for seed in cfg.seeds for horizon in settings.horizons for row in _measure(settings, horizon, seed)]
    name = f"credit-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:6]}"
    store.append("diagnostics", [r for row in found for r in _stored(name, row)])
    rows = _means(found)
    _show(rows)
    if settings.plot is not None:
        with cli.replacing(Path(settings.plot)) as beside:
            beside.write_text(picture(rows), encoding="utf-8")
    about = ("horizon", "success", "steps", "flat_groups")
    logs = [{key: row[key] for key in about} for row in rows if row["method"] == "grpo"]
    return {"measurement": name, "logs": logs, "rows": rows}


def _check(settings: DictConfig) -> None:
    for key, least in (("tasks", 1), ("episodes", 1), ("resamples", 2), ("group", 2)):
        if type(settings[key]) is not int or settings[key] < least:
            raise UserError(f"credit.{key}={settings[key]}: a whole number from {least} is wanted")
    if settings.episodes % settings.group:
        raise UserError(f"credit.episodes={settings.episodes}: a multiple of credit.group={settings.group} is wanted")
    horizons, lambdas = settings.horizons, settings.lambdas
    if not isinstance(horizons, ListConfig) or not horizons or not all(_is_horizon(h) for h in horizons):
        raise UserError(f"credit.horizons={horizons}: a list of 1 and whole numbers from {shop.HORIZON} is wanted")
    if not isinstance(lambdas, ListConfig) or not all(isinstance(x, int | float) and 0 < x <= 1 for x in lambdas):
        raise UserError(f"credit.lambdas={lambdas}: a list of numbers above 0, up to 1, is wanted (0 is always there)")
    for key in ("gamma", "tau"):
        if not isinstance(settings[key], int | float) or not 0 < settings[key] < 1:
            raise UserError(f"credit.{key}={settings[key]}: a number between 0 and 1 is wanted")


def _is_horizon(h: Any) -> bool:
    return type(h) is int and (h == 1 or h >= shop.HORIZON)


def _measure(settings: DictConfig, horizon: int, seed: int) -> list[dict[str, Any]]:
    """A row for each estimator."""
    words = shop.Site.draw(seed)
    mdps = [shop.Task(words, i, max(horizon, shop.HORIZON)).mdp for i in range(settings.tasks)]
    if horizon == 1:
        mdps = [shop.single_turn(mdp) for mdp in mdps]
    tasks = credit.Tasks.stack(mdps, [behaviour(mdp, [seed, i]) for i, mdp in enumerate(mdps)])
    logs = credit.sample(tasks, settings.episodes, settings.resamples, seed)
    truth = credit.true_advantages(logs, tasks, gamma=settings.gamma)
    outcome, groups = credit.outcomes(logs, settings.group)
    _, flat = group_advantages(outcome, groups, divide_by_std=False)
    about = {
        "seed": seed,
        "horizon": horizon,
        "n": len(truth),
        "success": float((outcome == 1).double().mean()),
        "steps": float(np.diff(logs.offsets).mean()),
        "flat_groups": flat / (int(groups[-1]) + 1),
    }
    rows = []
    for estimator, advantages in credit.estimates(
        logs, tasks, gamma=settings.gamma, lambdas=settings.lambdas, tau=settings.tau, group=settings.group
    ):
        measured = credit.measure(advantages, truth, logs.state, logs.action, logs.resample)
        rows.append({**about, **estimator._asdict(), **measured})
    return rows


def behaviour(task: TextMDP, seed: list[int]) -> Array:
    """One Markov policy [S, A] that stands for a log of several: the actions of all at each state, weighted by visits.

    The shares of the policies are uniform on the simplex, so that some tasks are mastered and some are hopeless.
    """
    policies = list(task.behaviours().values())
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(policies)))
    flow = np.sum([share * task.visitation(p)[:, None] * p for share, p in zip(shares, policies, strict=True)], axis=0)
    flow += 1e-12 * task.valid  # where no policy comes, any action
    return flow / flow.sum(axis=1, keepdims=True)


def _stored(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of `diagnostics` for each figure; what the figure is about stands in `extra`."""
    about = {key: row[key] for key in ("horizon", "method", "critic", "lam", "seed")}
    common = {"run_id": name, "suite": "credit", "group": _label(row), "n": row["n"]}
    common["extra"] = orjson.dumps(about).decode()
    figures = {key: value for key, value in row.items() if key not in about and key != "n"}
    return [{**common, "name": key, "value": None if np.isnan(value) else value} for key, value in figures.items()]


def _means(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds."""
    keys = ("horizon", *Estimator._fields)
    same: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        same.setdefault(tuple(row[key] for key in keys), []).append(row)
    out = []
    for key, rows in same.items():
        figures = [name for name in rows[0] if name not in (*keys, "seed")]
        out.append(dict(zip(keys, key, strict=True)) | {f: float(np.mean([row[f] for row in rows])) for f in figures})
    return out


def _label(row: dict[str, Any]) -> str:
    name = f"gae({row['lam']:g})" if row["method"] == "gae" else row["method"]
    return f"{name} {row['critic']}" if row["critic"] else name


def _show(rows: list[dict[str, Any]]) -> None:
    """One line for each estimator, four columns for each horizon."""
    horizons = list(dict.fromkeys(row["horizon"] for row in rows))
    cells = {(_label(row), row["horizon"]): _cell(row) for row in rows}
    print("bias, action (its part that is not the same for all actions of a state) and sd: over the root mean square")
    print(
        "of the true advantages, so that an estimate of 0 has a bias of 1. sign: share of right signs, chance is 0.5."
    )
    print(f"{'horizon':20}", *(f"{h:^24}" for h in horizons), sep=" | ")
    print(f"{'':20}", *[f"{'bias':>6}{'action':>7}{'sd':>6}{'sign':>5}"] * len(horizons), sep=" | ")
    for label in dict.fromkeys(label for label, _ in cells):
        print(f"{label:20}", *(cells[label, h] for h in horizons), sep=" | ")


def _cell(row: dict[str, Any]) -> str:
    bias, action, sd = (_relative(row, key) for key in ("bias_squared", "action_bias_squared", "variance"))
    return f"{bias:6.2f}{action:7.2f}{sd:6.2f}{row['sign_accuracy']:5.2f}"


def _relative(row: dict[str, Any], square: str) -> float:
    """The root of a figure over that of the squared true advantage; 0 where noise took the square below it."""
    return max(row[square], 0.0) ** 0.5 / row["scale"]


_PLOTTED: dict[str, Callable[[dict[str, Any]], float]] = {
    "action bias": lambda row: _relative(row, "action_bias_squared"),
    "sd": lambda row: _relative(row, "variance"),
    "sign accuracy": lambda row: row["sign_accuracy"],
}


def picture(rows: list[dict[str, Any]]) -> str:
    """SVG of GAE over lambda: a row of panels for each figure, a column for each horizon, a line for each critic.

    Dr. GRPO, which has no lambda, is a dashed level where it is not above all critics.
    """
    horizons = list(dict.fromkeys(row["horizon"] for row in rows))
    out = []
    for i, (title, value) in enumerate(_PLOTTED.items()):
        base = (i + 1) * (_HEIGHT + 2 * _GAP) - _GAP
        out.append(_text(_GAP, base - _HEIGHT - 24, f"{title}, of GAE over λ from 0 to 1"))
        most = max(value(row) for row in rows if row["lam"] is not None)
        for j, horizon in enumerate(horizons):
            left, here = _GAP + j * (_WIDTH + _GAP), [row for row in rows if row["horizon"] == horizon]
            curves = {
                c: [(r["lam"], value(r)) for r in here if r["lam"] is not None and r["critic"] == c] for c in _LINES
            }
            level = next(value(row) for row in here if row["method"] == "dr_grpo")
            curves["Dr. GRPO"] = [(0.0, level), (1.0, level)] if level <= most else []
            out.append(f'<path d="M{left},{base - _HEIGHT} v{_HEIGHT} h{_WIDTH}" fill="none" stroke="grey"/>')
            out += [
                _text(left, base - _HEIGHT - 6, f"horizon {horizon}"),
                _text(left - 28, base - _HEIGHT + 8, f"{most:.2f}"),
            ]
            for name, curve in curves.items():
                points = " ".join(f"{left + _WIDTH * x:.1f},{base - _HEIGHT * max(y, 0) / most:.1f}" for x, y in curve)
                out.append(f'<polyline points="{points}" fill="none" {_LINES[name]}/>')
    bottom = len(_PLOTTED) * (_HEIGHT + 2 * _GAP) + 10
    for j, (name, style) in enumerate(_LINES.items()):
        out.append(f'<path d="M{_GAP + 110 * j},{bottom} h25" {style}/>')
        out.append(_text(_GAP + 110 * j + 30, bottom + 4, name))
    size = f'width="{_GAP + len(horizons) * (_WIDTH + _GAP)}" height="{bottom + 15}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *out, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x}" y="{y}">{words}</text>'
