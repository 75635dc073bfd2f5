"""Fitted Q evaluation (Le, Voloshin & Yue 2019, algorithm 3) on frozen features, by ridge regression.

Iteration k fits Q_k(s, a) = x(s, a) . w_k to r + gamma * continue * sum_a' pi(a'|s') Q_{k-1}(s', a'), with Q_0 = 0: Q_k
is the value of k steps more. As many iterations as a step limit has steps give the value within that limit. A target
policy is a distribution over the logged candidates of each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_matrix
from scipy.special import softmax

Array = np.ndarray


def policy(q: Array, ptr: Array, temperature: float) -> Array:
    """float64 [C]: the probability of each candidate: softmax of Q / temperature within a step; 0: greedy.

    Args:
        q: [C], end to end; those of step n are `ptr[n]:ptr[n + 1]`. Of equal ones greedy takes the first.

    Raises:
        ValueError: a temperature below 0, or a Q that is not finite.
    """
    if temperature < 0 or not np.isfinite(q).all():
        raise ValueError(f"a temperature from 0 ({temperature}) and finite values of Q are wanted")
    out = np.zeros(len(q))
    lengths = np.diff(ptr)
    for n in np.unique(lengths[lengths > 0]):  # all steps with as many candidates at once
        at = ptr[:-1][lengths == n][:, None] + np.arange(n)
        if temperature > 0:
            out[at] = softmax(q[at] / temperature, axis=1)
        else:
            out[at[np.arange(len(at)), q[at].argmax(axis=1)]] = 1.0
    return out


def expected(probability: Array, candidate_of: Array, ptr: Array, x: Array) -> Array:
    """[N, ...]: sum over the candidates c of each step of `probability[c] * x[candidate_of[c]]`; 0 where there is none.

    Args:
        probability: [C]. candidate_of: int [C], the row of x that stands for each candidate. ptr: int [N+1].
        x: [A] or [A, d].
    """
    shape = (len(ptr) - 1, len(x))
    return csr_matrix((probability, candidate_of, ptr), shape=shape) @ np.asarray(x, np.float64)


@dataclass(frozen=True)
class Projection:
    """Features as a regression takes them: centred, on their first principal directions, each of variance 1; and 1."""

    mean: Array
    directions: Array

    @classmethod
    def fit(cls, x: Array, rank: int) -> Projection:
        """Of the rows of x [n, d]: at most `rank` directions; those that hardly vary are left out."""
        mean = x.mean(axis=0, dtype=np.float64)
        centred = x - mean
        value, vector = np.linalg.eigh(centred.T @ centred / len(x))
        kept = np.flatnonzero(value > 1e-8 * max(value[-1], 1e-300))[::-1][:rank]
        return cls(mean, vector[:, kept] / np.sqrt(value[kept]))

    def __call__(self, x: Array) -> Array:
        """[n, k+1]"""
        return np.concatenate([(x - self.mean) @ self.directions, np.ones((len(x), 1))], axis=1)


def linear_fqe(
    x: Array,
    reward: Array,
    next_x: Array,
    *,
    gamma: float,
    iterations: int,
    ridge: float,
    weight: Array | None = None,
) -> Array:
    """Weights w [d] of Q(s, a) = x(s, a) . w under the target.

    Args:
        x: [n, d]: features of the logged actions.
        reward: [n].
        next_x: [n, d]: features at the next state, averaged over the target's actions (`expected`); 0 where the step
            terminated. Leave out steps whose next state was not logged (DESIGN section 3).
        iterations: each fits the targets of the one before exactly.
        ridge: penalty on |w|², as many steps' worth of a feature of variance 1.
        weight: [n]: how often each step counts; once if not given.

    Raises:
        ValueError: no step.
        FloatingPointError: the iterations diverge beyond what a float holds.
    """
    if not len(x):
        raise ValueError("no step to fit on")
    weighted = x.T if weight is None else x.T * weight
    factor = cho_factor(weighted @ x + ridge * np.eye(x.shape[1]))
    first = cho_solve(factor, weighted @ reward)
    move = gamma * cho_solve(factor, weighted @ next_x)
    w = np.zeros(x.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(iterations):
            w = first + move @ w
    if not np.isfinite(w).all():
        raise FloatingPointError(f"fitted Q evaluation diverges within {iterations} iterations")
    return w


def fqe_values(
    x: Array,
    reward: Array,
    next_x: Array,
    offsets: Array,
    start_x: Array,
    *,
    counts: Array,
    start_counts: Array,
    gamma: float,
    iterations: int,
    ridge: float,
) -> Array:
    """float64 [B]: the policy's value in each resample: Q fitted on the episodes drawn, its mean over the starts drawn.

    Fitting again in each resample is what gives intervals that hold the error of the fit (Hao et al. 2021).

    Args:
        offsets: int [E+1]: the rows of x of each episode.
        start_x: [S, d]: features at the start of the judged episodes, averaged over the target's actions.
        counts: [B, E]; start_counts: [B, S]: how often each episode is in a resample (`estimators.resampled`).

    Raises:
        ValueError, FloatingPointError: as `linear_fqe`.
    """
    episode_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    out = np.empty(len(counts))
    for b, (drawn, starts) in enumerate(zip(counts, start_counts, strict=True)):
        weight = drawn[episode_of]
        w = linear_fqe(x, reward, next_x, gamma=gamma, iterations=iterations, ridge=ridge, weight=weight)
        out[b] = starts @ (start_x @ w) / starts.sum()
    return out
