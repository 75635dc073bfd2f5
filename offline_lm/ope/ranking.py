"""How well scores order episodes by their outcome: AUC, over all and within tasks, with intervals and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from offline_lm.ope.diagnostics import NAN, auc

Array = np.ndarray

METRICS = ("auc", "within_task_auc")


def within_task_auc(score: Array, positive: Array, task: Array) -> float:
    """Mean of the AUC of `score` [n] for `positive` bool [n] in each task that has both outcomes; NaN if none has.

    Which task is hard, which alone orders episodes of many tasks, does not count in it. `task`: int64 [n] from 0.
    """
    order = np.lexsort((score, task))
    changes = (np.diff(task[order]) != 0) | (np.diff(score[order]) != 0)
    combined = np.empty(len(score))
    combined[order] = np.cumsum(np.r_[True, changes])
    total, wins = np.bincount(task), np.bincount(task, positive)
    rank = rankdata(combined) - (np.cumsum(total) - total)[task]  # less all of earlier tasks: the rank in its own
    pairs = wins * (total - wins)
    above = np.bincount(task, rank * positive) - wins * (wins + 1) / 2
    return float(np.mean(above[pairs > 0] / pairs[pairs > 0])) if pairs.any() else NAN


def _aucs(scores: Array, won: Array, task: Array) -> Array:
    """[2, k]: AUC and mean AUC within tasks of each of the `scores` [k, n]."""
    return np.array([[auc(s, won) for s in scores], [within_task_auc(s, won, task) for s in scores]])


def bootstrap(scores: Array, won: Array, task: Array, resamples: int) -> Array:
    """[resamples, 2, k]: AUC and mean AUC within tasks of the `scores` [k, n] on n episodes drawn with replacement.

    What is drawn is episodes of these tasks: other tasks would vary more, and a few say little of how much.
    """
    rng, n = np.random.default_rng(0), len(won)
    out = np.empty((resamples, 2, len(scores)))
    for b in range(resamples):
        drawn = rng.integers(n, size=n)
        out[b] = _aucs(scores[:, drawn], won[drawn], task[drawn])
    return out


def _interval(value: float, samples: Array) -> dict[str, float]:
    """`value` with the percentile interval (95 %) of the `samples` in which it is defined."""
    defined = samples[~np.isnan(samples)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (NAN, NAN)
    return {"value": float(value), "low": float(low), "high": float(high)}


def compare(
    scores: dict[str, Array], won: Array, task: Array, against: Mapping[str, Sequence[str]], resamples: int
) -> dict[str, dict[str, Any]]:
    """By score: `auc` and `within_task_auc`, each with an interval; `above`: how far they lie above other scores'.

    Args:
        scores: by name [n].
        won: bool [n].
        task: [n], names or numbers.
        against: for a score, those that it is held against; the intervals of differences are paired.
        resamples: of the bootstrap; with 0, intervals are NaN.
    """
    names, array = list(scores), np.array(list(scores.values()), np.float64)
    task = np.unique(task, return_inverse=True)[1]
    point, samples = _aucs(array, won, task), bootstrap(array, won, task, resamples)
    out: dict[str, dict[str, Any]] = {name: {"above": {}} for name in names}
    for m, metric in enumerate(METRICS):
        for i, name in enumerate(names):
            out[name][metric] = _interval(point[m, i], samples[:, m, i])
            for other in against.get(name, ()):
                j = names.index(other)
                difference = _interval(point[m, i] - point[m, j], samples[:, m, i] - samples[:, m, j])
                out[name]["above"].setdefault(other, {})[metric] = difference
    return out


def words(above: dict[str, dict[str, dict[str, float]]]) -> str:
    """What the differences to baselines say: above, below, or not above, where their interval holds 0.

    Args:
        above: by baseline and metric, as `compare` returns it. A metric that is not defined is left out.
    """
    told = []
    for metric, prefix in zip(METRICS, ("", "within tasks "), strict=True):
        sides: dict[str, list[str]] = {"above": [], "not above": [], "below": []}
        for baseline, measured in above.items():
            low, high = measured[metric]["low"], measured[metric]["high"]
            if not np.isnan(low):
                sides["above" if low > 0 else "below" if high < 0 else "not above"].append(baseline)
        said = "; ".join(f"{side} {', '.join(names)}" for side, names in sides.items() if names)
        told += [prefix + said] if said else []
    return " | ".join(told)
