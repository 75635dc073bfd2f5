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
    by_part,
    calibration_error,
    effective_rank,
    explained_variance,
    intervals,
    judge,
    kendall,
    position_only,
    reachable,
    target_gap,
    td_errors,
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
    got = judge(Estimates(v, q), REPLAY, tokens_of(REPLAY, 2), rows, gamma=0.5)
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
    got = judge(Estimates(v, None), REPLAY, tokens_of(REPLAY, 1), rows, gamma=0.5)
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
    got = judge(Estimates(v, np.zeros(counts.sum())), REPLAY, tokens, np.ones(8, bool), gamma=0.5)
    assert got["v_rmse"] == 0.0


def test_what_the_table_has_beside_by_hand():
    v = array(0.5, 0.8, 0.4, 0.1, 9.0, 0.2, 0.5, 1.0)
    q = array(0.6, 0.2, 1.0, 0.0, 0.1, 0.3, 0.2, 0.2, 0.4, 0.4, 0.5, 0.3, 1.1, 0.1)
    ensemble = np.array([q, q + array(*[0.0, 0.2] * 7)])
    got = judge(Estimates(v, q, ensemble), REPLAY, tokens_of(REPLAY, 2), np.ones(8, bool), gamma=0.5)
    known, mine = array(0.5, 1.0, 0, 0, 0.25, 0.5, 1.0), v[[0, 1, 2, 3, 5, 6, 7]]
    assert got["v_bias"] == pytest.approx((mine - known).mean())
    assert got["v_spread"] == pytest.approx(mine.std() / known.std())
    logged = q[::2]
    assert got["q_bias"] == pytest.approx((logged - known).mean())
    assert got["swapped"] == pytest.approx(np.abs(logged - q[1::2]).mean() / known.std())
    assert got["q_above_v"] == pytest.approx(explained_variance(logged, known) - explained_variance(mine, known))
    # turns 0, 1, 0, 1, 0, 1, 2: means of V
    means = array(*[1.1 / 3, 1.4 / 3] * 3, 1.0)
    assert got["turn_r2"] == pytest.approx(1 - (mine - means).var() / mine.var())
    turn = array(0, 1, 0, 1, 0, 1, 2)
    assert got["turn_corr"] == pytest.approx(stats.spearmanr(mine, turn)[0])
    assert got["q_turn_corr"] == pytest.approx(stats.spearmanr(logged, turn)[0])
    assert got["disagreement"] == 0.0  # of the logged responses, which both members see alike
    # returns reach from 0 to 1: 9 is further beyond than a half, and one of 8 + 2 * 14 values
    assert (got["nonfinite"], got["outside"], got["largest"]) == (0.0, pytest.approx(1 / 36), 9.0)
    # rewards are 0, nothing terminated: 0.5 * V(s') - V(s)
    td = array(0.4 - 0.5, 0.05 - 0.4, 4.5 - 0.1, 0.25 - 0.2, 0.5 - 0.5)
    assert got["td_rms"] == pytest.approx(np.sqrt((td**2).mean()))


def test_what_logs_cannot_answer_is_absent_or_nan():
    rows = np.ones(8, bool)
    alone = judge(Estimates(np.zeros(8), np.zeros(7)), REPLAY, tokens_of(REPLAY, 1), rows, gamma=0.5)
    assert not alone.keys() & {"sensitivity", "swapped", "margin", "disagreement"}
    assert math.isnan(alone["turn_r2"])  # V does not vary
    assert math.isnan(alone["length_corr"])  # nor do prompts
    lost = replay_of([[0.0, 0.0], [0.0]], [0, 0], [False, True])
    nothing = judge(Estimates(np.zeros(3), None), lost, tokens_of(lost, 1), np.ones(3, bool), gamma=0.5)
    assert math.isnan(nothing["outside"])
    assert math.isnan(nothing["v_spread"])


def test_values_that_are_not_finite_are_counted_and_left_out():
    v = array(0.5, NAN, 0.0, 0.0, 0.0, 0.25, 0.5, 1.0)
    q = array(0.5, np.inf, 0, 0, 0.25, 0.5, 1.0)
    got = judge(Estimates(v, q, np.array([q, q])), REPLAY, tokens_of(REPLAY, 1), np.ones(8, bool), gamma=0.5)
    assert got["nonfinite"] == pytest.approx(3 / (8 + 14))
    assert got["v_rmse"] == got["q_rmse"] == 0.0


def test_disagreement_is_that_of_members_about_their_mean():
    members = np.array([[0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.0, 3.0, 2.0, 2.0, 2.0]])
    got = judge(
        Estimates(np.zeros(8), members.min(axis=0), members), REPLAY, tokens_of(REPLAY, 1), np.ones(8, bool), gamma=0.5
    )
    # five of seven differ by 2: variance 2 each; the mean is 1 but for a 3
    assert got["disagreement"] == pytest.approx(math.sqrt(10 / 7) / np.std([1, 1, 1, 3, 1, 1, 1]))


