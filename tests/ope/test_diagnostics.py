import math

import numpy as np
import pytest
from scipy import stats

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.ope.diagnostics import (
    Estimates,
    auc,
    brier,
    calibration_error,
    explained_variance,
    judge,
    kendall,
    position_only,
    verdict,
)

NAN = math.nan


def array(*x, dtype=float):
    return np.array(x, dtype)


def test_auc_by_hand_and_against_others():
    assert auc(array(0.1, 0.2, 0.3), array(0, 0, 1, dtype=bool)) == 1.0
    assert auc(array(0.1, 0.2, 0.3), array(1, 0, 0, dtype=bool)) == 0.0
    assert auc(array(0.2, 0.2, 0.1, 0.3), array(1, 0, 0, 0, dtype=bool)) == pytest.approx(1.5 / 3)
    assert math.isnan(auc(array(0.1), array(1, dtype=bool)))
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert auc(score, positive) == pytest.approx(np.mean(pairs))
    metrics = pytest.importorskip("sklearn.metrics")
    assert auc(score, positive) == pytest.approx(metrics.roc_auc_score(positive, score))


def test_kendall_counts_the_pairs_that_the_truth_orders():
    truth = array(0, 1, 2, 3)
    assert kendall(truth, array(0, 1, 2, 3)) == 1.0
    assert kendall(truth, array(3, 2, 1, 0)) == -1.0
    assert kendall(truth, array(0, 2, 1, 3)) == pytest.approx(4 / 6)
    assert kendall(truth, array(5, 5, 5, 5)) == 0.0
    assert kendall(array(0, 0, 1), array(9, 1, 5)) == 0.0  # the tie of the truth is left out; one right, one wrong
    assert kendall(array(0, 1e-12, 1), array(9, 1, 10)) == 1.0
    assert math.isnan(kendall(array(1, 1), array(0, 1)))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40))
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y)[0])


def test_brier():
    assert brier(array(0.8, 0.4), array(1, 0)) == pytest.approx((0.04 + 0.16) / 2)
    assert math.isnan(brier(array(), array()))


def test_calibration_error_by_hand():
    probability, outcome = array(0.11, 0.19, 0.9, 1.0), array(0, 1, 1, 0)
    # bin 1: mean 0.15 against 0.5, half of the weight; bin 9: mean 0.95 against 0.5
    assert calibration_error(probability, outcome) == pytest.approx(0.5 * 0.35 + 0.5 * 0.45)
    assert calibration_error(array(0.25, 0.25, 0.25, 0.25), array(1, 0, 0, 0)) == pytest.approx(0)
    assert math.isnan(calibration_error(array(), array()))


def test_explained_variance():
    target = array(0, 1, 2, 3)
    assert explained_variance(target + 7, target) == 1.0
    assert explained_variance(np.ones(4), target) == 0.0
    assert explained_variance(-target, target) == pytest.approx(1 - 4)
    assert math.isnan(explained_variance(target, np.ones(4)))
    metrics = pytest.importorskip("sklearn.metrics")
    guess = np.random.default_rng(0).normal(size=4)
    assert explained_variance(guess, target) == pytest.approx(metrics.explained_variance_score(target, guess))


def replay_of(returns, success, held_out):
    """Episodes with these returns; NaN ends an episode as its final observation."""
    lengths = [len(r) for r in returns]
    flat = np.concatenate([np.asarray(r, float) for r in returns])
    n = len(flat)
    names = [f"e{i}" for i in range(len(returns))]
    return Replay(
        episode_ids=names, offsets=np.r_[0, np.cumsum(lengths)], step=np.concatenate([np.arange(m) for m in lengths]),
        tasks=names, acted=~np.isnan(flat), reward=np.zeros(n), terminated=np.zeros(n, bool), returns=flat,
        bootstraps=np.ones(n, bool), success=np.asarray(success, float), held_out=np.asarray(held_out, bool),
    )  # fmt: skip


def tokens_of(replay, options):
    """`options` responses at every step with an action."""
    counts = np.where(replay.acted, options, 0)
    n, branches = len(replay), np.r_[0, np.cumsum(counts)]
    none = np.zeros(0, int)
    return Tokens(
        prompt_ids=none,
        prompt_ptr=np.zeros(n + 1, int),
        response_ids=none,
        response_ptr=np.zeros(branches[-1] + 1, int),
        branch_ptr=branches,
        acted=replay.acted,
        usable=np.ones(n, bool),
        candidate_ptr=np.zeros(n + 1, int),
        candidate_branch=none,
        page=np.zeros(n, int),
        goal_ptr=np.zeros((n, 2), int),
        cut=np.zeros((n, 4), int),
    )


