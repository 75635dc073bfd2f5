"""Suite `probe` of `evaluate`: can this backbone read? Linear probes on its features, before any training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, ListConfig
from tqdm import tqdm

from offline_lm.errors import UserError
from offline_lm.models import backbone, devices
from offline_lm.models.critic import Critic, find_run
from offline_lm.ope import probe_pages, probes
from offline_lm.ope.probe_pages import PROBES, STYLES, Split
from offline_lm.ope.probes import Outcome

CONTROL = "bag of words"
GOALS = {"match": 0.95, "match_action": 0.95, "lookup": 0.95, "compare": 0.90}
HITS = ("match_action", "lookup")
"""Probes with four candidates, of which the right one is to be first; with two that is the pairwise accuracy."""

Splits = dict[str, Split]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Probe every backbone on the same pages, `seeds` times with other words; print tables.

    Returns:
        probe: backbone -> probe -> accuracy (mean over test questions of all seeds), NAME_hit and sensitivity beside.
        standard_error: the same keys but sensitivity: binomial, over test questions.
        styles: backbone -> style -> probe -> accuracy.

    Raises:
        UserError: a setting out of range, or a backbone that cannot be loaded.
    """
    settings = cfg.probe
    _check(settings)
    splits = {s: probe_pages.draw(s, settings.n_train, settings.n_test, settings.styles) for s in cfg.seeds}
    outcomes = {CONTROL: [_measure(pages, probes.bag_of_words(pages)) for pages in splits.values()]}
    for name in settings.backbones:
        outcomes[name] = _probe(name, cfg, splits)
    tables = {name: _pooled(found) for name, found in outcomes.items()}
    _show(tables)
    return {key: {name: table[key] for name, table in tables.items()} for key in ("probe", "standard_error", "styles")}


def _check(settings: DictConfig) -> None:
    for key, least in (("n_train", 5), ("n_test", 1)):
        if type(settings[key]) is not int or settings[key] < least:
            raise UserError(f"probe.{key}={settings[key]}: a whole number of pages from {least} is wanted")
    if not isinstance(settings.styles, ListConfig) or not settings.styles or not set(settings.styles) <= set(STYLES):
        raise UserError(f"probe.styles={settings.styles}: a list of {', '.join(STYLES)} is wanted")
    if not isinstance(settings.backbones, ListConfig) or not all(isinstance(b, str) for b in settings.backbones):
        raise UserError(f"probe.backbones={settings.backbones}: a list of names is wanted, as in [reader,tiny]")


def _probe(name: str, cfg: DictConfig, splits: dict[int, Splits]) -> list[dict[str, Outcome]]:
    """The outcomes of a backbone for each seed."""
    loaded = None if name == "tiny" else _load(name, cfg)
    out = []
    for seed, pages in splits.items():
        model, tokenizer = loaded or backbone.tiny(probes.texts(pages), seed=seed)
        model.to(devices.device(cfg.probe.device))
        with tempfile.TemporaryDirectory() as scratch:
            bar = partial(tqdm, desc=f"{name}, seed {seed}", unit="row")
            features = probes.encode(model, tokenizer, pages, Path(scratch), bar)
        out.append(_measure(pages, features))
    return out


def _load(name: str, cfg: DictConfig) -> tuple[Any, Any]:
    """`reader`, `run:RUN` (a run of `store`, `latest`, or its folder), or whatever `model.path` takes."""
    if name.startswith("run:"):
        critic = Critic.from_pretrained(find_run(name.removeprefix("run:"), cfg.store))
        return critic.model, critic.tokenizer
    return backbone.load(name, cfg.probe.dtype)


def _measure(pages: Splits, features: probes.Features) -> dict[str, Outcome]:
    return {name: probes.measure(split, features[name]) for name, split in pages.items()}


def _pooled(seeds: list[dict[str, Outcome]]) -> dict[str, dict[str, Any]]:
    """Means and standard errors over the test questions of all seeds, and means by page style."""
    accuracy, error = {}, {}
    styles: dict[str, dict[str, float]] = {}
    for name in PROBES:
        own = [outcomes[name] for outcomes in seeds]
        kinds = {name: [o.pairwise for o in own]} | ({f"{name}_hit": [o.hit for o in own]} if name in HITS else {})
        for column, parts in kinds.items():
            scores = np.concatenate(parts)
            accuracy[column] = share = float(scores.mean())
            error[column] = (share * (1 - share) / len(scores)) ** 0.5
        style_of, scores = np.concatenate([o.styles for o in own]), np.concatenate([o.pairwise for o in own])
        for style in dict.fromkeys(style_of.tolist()):
            styles.setdefault(style, {})[name] = float(scores[style_of == style].mean())
    ratios = [ratio for outcomes in seeds if (ratio := outcomes["match_action"].sensitivity) is not None]
    accuracy["sensitivity"] = float(np.mean(ratios))
    return {"probe": accuracy, "standard_error": error, "styles": styles}


def _show(tables: dict[str, dict[str, Any]]) -> None:
    """Accuracies in percent; then their means by page style; then a sentence about every backbone."""
    columns, styles = list(tables[CONTROL]["standard_error"]), list(tables[CONTROL]["styles"])
    print("\naccuracy on unseen words, %: yes or no, or the right action above a wrong one; _hit: above all three")
    _print("", [*columns, "sensitivity"], columns, tables)
    _print("chance", [25 if column.endswith("_hit") else 50 for column in columns], columns, tables)
    _print("goal", [f"{100 * GOALS[column]:.0f}" if column in GOALS else "" for column in columns], columns, tables)
    for name, table in tables.items():
        cells = [f"{100 * table['probe'][c]:.1f} ±{100 * table['standard_error'][c]:.1f}" for c in columns]
        _print(name, [*cells, f"{table['probe']['sensitivity']:.2f}"], columns, tables)
    print("\nby page style, mean over probes")
    _print("", styles, styles, tables)
    for name, table in tables.items():
        means = [float(np.mean([*table["styles"][style].values()])) for style in styles]
        _print(name, [f"{100 * mean:.1f}" for mean in means], styles, tables)
    print(*(_verdict(name, table, tables[CONTROL]) for name, table in tables.items() if name != CONTROL), sep="\n")


def _print(label: str, cells: list[Any], columns: list[str], labels: Iterable[str]) -> None:
    """A line of a table: each cell as wide as its column's name needs."""
    widths = [max(len(column), len("100.0 ±10.0")) + 1 for column in columns] + [len("sensitivity") + 1]
    shown = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]
    print(f"{label:{max(map(len, labels))}}", *shown, sep="")


def _verdict(name: str, table: dict[str, Any], control: dict[str, Any]) -> str:
    """Which goals are reached, and where reading is no better than counting words."""
    found, counted = table["probe"], control["probe"]
    reached = [probe for probe, goal in GOALS.items() if found[probe] >= goal]
    margin = {p: 2 * np.hypot(table["standard_error"][p], control["standard_error"][p]) for p in PROBES}
    blind = [probe for probe in PROBES if found[probe] <= counted[probe] + margin[probe]]
    return (
        f"{name}: reaches the goal in {', '.join(reached) or 'none'};"
        f" no better than counting words in {', '.join(blind) or 'none'}"
    )
