"""Estimates with intervals that hold where episodes of a task are alike: tasks are what varies, not steps.

Every estimate is linearised: an influence for each observation, summed within tasks, whose squares give the variance
(Liang & Zeger 1986). Nothing is drawn at random, so that a run judged twice is judged alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata, t

Array = np.ndarray
NAN = float("nan")

LEVEL = 0.99
"""Of the intervals: a dozen comparisons of a sound critic then rarely go wrong together."""
TASKS = 10
"""With fewer tasks than these, episodes are what varies: the interval then holds for these tasks alone."""


class Measured(NamedTuple):
    """A value with its interval; low and high are NaN where there is none."""

    value: float
    low: float = NAN
    high: float = NAN


def clusters(task: Array, episode: Array) -> Array:
    """int64 [n]: what varies independently, from 0: the tasks [n] where there are `TASKS`, else the episodes [n]."""
    by_task = np.unique(task, return_inverse=True)[1]
    if len(by_task) and by_task.max() + 1 >= TASKS:
        return by_task
    return np.unique(episode, return_inverse=True)[1]


def measured(value: float, influence: Array, cluster: Array, level: float = LEVEL) -> Measured:
    """`value` and the interval that Student's t with one degree of freedom less than clusters gives.

    Args:
        influence: float64 [n]; their sum is, to first order, the error of `value`.
        cluster: int64 [n] from 0.
    """
    m = int(cluster.max()) + 1 if len(cluster) else 0
    if m < 2 or np.isnan(value):
        return Measured(value)
    sums = np.bincount(cluster, influence, minlength=m)
    half = float(np.sqrt(m / (m - 1) * (sums**2).sum()) * t.ppf((1 + level) / 2, m - 1))
    return Measured(value, value - half, value + half)


def mean(x: Array, cluster: Array) -> Measured:
    """Of x [n]."""
    if not len(x):
        return Measured(NAN)
    return measured(float(x.mean()), (x - x.mean()) / len(x), cluster)


def difference(x: Array, first: Array, cluster: Array, level: float = LEVEL) -> Measured:
    """Mean of x [n] where `first` bool [n] holds, less the mean where it does not."""
    if first.all() or not first.any():
        return Measured(NAN)
    a, b = x[first].mean(), x[~first].mean()
    influence = np.where(first, (x - a) / first.sum(), (b - x) / (~first).sum())
    return measured(float(a - b), influence, cluster, level)


def slope(x: Array, y: Array, cluster: Array) -> Measured:
    """Of the least-squares line of y [n] on x [n]; NaN where x does not vary."""
    dx = x - x.mean() if len(x) else x
    square = float((dx**2).sum())
    if square <= 1e-12 * len(x):
        return Measured(NAN)
    b = float((dx * y).sum() / square)
    return measured(b, dx * (y - y.mean() - b * dx) / square, cluster)


def auc(score: Array, positive: Array, cluster: Array, less: Array | None = None) -> Measured:
    """Area under the ROC curve of `score` [n] for `positive` bool [n], or how far it lies above that of `less` [n].

    The influences are placements (DeLong et al. 1988; clustered, Obuchowski 1997). NaN with one class only.
    """
    if positive.all() or not positive.any():
        return Measured(NAN)
    value, influence = _auc(score, positive)
    if less is not None:
        other, theirs = _auc(less, positive)
        value, influence = value - other, influence - theirs
    return measured(value, influence, cluster)


def _auc(score: Array, positive: Array) -> tuple[float, Array]:
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    rank, placement = rankdata(score), np.empty(len(score))
    # the share of the other class that an observation is rightly told from; ties count half
    placement[positive] = (rank[positive] - rankdata(score[positive])) / n_neg
    placement[~positive] = 1 - (rank[~positive] - rankdata(score[~positive])) / n_pos
    value = float(placement[positive].mean())
    return value, (placement - value) / np.where(positive, n_pos, n_neg)


def calibration(prediction: Array, outcome: Array, cluster: Array, bins: int = 5) -> Measured:
    """Expected calibration error (Guo et al. 2017, eq. 3) over bins of equal count, less what sampling adds to it.

    A gap that is 0 is measured as sqrt(2 / pi) of its standard error in the mean, without sign: that is taken off. So
    the value may be below 0. Bins of fewer than `TASKS` clusters count as 0. NaN of nothing.
    """
    if not len(prediction):
        return Measured(NAN)
    gap, n = prediction - outcome, len(prediction)
    rank = rankdata(prediction, method="min") - 1  # equal predictions share a bin
    bin_of, value, influence = (rank * bins / n).astype(int), 0.0, np.zeros(n)
    for b in np.unique(bin_of):
        here = bin_of == b
        ids = np.unique(cluster[here], return_inverse=True)[1]
        if (m := int(ids.max()) + 1) >= TASKS:
            mean_gap, off = gap[here].mean(), gap[here] - gap[here].mean()
            error = np.sqrt(m / (m - 1) * (np.bincount(ids, off) ** 2).sum())
            value += (here.sum() * abs(mean_gap) - np.sqrt(2 / np.pi) * error) / n
            influence[here] = np.sign(mean_gap) * off / n
    return measured(float(value), influence, cluster)
