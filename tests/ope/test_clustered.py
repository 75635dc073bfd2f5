"""Intervals over tasks, against numbers by hand, another computation, and their coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from offline_lm.ope import clustered
from offline_lm.ope.diagnostics import auc


def array(*x, dtype=float):
    return np.array(x, dtype)


def half(sums, m):
    """The half width by the definition: t times the root of m / (m - 1) sum of squares."""
    return stats.t.ppf(0.995, m - 1) * math.sqrt(m / (m - 1) * sum(s * s for s in sums))


def test_a_mean_of_single_observations_is_students():
    x = array(1, 2, 4, 9)
    got = clustered.mean(x, np.arange(4))
    low, high = stats.t.interval(0.99, 3, loc=4, scale=x.std(ddof=1) / 2)
    assert got == pytest.approx((4, low, high))


def test_alike_observations_of_a_cluster_are_one():
    x, ids = array(1, 1, 3, 3, 8, 8), array(0, 0, 1, 1, 2, 2, dtype=int)
    assert clustered.mean(x, ids) == pytest.approx(clustered.mean(x[::2], np.arange(3)))
    assert math.isnan(clustered.mean(array(), array(dtype=int)).value)
    assert math.isnan(clustered.mean(x, np.zeros(6, int)).low)  # one task says nothing of others


def test_difference_by_hand():
    x, first, ids = array(1, 0, 1, 0, 0, 0), array(1, 1, 1, 0, 0, 0, dtype=bool), array(0, 0, 1, 1, 2, 2, dtype=int)
    got = clustered.difference(x, first, ids)
    # influences: (1/3, -2/3, 1/3) / 3 of the first, 0 of the others; by cluster -1/9, 1/9, 0
    assert got == pytest.approx((2 / 3, 2 / 3 - half((1 / 9, 1 / 9, 0), 3), 2 / 3 + half((1 / 9, 1 / 9, 0), 3)))
    assert math.isnan(clustered.difference(x, np.ones(6, bool), ids).value)


def test_slope_by_hand_and_against_scipy():
    x, y = array(0, 1, 2), array(0, 2, 1)
    # b = 1/2; residuals -1/2, 1, -1/2; influences (1/2, 0, -1/2) / 2
    assert clustered.slope(x, y, np.arange(3)) == pytest.approx(
        (0.5, 0.5 - half((0.25, 0, 0.25), 3), 0.5 + half((0.25, 0, 0.25), 3))
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 50))
    fitted: object = stats.linregress(x, y)
    assert clustered.slope(x, y, np.arange(50)).value == pytest.approx(fitted.slope)  # pyright: ignore[reportAttributeAccessIssue]
    assert math.isnan(clustered.slope(np.ones(3), array(0, 2, 1), np.arange(3)).value)


def test_auc_by_hand_against_the_other_and_delong():
    positive = array(1, 1, 0, 0, dtype=bool)
    score = array(3, 1, 2, 0)
    got = clustered.auc(score, positive, np.arange(4))
    # placements 1, 1/2 of the positive, 1/2, 1 of the others; AUC 3/4; influences ±1/8
    assert got == pytest.approx((0.75, 0.75 - half([1 / 8] * 4, 4), 0.75 + half([1 / 8] * 4, 4)))
    rng = np.random.default_rng(1)
    score, positive = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.4
    other = score + rng.normal(0, 3, 80)
    assert clustered.auc(score, positive, np.arange(80)).value == pytest.approx(auc(score, positive))
    apart = clustered.auc(score, positive, np.arange(80), less=other)
    assert apart.value == pytest.approx(auc(score, positive) - auc(other, positive))
    # two scores that differ by nothing differ by 0 for sure
    assert clustered.auc(score, positive, np.arange(80), less=2 * score) == pytest.approx((0, 0, 0))
    assert math.isnan(clustered.auc(score, np.zeros(80, bool), np.arange(80)).value)


def test_intervals_cover_the_truth_where_episodes_of_a_task_are_alike():
    rng, missed = np.random.default_rng(2), np.zeros(2)
    ids = np.repeat(np.arange(40), 5)
    for _ in range(400):
        task = rng.normal(size=40)[ids]
        x = task + rng.normal(size=200)
        y = 0.5 * x + task * 0.3 + rng.normal(size=200)  # E[y | x] has the slope 0.5 + 0.3 / 2
        for i, (got, truth) in enumerate([(clustered.mean(x, ids), 0.0), (clustered.slope(x, y, ids), 0.65)]):
            missed[i] += not got.low <= truth <= got.high
    assert (missed <= 12).all()  # 4 are expected of 400; without clusters the mean misses some 60


def test_clusters_are_tasks_where_there_are_enough():
    task, episode = np.repeat(np.arange(10), 4), np.repeat(np.arange(20), 2)
    assert (clustered.clusters(task, episode) == task).all()
    assert (clustered.clusters(task[:36], episode[:36]) == episode[:36]).all()


def test_calibration_by_hand():
    prediction, outcome, ids = np.full(10, 0.5), array(*[1] * 9, 0), np.arange(10)
    got = clustered.calibration(prediction, outcome, ids, bins=1)
    error = math.sqrt(10 / 9 * (9 * 0.1**2 + 0.9**2)) / 10
    assert got.value == pytest.approx(0.4 - math.sqrt(2 / math.pi) * error)
    assert got.high - got.low == pytest.approx(2 * stats.t.ppf(0.995, 9) * error)
    few = clustered.calibration(
        np.r_[np.full(9, 0.9), np.full(91, 0.1)], np.zeros(100), np.r_[np.arange(9), np.full(91, 9)]
    )
    assert few.value == 0.0
    assert math.isnan(clustered.calibration(array(), array(), array(dtype=int)).value)


def test_calibration_error_of_what_is_calibrated_is_none():
    rng = np.random.default_rng(3)
    p, ids = rng.random(2000), np.arange(2000)
    found = []
    for _ in range(50):
        outcome = (rng.random(2000) < p).astype(float)
        found.append(clustered.calibration(p, outcome, ids).value)
    assert abs(np.mean(found)) < 0.003  # the plain error is 0.016 in the mean
    off = clustered.calibration(p + 0.2, (rng.random(2000) < p).astype(float), ids)
    assert off.low < 0.2 < off.high