def test_td_errors_by_hand():
    replay = replay_of([[1.0, 1.0], [0.0, NAN]], [1, 0], [False, False])
    from dataclasses import replace

    replay = replace(replay, terminated=array(0, 1, 0, 0, dtype=bool), reward=array(0.5, 1.0, 0.25, 0.0))
    got = td_errors(array(2, 3, 4, 5), replay, 0.5)
    assert got[:3] == pytest.approx([0.5 + 1.5 - 2, 1 - 3, 0.25 + 2.5 - 4])
    assert math.isnan(got[3])


def test_effective_rank():
    rng = np.random.default_rng(0)
    rotated, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    corners = np.vstack([np.eye(8), -np.eye(8)]) @ rotated
    assert effective_rank(corners + 3) == pytest.approx(8)  # eight directions alike, wherever they lie
    assert effective_rank(corners[:, :3] * array(1, 0, 0)) == pytest.approx(1)
    x = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])  # singular values as 3 to 1
    assert effective_rank(x) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert effective_rank(x.T) == pytest.approx(effective_rank(x.T @ np.eye(4)))
    assert effective_rank(np.full((5, 3), 7.0)) == 0.0


def test_reachable_returns_are_those_of_the_training_side():
    replay = replay_of([[-0.5, 0.25], [0.5, NAN], [9.0]], [1, 1, 1], [False, False, True])
    assert reachable(replay) == (-0.5, 0.5)
    assert reachable(replay_of([[0.5]], [1], [True])) == (0.0, 0.0)
    assert target_gap(array(0, 1), array(0.5, 0.75), replay) == pytest.approx(0.375)


def test_by_part_by_hand():
    v = array(0.5, 0.8, 0.4, 0.1, 9.0, 0.2, 0.5, 1.0)
    site = np.array(["shop", None, "shop"], object)
    got = {
        (name, *part.items()): (value, n)
        for name, value, n, part in by_part(
            Estimates(v, None), REPLAY, tokens_of(REPLAY, 1), np.ones(8, bool), gamma=0.5, site=site
        )
    }
    assert got["v_bias", ("turn", "1")] == (pytest.approx((-0.2 + 0.1 + 0.0) / 3), 3)
    assert got["v_bias", ("turn", "2-3")] == (0.0, 1)
    assert got["brier", ("turn", "0")] == (pytest.approx((0.5**2 + 0.4**2 + 0.8**2) / 3), 3)
    assert got["v_bias", ("site", "shop")] == (pytest.approx((-0.2 - 0.05) / 5), 5)
    assert got["ece", ("site", "shop")][0] == pytest.approx((0.5 + 0.2 + 0.8 + 0.5) / 5)
    assert got["td_rms", ("steps_to_end", "0")] == (pytest.approx(4.4), 1)  # of the step before a final observation
    assert got["td_rms", ("steps_to_end", "2-3")] == (pytest.approx(0.05), 1)
    assert {part[1] for _, part in got if part[0] == "site"} == {"shop"}


def test_what_is_tested_by_hand():
    won = array(*[1, 0] * 12)
    replay = replay_of([[0.5, g] for g in won], won, [False] * 24)
    tokens, rows = tokens_of(replay, 2), np.ones(48, bool)
    g = replay.returns
    v = 0.25 + 0.5 * g
    q = np.repeat(g, 2)
    q[1::2] -= 0.5  # the other action: half a point below
    got = intervals(Estimates(v, q), replay, tokens, rows, {"position_only": Estimates(np.zeros(48), None)})
    assert got["v_slope"] == pytest.approx((2, 2, 2))  # G is a line in V
    assert got["v_bias"].value == pytest.approx((v - g).mean())
    assert got["q_bias"] == pytest.approx((0, 0, 0))
    assert got["auc_mid"].value == got["auc_mid_above_position_only"].value + 0.5 == 1.0
    # mean over the two actions: Q - 1/4; what Q prefers never varies, so there is no slope
    assert math.isnan(got["action_slope"].value)
    q[1::2] -= np.where(won > 0, 1.0, 0.0).repeat(2)
    got = intervals(Estimates(v, q), replay, tokens, rows, {})
    assert got["action_slope"].value == pytest.approx(1)
    assert "first_within_task" not in got  # no task has both outcomes
    assert intervals(Estimates(v, q), replay, tokens, np.arange(48) < 30, {}) == {}  # 8 of 15 won: too few


def test_first_pages_that_tell_the_outcome_within_a_task():
    from dataclasses import replace

    won = array(*[1, 0] * 12)
    replay = replay_of([[0.5, g] for g in won], won, [False] * 24)
    replay = replace(replay, tasks=[f"task{i // 2}" for i in range(24)])
    told = intervals(
        Estimates(replay.success[replay.episode_of], None), replay, tokens_of(replay, 1), np.ones(48, bool), {}
    )
    assert told["first_within_task"] == (1.0, 1.0, 1.0)
    page = intervals(Estimates(replay.returns, None), replay, tokens_of(replay, 1), np.ones(48, bool), {})
    assert page["first_within_task"].value == 0.5
