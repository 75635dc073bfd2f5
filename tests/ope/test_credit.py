"""Advantage estimates on logs worked out by hand, and their errors against statistics that are known."""

import dataclasses
import functools

import numpy as np
import pytest

from offline_lm.envs.exact import End, TextMDP
from offline_lm.envs.shop import Site, Task
from offline_lm.ope.credit import (
    Estimator,
    Logs,
    Tasks,
    estimates,
    iql_table,
    mean_table,
    measure,
    outcomes,
    sample,
    squared_bias,
    td_table,
    true_advantages,
)

GAMMA, TAU = 0.5, 0.8


def explored(moves, limit):
    start = next(iter(moves))
    return TextMDP.explore(
        start, lambda s: (s[0], moves[s]), benchmark="hall", seed=0, number=0, goal="Out.", limit=limit
    )


@functools.cache
def hall():
    """Left is the end; right leads to a door that pays 1. Two steps at most, either action equally often."""
    mdp = explored(
        {
            ("a",): [("left", End(0.0, 0.0)), ("right", ("b",))],
            ("b",): [("stay", ("b",)), ("door", End(1.0, 0.0))],
        },
        limit=2,
    )
    return mdp, Tasks.stack([mdp], [np.full((2, 2), 0.5)])


@functools.cache
def shop(n=0):
    return Task(Site.draw(0), n).mdp


