"""AUC within tasks, its intervals, and what is said of them."""

import numpy as np
import pytest

from offline_lm.ope.diagnostics import auc
from offline_lm.ope.ranking import bootstrap, compare, within_task_auc, words


def test_within_tasks_by_hand():
    task, won = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 0, 0, 1, 0, 1], bool)
    score = np.array([0.5, 0.5, 0.1, 0.2, 0.9, 0.7])
    # task 0: one tie and one right of two pairs; task 1: the one pair is wrong; task 2 has one outcome
    assert within_task_auc(score, won, task) == pytest.approx((0.75 + 0.0) / 2)
    assert np.isnan(within_task_auc(score, np.ones(6, bool), task))
    # the task alone, which orders episodes of several, is worth nothing here
    assert auc(np.array([3.0, 3, 3, 1, 1, 2]), won) != 0.5
    assert within_task_auc(np.array([3.0, 3, 3, 1, 1, 2]), won, task) == 0.5


def test_within_tasks_is_the_mean_of_the_auc_of_each():
    rng = np.random.default_rng(0)
    score, won, task = rng.integers(0, 6, 300) / 7 - 0.3, rng.random(300) < 0.3, rng.integers(0, 40, 300)
    each = np.array([auc(score[task == t], won[task == t]) for t in range(40)])
    assert np.isnan(each).any()
    assert within_task_auc(score, won, task) == pytest.approx(np.nanmean(each))


def test_the_interval_is_as_wide_as_theory_says():
    rng = np.random.default_rng(0)
    won = rng.random(400) < 0.4
    score = rng.normal(size=400) + 0.7 * won
    samples = bootstrap(np.array([score, score]), won, np.zeros(400, int), 400)
    assert (samples[:, :, 0] == samples[:, :, 1]).all()  # all scores on the same resampled episodes
    assert samples[:, 0] == pytest.approx(samples[:, 1])  # of a single task
    # DeLong et al. 1988: the variance from how each success, and each failure, is placed among the others
    above = (score[won][:, None] > score[~won]).astype(float)
    theory = above.mean(1).var(ddof=1) / won.sum() + above.mean(0).var(ddof=1) / (~won).sum()
    assert samples[:, 0, 0].std() == pytest.approx(theory**0.5, rel=0.15)
    assert samples[:, 0, 0].mean() == pytest.approx(auc(score, won), abs=0.005)


def test_critics_are_held_against_baselines():
    won, task = np.arange(40) % 2 == 0, np.repeat(["a", "b"], 20)
    noise = np.random.default_rng(0).normal(size=40)
    found = compare({"v": won * 1.0, "position": noise}, won, task, {"v": ["position"]}, 100)
    assert found["v"]["auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    above = found["v"]["above"]["position"]
    for metric in ("auc", "within_task_auc"):
        assert above[metric]["value"] == pytest.approx(1 - found["position"][metric]["value"])
        assert above[metric]["high"] == pytest.approx(1 - found["position"][metric]["low"])
    assert words(found["v"]["above"]) == "above position | within tasks above position"
    assert found["position"]["above"] == {}


def test_words():
    def of(low, high):
        return {"value": 0.0, "low": low, "high": high}

    nan = of(np.nan, np.nan)
    above = {
        "position": {"auc": of(0.01, 0.2), "within_task_auc": nan},
        "n_gram": {"auc": of(-0.01, 0.2), "within_task_auc": nan},
        "constant": {"auc": of(-0.2, -0.1), "within_task_auc": nan},
    }
    assert words(above) == "above position; not above n_gram; below constant"
    assert words({"n_gram": {"auc": nan, "within_task_auc": nan}}) == ""
