"""Off-policy estimates of a policy's value from logged episodes, with bootstrap intervals over episodes.

The value is the expected discounted return of an episode. Steps are ragged: those of episode e are `offsets[e]` to
`offsets[e + 1]`. Every estimator takes `Trajectories` and `counts` float64 [B, E], how often each episode stands in
each of B resamples (ones for the log as it is), and gives float64 [B]; NaN where it is not defined. w_t is the product
of pi(a|s) / b(a|s) over steps 0..t; an episode that has ended keeps its last weight, as if it rested in an absorbing
state (Thomas & Brunskill 2016).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

Array = np.ndarray
NAN = float("nan")

LENGTHS = 20
"""Partial returns that MAGIC mixes at most: of episodes that are longer, some lengths are left out."""


@dataclass(frozen=True)
class Trajectories:
    """E episodes, padded to the T steps of the longest. Rewards and values are discounted to the start of the episode.

    Attributes:
        log_weight: float64 [E, T+1]: log of w_{t-1}; 0 at t = 0, -inf where the target never does what was done.
        reward: float64 [E, T]; 0 after the end.
        q: float64 [E, T]: Q(s_t, a_t) of the logged action, or 0; 0 after the end.
        v: float64 [E, T+1]: V(s_t), the mean of Q under the target, or 0; 0 after the end.
    """

    log_weight: Array
    reward: Array
    q: Array
    v: Array

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def weight(self) -> Array:
        """float64 [E, T+1]: w_{t-1}."""
        with np.errstate(over="ignore"):  # inf: what does not divide by the weights says so
            return np.exp(self.log_weight)

    @property
    def scaled_weight(self) -> Array:
        """`weight` up to a factor for each step, for what divides by the sum over episodes: it does not overflow."""
        largest = self.log_weight.max(axis=0)
        return np.exp(self.log_weight - np.where(np.isfinite(largest), largest, 0.0))


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def trajectories(
    log_ratio: Array,
    reward: Array,
    continues: Array,
    offsets: Array,
    *,
    gamma: float,
    q: Array | None = None,
    v: Array | None = None,
    final_values: Array | None = None,
) -> Trajectories:
    """Ragged steps as the estimators take them.

    Args:
        log_ratio: [N]: log pi(a_t|s_t) - log b(a_t|s_t).
        reward: [N].
        continues: [N]: 1 - terminated. Nothing counts behind a step that terminated.
        offsets: int [E+1].
        q: [N]: an estimate of Q(s_t, a_t) of the target. v: [N]: its mean over the target's actions. Both or neither.
        final_values: [E]: V of what comes behind an episode's last step, counted where that continues. Without it the
            step limit is part of the task and a truncated episode is worth what it earned (DESIGN section 3).

    Raises:
        ValueError: no episode, an empty one, q without v, or an input that is not finite (a log ratio may be -inf).
    """
    lengths = np.diff(offsets)
    if not len(lengths) or (lengths < 1).any() or offsets[-1] != len(reward):
        raise ValueError(f"offsets must rise from 0 to the number of steps, {len(reward)}, with a step in each episode")
    if (q is None) != (v is None):
        raise ValueError("q and v come together: v is the mean of q over the target's actions")
    if np.isnan(log_ratio).any() or (log_ratio == np.inf).any():
        raise ValueError("log_ratio must be finite or -inf: the logged action had a probability above 0")
    for name, x in (("reward", reward), ("q", q), ("v", v), ("final_values", final_values)):
        if x is not None and not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite")
    inside = np.arange(lengths.max()) < lengths[:, None]

    def padded(x: Array | None, fill: float = 0.0) -> Array:
        out = np.full(inside.shape, fill)
        if x is not None:
            out[inside] = x
        return out

    first = np.zeros((len(lengths), 1))
    discount = np.cumprod(np.concatenate([first + 1.0, gamma * padded(continues)], axis=1), axis=1)
    log_weight = np.concatenate([first, np.cumsum(padded(log_ratio), axis=1)], axis=1)
    earned = padded(reward) * discount[:, :-1]
    if final_values is not None:
        episode = np.arange(len(lengths))
        earned[episode, lengths - 1] += discount[episode, lengths] * final_values
    own_v = np.concatenate([padded(v) * discount[:, :-1], first], axis=1)
    return Trajectories(log_weight, earned, padded(q) * discount[:, :-1], own_v)


# -- estimators: (Trajectories, counts [B, E]) -> [B] ----------------------------------------------------------


def on_policy(t: Trajectories, counts: Array) -> Array:
    """The mean return of the log: the value of the policy that wrote it."""
    return _mean(t.reward.sum(axis=1), counts)


def importance_sampling(t: Trajectories, counts: Array) -> Array:
    """IS: the mean of w_{T-1} G (Precup, Sutton & Singh 2000)."""
    return _mean(_times(t.weight[:, -1], t.reward.sum(axis=1)), counts)


def weighted_importance_sampling(t: Trajectories, counts: Array) -> Array:
    """WIS: sum of w_{T-1} G over the sum of w_{T-1} (Precup et al. 2000). NaN where all weights are 0."""
    w = t.scaled_weight[:, -1]
    return _ratio(counts @ (w * t.reward.sum(axis=1)), counts @ w)


def per_decision(t: Trajectories, counts: Array) -> Array:
    """PDIS: the mean of sum_t gamma^t w_t r_t (Precup et al. 2000)."""
    return _mean(_times(t.weight[:, 1:], t.reward).sum(axis=1), counts)


def weighted_per_decision(t: Trajectories, counts: Array) -> Array:
    """WPDIS (CWPDIS): sum_t of the mean of gamma^t r_t under the weights w_t of all episodes (Thomas 2015).

    NaN where all weights of a step are 0.
    """
    w = t.scaled_weight[:, 1:]
    return _ratio(counts @ (w * t.reward), counts @ w).sum(axis=1)


def direct(t: Trajectories, counts: Array) -> Array:
    """DM: the mean of V(s_0)."""
    return _mean(t.v[:, 0], counts)


def doubly_robust(t: Trajectories, counts: Array) -> Array:
    """DR: the mean of sum_t gamma^t (w_t (r_t - Q(s_t, a_t)) + w_{t-1} V(s_t)) (Jiang & Li 2016, eq. 10, unrolled).

    Unbiased for whatever Q was not made from these episodes.
    """
    w = t.weight
    terms = _times(w[:, 1:], t.reward - t.q) + _times(w[:, :-1], t.v[:, :-1])
    return _mean(terms.sum(axis=1), counts)


def weighted_doubly_robust(t: Trajectories, counts: Array) -> Array:
    """WDR: DR with w_t divided by its sum over episodes (Thomas & Brunskill 2016).

    Behind the last step with a weight above 0 it goes by V.
    """
    return _partial_returns(t, counts)[:, -1]


def magic(t: Trajectories, counts: Array, spread: tuple[float, float]) -> Array:
    """MAGIC: the mix of partial returns with the least estimated squared error (Thomas & Brunskill 2016).

    The k-step return is WDR for k steps and V behind them: k = 0 is DM, k = T is WDR. Their covariance is estimated
    from the episodes, the bias of each by how far it lies outside the 50 % interval of WDR.

    Args:
        spread: ends of that interval less WDR. It is that of the log in every resample: nothing is nested.
    """
    lengths = np.unique(np.linspace(0, t.reward.shape[1], LENGTHS + 1).round().astype(int))
    weight = t.scaled_weight
    returns = _partial_returns(t, counts)[:, lengths]
    out = np.empty(len(counts))
    for b, (drawn, g) in enumerate(zip(counts, returns, strict=True)):
        low, high = g[-1] + min(spread[0], 0.0), g[-1] + max(spread[1], 0.0)
        bias = np.where(g > high, g - high, np.where(g < low, g - low, 0.0))
        out[b] = g @ _least_error(_covariance(t, weight, drawn, lengths) + np.outer(bias, bias))
    return out


ESTIMATORS: dict[str, Callable[[Trajectories, Array], Array]] = {
    "is": importance_sampling,
    "wis": weighted_importance_sampling,
    "pdis": per_decision,
    "wpdis": weighted_per_decision,
    "dm": direct,
    "dr": doubly_robust,
    "wdr": weighted_doubly_robust,
}
"""By the names of the table `diagnostics`; `estimates` adds `magic`."""

MODEL_BASED = ("dm", "dr", "wdr", "magic")
"""Those that need q and v."""


def _mean(x: Array, counts: Array) -> Array:
    return counts @ x / counts.sum(axis=1)


def _times(weight: Array, x: Array) -> Array:
    """`weight` times x, and 0 where x is 0: an infinite weight says nothing of a step that earned nothing."""
    return np.multiply(weight, x, out=np.zeros_like(weight), where=x != 0)


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full_like(above, NAN), where=below > 0)


def _partial_returns(t: Trajectories, counts: Array) -> Array:
    """[B, T+1]: g^(k) for k = 0..T (Thomas & Brunskill 2016): sum_{t<k} (r - Q) and sum_{t<=k} V, weighted."""
    w = t.scaled_weight
    total = counts @ w
    share = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)  # 0/0 is 0: no weight is left
    corrections = (counts @ (w[:, 1:] * (t.reward - t.q))) * share[:, 1:]
    # V(s_t) has the weights w_{t-1}; behind the last step it is 0
    values = np.concatenate([(counts @ (w[:, :-1] * t.v[:, :-1])) * share[:, :-1], np.zeros((len(counts), 1))], axis=1)
    before = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(corrections, axis=1)], axis=1)
    return np.cumsum(values, axis=1) + before


def _covariance(t: Trajectories, weight: Array, drawn: Array, lengths: Array) -> Array:
    """[k, k]: estimated covariance of the partial returns of `lengths`; `drawn` [E]: multiplicities of the episodes."""
    total = drawn @ weight
    w = weight * np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    own = np.cumsum(w * t.v, axis=1)
    own[:, 1:] += np.cumsum(w[:, 1:] * (t.reward - t.q), axis=1)
    n = drawn.sum()
    x = own[:, lengths]
    x = x - drawn @ x / n
    return (x * drawn[:, None]).T @ x * n / max(n - 1, 1)


def _least_error(m: Array) -> Array:
    """The x >= 0 of sum 1 with the least x' m x, for a positive semidefinite m [k, k].

    |R y|² + (sum(y) - 1)² with m = R'R, over y >= 0, is least at a multiple of x: for y = s x it is s² x'mx + (s - 1)².
    """
    value, vector = np.linalg.eigh(m)
    scale = value[-1] if value[-1] > 0 else 1.0
    root = (vector * np.sqrt(np.maximum(value, 0.0) / scale)).T
    y, _ = nnls(np.vstack([root, np.ones(len(m))]), np.r_[np.zeros(len(m)), 1.0])
    return y / y.sum()


# -- intervals -------------------------------------------------------------------------------------------------


def effective_sample_size(weight: Array) -> float:
    """(sum w)² / sum w² of weights [E] (Kish 1965): episodes that a log of the target itself would hold. 0 if none."""
    largest = weight.max(initial=0.0)
    if largest <= 0:
        return 0.0
    w = weight / largest
    return float(w.sum() ** 2 / (w**2).sum())


def resampled(episodes: int, resamples: int, seed: int = 0) -> Array:
    """float64 [1 + resamples, E]: counts of the log as it is, then of episodes drawn with replacement (Efron 1979)."""
    drawn = np.random.default_rng(seed).multinomial(episodes, np.full(episodes, 1 / episodes), size=resamples)
    return np.vstack([np.ones(episodes), drawn])


def interval(samples: Array, *, basic: bool = False) -> Interval:
    """The first of `samples` with the 95 % interval of the others.

    Resamples where the estimate is not defined are left out; where that is half of them, so is the interval.

    Args:
        basic: errors of the resamples about the first, turned round (Hao et al. 2021, for FQE: a resample loses support
            as the log does, and this takes that bias out); else percentiles.
    """
    value, drawn = float(samples[0]), samples[1:]
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or 2 * len(drawn) <= len(samples) - 1:
        return Interval(value, NAN, NAN)
    low, high = np.percentile(drawn, [2.5, 97.5])
    if basic:
        low, high = 2 * value - high, 2 * value - low
    return Interval(value, float(low), float(high))


def estimates(t: Trajectories, counts: Array) -> dict[str, Interval]:
    """Every estimate of `ESTIMATORS`, and `magic`, with its interval.

    Args:
        counts: as `resampled` draws them.
    """
    samples = {name: estimator(t, counts) for name, estimator in ESTIMATORS.items()}
    middle = np.percentile(samples["wdr"][1:], [25, 75]) - samples["wdr"][0] if len(counts) > 1 else (0.0, 0.0)
    samples["magic"] = magic(t, counts, (float(middle[0]), float(middle[1])))
    return {name: interval(each) for name, each in samples.items()}
