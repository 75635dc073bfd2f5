"""The n-gram baseline: logistic regression of an outcome on hashed words and pairs of words (DESIGN section 6).

A critic that does not beat it has learnt no more of a page than which words stand there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit

Array = np.ndarray

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_WORD = re.compile(r"\w+")


def bag(texts: Iterable[Sequence[str | None]], buckets: int = 1 << 18) -> csr_array:
    """float64 [n, buckets]: which words and pairs of neighbouring words each text has, rows scaled to length 1.

    Args:
        texts: [n], one at least: the fields of each, such as goal, page and action. In another field a word is another.
        buckets: what words are hashed into (Weinberger et al. 2009, without signs); a power of two.
    """
    known: dict[tuple[int, str], int] = {}

    def hashed(field: int, word: str) -> int:
        key = field, word
        if key not in known:
            known[key] = crc32(f"{field} {word}".encode())
        return known[key]

    rows: list[Array] = []
    for fields in texts:
        parts: list[Array] = []
        for field, text in enumerate(fields):
            words = np.array([hashed(field, w) for w in _WORD.findall((text or "").lower())], np.uint64)
            parts += [words, words[:-1] * 0x9E3779B1 + words[1:]]
        codes = np.concatenate(parts)
        rows.append(np.unique((codes ^ (codes >> 17)) % buckets).astype(np.int32))
    sizes = np.array([len(row) for row in rows])
    values = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes)
    return csr_array((values, np.concatenate(rows), np.r_[0, np.cumsum(sizes)]), shape=(len(rows), buckets))


def logistic(x: csr_array, y: Array, weight: Array, l2: float, start: Array) -> Array:
    """float64 [d + 1], intercept last: the least of mean logistic loss + l2/2 |w|², the intercept left free.

    Args:
        x: [n, d].
        y: float64 [n] in 0..1.
        weight: float64 [n]: what each row counts in the mean.
        start: float64 [d + 1], weights to begin at.
    """
    share, x_t = weight / weight.sum(), csr_array(x.T)

    def loss(w: Array) -> tuple[float, Array]:
        z = x @ w[:-1] + w[-1]
        slope = share * (expit(z) - y)
        value = share @ (np.logaddexp(0, z) - y * z) + l2 / 2 * (w[:-1] @ w[:-1])
        return float(value), np.r_[x_t @ slope + l2 * w[:-1], slope.sum()]

    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x


def probability(w: Array, x: csr_array) -> Array:
    """float64 [n] of the rows of `x` [n, d], by the weights of `logistic`."""
    return expit(x @ w[:-1] + w[-1])


def predict(x: csr_array, y: Array, weight: Array, task: Array, asked: csr_array, *, folds: int = 3) -> Array:
    """float64 [m]: probabilities for the rows of `asked` [m, d], by a `logistic` of the rows of `x` [n, d].

    Its penalty is the one of `PENALTIES` that predicts tasks best that were left out, a fold of them at a time. The
    rows of a single task leave nothing to choose by: the strongest is taken.

    Args:
        task: int64 [n].
    """
    seen = np.unique(x.indices)  # the weight of any other column stays 0
    x, asked = x[:, seen], asked[:, seen]
    names, zero = np.unique(task), np.zeros(len(seen) + 1)
    fold = np.random.default_rng(0).permutation(len(names))[np.searchsorted(names, task)] % folds
    losses = np.zeros(len(PENALTIES))
    for out in (fold == f for f in range(min(folds, len(names)) if len(names) > 1 else 0)):
        w = zero
        for i, l2 in enumerate(PENALTIES):
            w = logistic(x[~out], y[~out], weight[~out], l2, w)
            z = x[out] @ w[:-1] + w[-1]
            losses[i] += weight[out] @ (np.logaddexp(0, z) - y[out] * z)
    return probability(logistic(x, y, weight, PENALTIES[int(np.argmin(losses))], zero), asked)
