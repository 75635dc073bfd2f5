"""Fitted Q evaluation: by hand, and against dynamic programming on an exact site; and what it is fed with."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_lm.envs.shop import Site, Task
from offline_lm.ope import fqe
from offline_lm.ope.selection import choose

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis" / "benchmarks"))
import coverage  # pyright: ignore[reportMissingImports]

GAMMA = 0.9


def test_policies_over_candidates():
    q, ptr = np.array([1.0, 3.0, 3.0, 5.0, 0.0, 2.0]), np.array([0, 3, 3, 4, 6])
    assert fqe.policy(q, ptr, 0) == pytest.approx([0, 1, 0, 1, 0, 1])  # of equal ones the first
    e = np.exp([-1.0, 0.0, 0.0])
    want = [*(e / e.sum()), 1, 1 / (1 + np.e), np.e / (1 + np.e)]
    assert fqe.policy(q, ptr, 2.0) == pytest.approx(want)
    assert fqe.policy(1e6 * q, ptr, 1e-3)[3:] == pytest.approx([1, 0, 1])  # nothing overflows
    with pytest.raises(ValueError, match="temperature"):
        fqe.policy(q, ptr, -1)
    with pytest.raises(ValueError, match="finite"):
        fqe.policy(q * np.nan, ptr, 0)


def test_expected_features():
    x = np.array([[1.0, 0], [0, 1], [2, 2]])
    probability, candidate_of, ptr = np.array([0.25, 0.75, 1.0]), np.array([2, 0, 1]), np.array([0, 2, 2, 3])
    np.testing.assert_allclose(fqe.expected(probability, candidate_of, ptr, x), [[1.25, 0.5], [0, 0], [0, 1]])
    np.testing.assert_allclose(fqe.expected(probability, candidate_of, ptr, x[:, 0]), [1.25, 0, 0])


def test_two_steps_by_hand():
    """a then b: r = 1, then 4 or 2, gamma = 1/2. Q(b) = 3 is the mean, Q(a) = 1 + 0.5 * 3."""
    a, b = np.eye(2)
    x, reward = np.array([a, b, a, b]), np.array([1.0, 4.0, 1.0, 2.0])
    next_x = np.array([b, 0 * b, b, 0 * b])
    options: Any = dict(gamma=0.5, ridge=0.0)
    assert fqe.linear_fqe(x, reward, next_x, iterations=1, **options) == pytest.approx([1.0, 3.0])
    assert fqe.linear_fqe(x, reward, next_x, iterations=2, **options) == pytest.approx([2.5, 3.0])
    assert fqe.linear_fqe(x, reward, next_x, iterations=9, **options) == pytest.approx([2.5, 3.0])
    weight = np.array([1.0, 3.0, 1.0, 1.0])
    assert fqe.linear_fqe(x, reward, next_x, iterations=2, weight=weight, **options) == pytest.approx([2.75, 3.5])
    # (2 + 1) Q(b) = 6 with a ridge of one step, (2 + 1) Q(a) = 2 * (1 + 0.5 * 2)
    assert fqe.linear_fqe(x, reward, next_x, gamma=0.5, ridge=1.0, iterations=2) == pytest.approx([4 / 3, 2.0])
    with pytest.raises(ValueError, match="no step"):
        fqe.linear_fqe(x[:0], reward[:0], next_x[:0], iterations=2, **options)
    with pytest.raises(FloatingPointError, match="diverges"):
        fqe.linear_fqe(a[:1, None], np.ones(1), np.array([[9.0]]), gamma=0.9, ridge=0.0, iterations=1000)


@pytest.fixture(scope="module")
def site():
    mdp = Task(Site.draw(0), 0).mdp
    return mdp, mdp.greedy(mdp.optimal(GAMMA)[1], 0.3)


def one_hot(mdp, log, target):
    """x, next_x and start_x with a feature for each pair of state and action."""
    pairs = np.eye(target.size)
    mean = (target[:, :, None] * pairs.reshape(*target.shape, -1)).sum(axis=1)
    x = pairs[log.state * target.shape[1] + log.action]
    return x, np.where(log.after[:, None] >= 0, mean[log.after], 0.0), mean[log.state[log.offsets[:-1]]]


def test_tabular_fqe_is_dynamic_programming(site):
    """Where the log holds every pair: Q within as many steps as there are iterations, and without a limit."""
    mdp, target = site
    uniform = mdp.valid / mdp.valid.sum(axis=1, keepdims=True)
    s, a = np.nonzero(mdp.valid)
    log = coverage.Log(s, a, mdp.reward[s, a], mdp.next[s, a], uniform[s, a], np.arange(len(s) + 1))
    x, next_x, _ = one_hot(mdp, log, target)
    options: Any = dict(gamma=GAMMA, ridge=1e-10)
    limited = fqe.linear_fqe(x, log.reward, next_x, iterations=mdp.limit, **options).reshape(target.shape)
    assert (target[0] * limited[0]).sum() == pytest.approx(coverage.value(mdp, target, GAMMA), abs=1e-6)
    whole = fqe.linear_fqe(x, log.reward, next_x, iterations=300, **options).reshape(target.shape)
    np.testing.assert_allclose(whole[s, a], mdp.evaluate(target, GAMMA)[1][s, a], atol=1e-6)


def test_resamples_are_fits_of_what_was_drawn(site):
    mdp, target = site
    log = coverage.simulate(mdp, [mdp.behaviours()["skilled-0.4"]], 12, 0.2, np.random.default_rng(0))
    x, next_x, start_x = one_hot(mdp, log, target)
    x, next_x, start_x = (each[:, x.any(axis=0)] for each in (x, next_x, start_x))
    counts = coverage.estimators.resampled(12, 5)
    options: Any = dict(gamma=GAMMA, iterations=mdp.limit, ridge=1e-8)
    values = fqe.fqe_values(
        x, log.reward, next_x, log.offsets, start_x, counts=counts, start_counts=counts, **options
    )  # fmt: skip
    fitted = coverage.tabular_fqe(mdp, log, target, counts, GAMMA)
    np.testing.assert_allclose(values, (fitted[:, 0] * target[0]).sum(axis=1), atol=1e-5)
    rows = np.concatenate([np.repeat(np.arange(*log.offsets[e : e + 2]), int(n)) for e, n in enumerate(counts[3])])
    w = fqe.linear_fqe(x[rows], log.reward[rows], next_x[rows], **options)
    assert values[3] == pytest.approx(start_x[0] @ w, abs=1e-9)
    assert len(set(values.round(9))) > 2


def test_projection_whitens_and_keeps_what_varies():
    rng = np.random.default_rng(0)
    x = np.c_[3 * rng.normal(size=(500, 2)), rng.normal(size=500), np.full(500, 7.0)] + 5
    projection = fqe.Projection.fit(x, 9)
    y = projection(x)
    assert y.shape == (500, 4)  # the constant column is left out, and 1 is added
    np.testing.assert_allclose(y[:, :3].T @ y[:, :3] / 500, np.eye(3), atol=1e-9)
    assert (y[:, 3] == 1).all()
    first = fqe.Projection.fit(x, 2)(x)[:, :2]
    assert np.linalg.matrix_rank(np.c_[x[:, :2] - x[:, :2].mean(axis=0), first], tol=2.0) == 2


def test_choices_and_regret():
    true = np.array([0.2, 0.9, 0.5])
    assert choose(np.array([1.0, 3.0, 2.0]), true) == pytest.approx((1, 0.0, 1.0))
    assert choose(np.array([1.0, 2.0, 3.0]), true) == pytest.approx((2, 0.4, 0.5))
    assert choose(np.array([3.0, 1.0, 2.0]), true) == pytest.approx((0, 0.7, -1.0))
    assert choose(np.array([1.0, np.nan, 2.0]), true) is None
    assert choose(np.array([1.0, 2.0]), np.array([np.nan, 1.0])) == pytest.approx((1, np.nan, np.nan), nan_ok=True)
    assert choose(np.array([1.0, 1.0]), true[:2]) == pytest.approx((0, 0.7, np.nan), nan_ok=True)
