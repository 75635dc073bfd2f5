"""Which of several policies an estimator chooses, and what the choice costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

Array = np.ndarray
NAN = float("nan")


class Choice(NamedTuple):
    """The policy `chosen`, an index; `regret`, what the best is truly worth more; `spearman` of estimates and truth."""

    chosen: int
    regret: float
    spearman: float


def choose(estimate: Array, true: Array) -> Choice | None:
    """By the greatest of `estimate` [k] of k policies; the first of equal ones. None where an estimate is not defined.

    Args:
        true: [k]: their true values; regret and rank correlation are NaN unless all are known, the correlation also
            where either is constant.
    """
    if np.isnan(estimate).any():
        return None
    chosen = int(estimate.argmax())
    if np.isnan(true).any():
        return Choice(chosen, NAN, NAN)
    varied = np.ptp(estimate) > 0 and np.ptp(true) > 0
    result: Any = spearmanr(estimate, true) if varied else None
    return Choice(chosen, float(true.max() - true[chosen]), float(result.statistic) if varied else NAN)