def logged(*episodes, resamples=1):
    """Logs of the hall from words: each episode the list of its actions, `resamples` parts of equal length."""
    actions = {"left": (0, 0, -1, 0.0), "right": (0, 1, 1, 0.0), "stay": (1, 0, 1, 0.0), "door": (1, 1, -1, 1.0)}
    rows = np.array([actions[action] for episode in episodes for action in episode])
    lengths = list(map(len, episodes))
    each = len(episodes) // resamples
    following = rows[:, 2].astype(np.int64)
    return Logs(
        state=rows[:, 0].astype(np.int64),
        action=rows[:, 1].astype(np.int64),
        turn=np.concatenate([np.arange(n) for n in lengths]),
        resample=np.repeat(np.arange(len(episodes)) // each, lengths),
        following=following,
        reward=rows[:, 3],
        continues=(following >= 0).astype(np.float64),
        offsets=np.r_[0, np.cumsum(lengths)],
    )


def estimated(logs, tasks=None, group=2):
    """Estimator -> advantages, with GAE at one lambda."""
    tasks = tasks or hall()[1]
    found = dict(estimates(logs, tasks, gamma=GAMMA, lambdas=[0.5, 1.0], tau=TAU, group=group))
    return {key: value.tolist() for key, value in found.items()}


# -- by hand ---------------------------------------------------------------------------------------------------


def test_values_under_the_step_limit_by_hand():
    _, tasks = hall()
    np.testing.assert_allclose(tasks.values(GAMMA), [[0.125, 0.625], [0, 0.5], [0, 0]], atol=1e-15)
    # 0.8 (1 - v) = 0.2 v at the door with one step left; 0.8 (1 - v) = 0.2 (v - 0.4) with two; 0.8 (0.4 - v) = 0.2 v
    np.testing.assert_allclose(tasks.values(GAMMA, TAU), [[0.32, 0.88], [0, 0.8], [0, 0]], atol=1e-14)


def test_every_estimator_by_hand():
    logs = logged(["right", "door"], ["left"])
    root = 0.5**0.5
    want = {
        Estimator("reinforce"): [0.5, 1, 0],
        Estimator("reinforce_mean"): [0, 0.5, -0.5],
        Estimator("grpo"): [root, root, -root],
        Estimator("dr_grpo"): [0.5, 0.5, -0.5],
        Estimator("mc", "exact"): [0.375, 0.5, -0.125],
        Estimator("td", "exact", 0.0): [0.125, 0.5, -0.125],
        Estimator("gae", "exact", 0.5): [0.25, 0.5, -0.125],
        Estimator("gae", "exact", 1.0): [0.375, 0.5, -0.125],
        Estimator("iql", "exact"): [0.08, 0.2, -0.32],
        Estimator("iql", "td_table"): [0.1, 0, -0.4],  # V of the start: 0.8 (0.5 - v) = 0.2 v
    }
    for critic in ("td_table", "mc_table", "position"):  # all three: 1/4 at the start, 1 at the door
        want |= {Estimator("gae", critic, lam): [0.25, 0, -0.25] for lam in (0.5, 1.0)}
        want |= {Estimator("mc", critic): [0.25, 0, -0.25], Estimator("td", critic, 0.0): [0.25, 0, -0.25]}
    want |= {Estimator("archer", critic): [0.25, 0, -0.25] for critic in ("td_table", "mc_table")}
    found = estimated(logs)
    assert found.keys() == want.keys()
    for key, advantages in want.items():
        assert found[key] == pytest.approx(advantages, abs=1e-12), key
    assert true_advantages(logs, hall()[1], gamma=GAMMA).tolist() == [0.125, 0.5, -0.125]


def test_at_the_step_limit_a_return_ends_and_a_table_bootstraps():
    """V(b) is 1/2 by returns, and by TD (1 + V(b) / 2) / 2 = 2/3."""
    found = estimated(logged(["right", "door"], ["right", "stay"]))
    last = {key: advantages[-1] for key, advantages in found.items()}
    assert last[Estimator("reinforce")] == 0
    assert last[Estimator("mc", "exact")] == last[Estimator("td", "exact", 0.0)] == -0.5
    assert last[Estimator("mc", "td_table")] == pytest.approx(-2 / 3)
    for lam in (0.0, 1.0):
        assert last[Estimator("gae" if lam else "td", "td_table", lam)] == pytest.approx(-1 / 3)
    assert last[Estimator("mc", "mc_table")] == -0.5
    assert last[Estimator("td", "mc_table", 0.0)] == -0.25
    assert last[Estimator("td", "position", 0.0)] == -0.5  # no turn comes after the last
    assert last[Estimator("archer", "td_table")] == pytest.approx(-1 / 3)


def test_each_log_has_tables_of_its_own():
    parts = [[["right", "door"], ["left"]], [["right", "stay"], ["right", "door"]]]
    both = estimated(logged(*parts[0], *parts[1], resamples=2))
    alone = [estimated(logged(*part)) for part in parts]
    for key, advantages in both.items():
        assert advantages == pytest.approx(alone[0][key] + alone[1][key], abs=1e-12), key
    with pytest.raises(ValueError, match="no multiple of a group of 3"):
        estimated(logged(*parts[0]), group=3)


def test_tables_by_hand():
    index, following = np.array([0, 1, 1, 0, 3]), np.array([1, 9, 9, 9, 2])
    reward, continues = np.array([0, 1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0, 1])
    assert mean_table(index, reward, 4).tolist() == [0, 0.5, 0, 0]
    table = td_table(index, following, reward, continues, 10, gamma=0.5)
    assert table.tolist() == pytest.approx([0.125, 0.5, *[0] * 8])
    weight = np.array([1, 3, 1, 2, 1.0])
    table = td_table(index, following, reward, continues, 10, gamma=0.5, weight=weight)
    assert table.tolist() == pytest.approx([0.125, 0.75, *[0] * 8])


# -- against dynamic programming and exact visits ----------------------------------------------------------------


def test_tables_of_a_log_that_holds_every_action_once():
    """Then its mean is the uniform policy's, and tables are what dynamic programming finds for that policy."""
    mdp = shop()
    state, action = np.nonzero(mdp.valid)
    following, reward = mdp.next[state, action], mdp.reward[state, action]
    uniform = mdp.valid / mdp.valid.sum(axis=1, keepdims=True)
    steps = (following, reward, (following >= 0).astype(np.float64))
    v, _ = mdp.evaluate(uniform, 0.95)
    np.testing.assert_allclose(td_table(state, *steps, len(v), gamma=0.95), v, atol=1e-10)
    pair = state * mdp.next.shape[1] + action
    for tau in (0.5, 0.8, 0.95):
        v, q = mdp.expectile(uniform, 0.95, tau)
        found_v, found_q = iql_table(state, pair, *steps, (len(v), q.size), gamma=0.95, tau=tau)
        np.testing.assert_allclose(found_v, v, atol=1e-9)
        np.testing.assert_allclose(found_q[pair], q[state, action], atol=1e-9)


def test_stacked_values_are_those_of_each_task():
    """With a step limit far away, of `TextMDP.evaluate`."""
    mdps = [dataclasses.replace(shop(n), limit=700) for n in range(2)]
    policies = [mdp.mixture() for mdp in mdps]
    tasks = Tasks.stack(mdps, policies)
    want = [mdp.evaluate(mu, 0.95)[0] for mdp, mu in zip(mdps, policies, strict=True)]
    np.testing.assert_allclose(tasks.values(0.95)[0], np.concatenate(want), atol=1e-10)
    with pytest.raises(ValueError, match="one step limit"):
        Tasks.stack([shop(0), mdps[1]], policies)


def test_what_is_left_to_chance_cannot_be_stacked():
    mdp = explored({("a",): [("toss", [(0.5, End(1.0, 0.0)), (0.5, End(0.0, 0.0))])]}, limit=1)
    with pytest.raises(ValueError, match="without chance"):
        Tasks.stack([mdp], [np.ones((1, 1))])


def test_samples_visit_states_as_often_as_the_policy_does():
    mdps = [shop(0), shop(1)]
    policies = [mdp.mixture() for mdp in mdps]
    tasks, n = Tasks.stack(mdps, policies), 600
    logs = sample(tasks, n, 2, seed=0)
    wanted = np.concatenate([mdp.visitation(mu) for mdp, mu in zip(mdps, policies, strict=True)])
    episode = np.repeat(np.arange(4 * n), np.diff(logs.offsets))
    visits = np.zeros((4 * n, len(wanted)))  # of either task by 2 n of the episodes, by the other ones 0
    np.add.at(visits, (episode, logs.state), 1)
    error = np.abs(2 * visits.mean(axis=0) - wanted)
    assert (error < 4 * visits.std(axis=0) / n**0.5 + 5 / n).all()
    assert wanted.max() > 1
    outcome, groups = outcomes(logs, 100)
    assert groups.bincount().tolist() == [100] * 24
    by_task = outcome.view(2, 2, n).mean(dim=(0, 2)).tolist()
    assert by_task == pytest.approx([m.play(mu) for m, mu in zip(mdps, policies, strict=True)], abs=0.05)
    assert (tasks.policy[logs.state, logs.action] > 0).all()
    assert np.bincount(logs.resample[logs.offsets[:-1]]).tolist() == [2 * n, 2 * n]
    inner = np.ones(len(logs.state), bool)
    inner[logs.ends] = False
    assert (logs.following[inner] == logs.state[1:][inner[:-1]]).all()
    assert (logs.state[logs.offsets[:-1]] == np.tile(np.repeat(tasks.start, n), 2)).all()
    cut = logs.continues[logs.ends] == 1
    assert (logs.turn[logs.ends][cut] == 14).all()
    assert 0 < cut.mean() < 1
    again = sample(tasks, n, 2, seed=0)
    assert (again.state == logs.state).all()
    assert (again.action == logs.action).all()


# -- bias and variance that are known -----------------------------------------------------------------------------


def test_bias_and_variance_by_hand():
    """Errors 1 and 3 in two logs: the square of the bias is 1 * 3, not (4 / 2)², which holds noise."""
    zero = np.zeros(2, np.int64)
    found = measure(np.array([2.0, 4.0]), np.array([1.0, 1.0]), zero, zero, np.array([0, 1]))
    assert (found["bias_squared"], found["variance"], found["action_bias_squared"]) == (3, 2, 0)
    assert found["rmse"] == 5**0.5
    assert found["scale"] == 1
    # a third step, in a cell of one log alone: left out
    state, resample = np.array([0, 0, 1]), np.array([0, 1, 1])
    more = measure(np.array([2.0, 4.0, 9.0]), np.ones(3), state, 0 * state, resample)
    assert more["rmse"] == 5**0.5
    # two visits of one log weigh twice, and never pair with each other: (1 * 3 + 1 * 3) / 2
    assert squared_bias(np.array([1.0, 1.0, 3.0]), np.zeros(3, np.int64), np.array([0, 0, 1])) == 3


def test_bias_of_a_baseline_and_of_actions():
    """Two states, two actions each, once in each of two logs."""
    state, action = np.tile([0, 0, 1, 1], 2), np.tile([0, 1], 4)
    resample, truth = np.repeat([0, 1], 4), np.tile([1.0, -1.0], 4)
    baseline = measure(truth + 2 * state, truth, state, action, resample)
    assert baseline["bias_squared"] == 2
    assert baseline["action_bias_squared"] == pytest.approx(0, abs=1e-12)
    turned = measure(truth + np.where(action == 0, 1, -1) * state, truth, state, action, resample)
    assert turned["bias_squared"] == turned["action_bias_squared"] == 0.5
    assert turned["variance"] == baseline["variance"] == 0


def test_signs_of_both_sides_weigh_the_same():
    truth = np.array([1.0, 1.0, -1.0, 1e-12, 0.0])
    estimate = np.array([2.0, 0.0, -1.0, -5.0, 5.0])
    zero, resample = np.zeros(10, np.int64), np.repeat([0, 1], 5)
    found = measure(np.tile(estimate, 2), np.tile(truth, 2), zero, zero, resample)
    assert found["sign_accuracy"] == (0.75 + 1) / 2
    never = measure(np.full(10, -1.0), np.tile(truth, 2), zero, zero, resample)
    assert never["sign_accuracy"] == 0.5
    assert np.isnan(never["correlation"])
    assert np.isnan(measure(truth[:2], truth[:2], zero[:2], zero[:2], np.array([0, 1]))["sign_accuracy"])


def test_a_group_takes_its_share_of_a_single_turn():
    """Dr. GRPO expects (1 - 1/n) A there, as each return is in its own mean; with the true V, G - V is A."""
    mdp = explored({("a",): [("best", End(1.0, 0.0)), ("good", End(0.3, 0.0)), ("bad", End(0.0, 0.0))]}, limit=1)
    tasks = Tasks.stack([mdp], [np.array([[0.3, 0.3, 0.4]])])
    for n, want in ((2, 1 / 4), (4, 1 / 16)):
        logs = sample(tasks, n, 40_000, seed=0)
        truth = true_advantages(logs, tasks, gamma=GAMMA)
        found = dict(estimates(logs, tasks, gamma=GAMMA, lambdas=[], tau=TAU, group=n))

        def judged(method, critic=None, *, found=found, truth=truth, logs=logs):
            return measure(found[Estimator(method, critic)], truth, logs.state, logs.action, logs.resample)

        dr_grpo = judged("dr_grpo")
        assert dr_grpo["bias_squared"] / dr_grpo["scale"] ** 2 == pytest.approx(want, rel=0.05)
        assert dr_grpo["action_bias_squared"] / dr_grpo["scale"] ** 2 == pytest.approx(want, rel=0.05)
        # the noise of n - 1 other returns: (n - 1) Var(G) / n²
        assert dr_grpo["variance"] / dr_grpo["scale"] ** 2 == pytest.approx((n - 1) / n**2, rel=0.05)
        assert judged("mc", "exact")["rmse"] == pytest.approx(0, abs=1e-12)
        # no baseline: off by V, the same for every action
        reinforce = judged("reinforce")
        assert reinforce["bias_squared"] == pytest.approx(0.39**2, rel=0.01)
        assert reinforce["action_bias_squared"] == pytest.approx(0, abs=1e-9)


def test_a_wrong_critic_turns_the_gradient_of_td_and_not_that_of_returns():
    mdps = [shop(n) for n in range(3)]
    tasks = Tasks.stack(mdps, [mdp.mixture() for mdp in mdps])
    logs = sample(tasks, 64, 20, seed=1)
    truth = true_advantages(logs, tasks, gamma=0.95)
    found = {
        estimator: measure(advantages, truth, logs.state, logs.action, logs.resample)
        for estimator, advantages in estimates(logs, tasks, gamma=0.95, lambdas=[0.5, 0.9], tau=TAU, group=8)
    }
    scale = found[Estimator("reinforce")]["scale"] ** 2

    def relative(key, *estimator):
        return found[Estimator(*estimator)][key] / scale

    wrong = [("td", "position", 0.0), ("gae", "position", 0.5), ("gae", "position", 0.9), ("mc", "position")]
    turned = [relative("action_bias_squared", *e) for e in wrong]
    assert turned == sorted(turned, reverse=True)
    assert turned[0] > 0.5
    assert abs(turned[-1]) < 0.03
    noise = [relative("variance", *e) for e in wrong]
    assert noise == sorted(noise)
    assert abs(relative("bias_squared", "mc", "exact")) < 0.03
    assert relative("variance", "mc", "exact") > 1
    assert relative("variance", "td", "exact", 0.0) < 1e-20