def test_position_only_is_the_mean_return_at_that_position():
    replay = replay_of([[1, 1], [0, 1, NAN], [9, 9]], [1, 1, 0], [False, False, True])
    mean = 3 / 4
    first, second = (1 + 5 * mean) / 7, (2 + 5 * mean) / 7
    assert position_only(replay) == pytest.approx([first, second, first, second, mean, first, second])


REPLAY = replay_of([[0.5, 1.0], [0.0, 0.0, NAN], [0.25, 0.5, 1.0]], [1, 0, 1], [False] * 3)


def test_judge_by_hand():
    v = array(0.5, 0.8, 0.4, 0.1, 9.0, 0.2, 0.5, 1.0)
    q = array(0.6, 0.2, 1.0, 0.0, 0.1, 0.3, 0.2, 0.2, 0.4, 0.4, 0.5, 0.3, 1.1, 0.1)
    rows = np.ones(8, bool)
    got = judge(Estimates(v, q), REPLAY, tokens_of(REPLAY, 2), rows)
    known = array(0.5, 1.0, 0, 0, 0.25, 0.5, 1.0)
    error = v[[0, 1, 2, 3, 5, 6, 7]] - known
    assert got["v_rmse"] == pytest.approx(np.sqrt((error**2).mean()))
    assert got["v_explained"] == pytest.approx(1 - error.var() / known.var())
    # middles: rows 1, 3 and 6; firsts: rows 0, 2 and 5
    assert got["auc_mid"] == 1.0
    assert got["auc_first"] == 0.5
    assert got["brier"] == pytest.approx((0.2**2 + 0.1**2 + 0.5**2) / 3)
    assert got["ece"] == pytest.approx((0.2 + 0.1 + 0.5) / 3)
    logged = q[::2]
    assert got["q_rmse"] == pytest.approx(np.sqrt(((logged - known) ** 2).mean()))
    assert got["spread"] == pytest.approx(logged.std() / known.std())
    pairs = q.reshape(-1, 2)
    assert got["sensitivity"] == pytest.approx(pairs.var(axis=1).mean() / pairs.mean(axis=1).var())
    won = [0, 1, 4, 5, 6]
    assert got["margin"] == pytest.approx((pairs[won, 0] - pairs[won, 1]).mean())


def test_judge_looks_at_the_given_rows_alone():
    rows = np.arange(8) < 5
    v = array(0.5, 0.8, 0.4, 0.1, 9.0, NAN, NAN, NAN)
    got = judge(Estimates(v, None), REPLAY, tokens_of(REPLAY, 1), rows)
    assert got["v_rmse"] == pytest.approx(np.sqrt((0 + 0.04 + 0.16 + 0.01) / 4))
    assert got["auc_mid"] == 1.0
    assert "q_rmse" not in got


def test_a_step_too_long_to_read_is_not_judged():
    from dataclasses import replace

    tokens = tokens_of(REPLAY, 1)
    usable = np.ones(8, bool)
    usable[0] = False
    counts = (tokens.acted & usable).astype(int)
    tokens = replace(tokens, usable=usable, acted=tokens.acted & usable, branch_ptr=np.r_[0, np.cumsum(counts)])
    v = np.where(usable, np.nan_to_num(REPLAY.returns), 1e6)
    got = judge(Estimates(v, np.zeros(counts.sum())), REPLAY, tokens, np.ones(8, bool))
    assert got["v_rmse"] == 0.0


def test_a_dead_head_and_a_lost_comparison_are_said_in_words():
    own = {"auc_mid": 0.6, "spread": 0.01, "sensitivity": 0.001}
    words = "\n".join(verdict("iql_lm", {"iql_lm": own, "q_mc": {"auc_mid": 0.7}, "position_only": {"auc_mid": 0.5}}))
    assert "iql_lm does NOT beat q_mc" in words
    assert "iql_lm beats position_only" in words
    assert "dead head" in words
    assert "hardly depends on the action" in words
    assert verdict("q_mc", {"q_mc": {"auc_mid": 0.7, "spread": 1.0, "sensitivity": 1.0}}) == []
