"""The shop's exact values, against slower code written another way, and against rollouts."""

import functools
import math

import numpy as np
import orjson
import pytest

from offline_lm.envs.shop import STEP_LIMIT, WRONG_SIZE, Site, Task, expectile, record
from offline_lm.logs.jsonl import read
from offline_lm.types import Episode

GAMMA = 0.95


@functools.cache
def task(n=0, site=0):
    return Task(Site.draw(site), n)


def plain(t):
    """The task as a dict of lists: state -> [(next state or None, reward)]."""
    return {
        s: [
            (None if t.next[s, a] == -1 else int(t.next[s, a]), float(t.reward[s, a])) for a in range(len(t.actions[s]))
        ]
        for s in range(len(t.states))
    }


def best(mdp, gamma):
    """V* by in-place sweeps over Python floats."""
    v = dict.fromkeys(mdp, 0.0)
    for _ in range(200):
        for s in reversed(list(mdp)):
            v[s] = max(r + (gamma * v[n] if n is not None else 0.0) for n, r in mdp[s])
    return v


@pytest.mark.parametrize("n", range(3))
def test_optimal_values_by_another_iteration(n):
    t = task(n)
    mdp = plain(t)
    want = best(mdp, GAMMA)
    v, q = t.optimal(GAMMA)
    np.testing.assert_allclose(v, [want[s] for s in mdp], rtol=0, atol=1e-12)
    for s, moves in mdp.items():
        for a, (after, r) in enumerate(moves):
            assert q[s, a] == pytest.approx(r + (GAMMA * want[after] if after is not None else 0.0), abs=1e-12)
        assert np.isnan(q[s, len(moves) :]).all()
    # by hand: search, (next page,) product, size, buy
    clicks = 4 if t.target < 3 else 5
    assert v[0] == pytest.approx(GAMMA ** (clicks - 1))


def test_what_a_purchase_is_worth():
    t = task()
    index = {s: i for i, s in enumerate(t.states)}
    results = ("results", t.nouns[0], t.target // 3)
    wrong_size = next(s for s in t.sizes if s != t.size)
    buy = f"click[{t.site.wording['buy']}]"

    def reward(product, size):
        s = index["product", product, size, results]
        a = t.actions[s].index(buy)
        assert t.next[s, a] == -1
        return t.reward[s, a]

    assert reward(t.target, t.size) == 1.0
    assert reward(t.target, wrong_size) == reward(t.target, None) == WRONG_SIZE
    neighbour = next(i for i in t._shelves[results[1:]] if i != t.target)
    assert reward(neighbour, t.size) == 0.0
    assert t.optimal(GAMMA)[0][index["queue",]] == 0.0


@pytest.mark.parametrize("n", range(6))
def test_the_page_shows_all_that_decides_a_value(n):
    """States with one text have one value; they may differ in where "back" leads, for the product on two shelves."""
    t = task(n)
    _, q = t.optimal(GAMMA)
    seen = {}
    for s in range(len(t.states)):
        seen.setdefault(t.page(s), []).append(s)
    assert len(seen) > 0.9 * len(t.states)
    for first, *others in seen.values():
        for s in others:
            assert t.actions[s] == t.actions[first]
            np.testing.assert_allclose(q[s], q[first], atol=1e-12)
            assert t.states[s][:3] == t.states[first][:3]
            assert t.states[s][1] == 6
    assert t.goal not in "".join(seen)
    for s in range(len(t.states)):
        for action in t.actions[s]:
            assert action in t.page(s) or action[6:-1] in t.page(s)


def test_a_goal_names_its_target_alone():
    for n in range(8):
        t = task(n)
        matches = [i for i, p in enumerate(t.products) if all(w in t.goal for w in (p.colour, p.material, p.noun))]
        assert matches == [t.target]
        assert t.size in t.goal


# -- policies --------------------------------------------------------------------------------------------------


@functools.cache
def rollouts(n=0, episodes=1200):
    return list(record([task(n)], episodes, seed=7))


@pytest.mark.parametrize("policy", ["skilled-0.1", "skilled-0.4", "careless-0.3", "random"])
def test_returns_and_visits_agree_with_rollouts(policy):
    t = task()
    behaviour = t.behaviours()[policy]
    np.testing.assert_allclose(behaviour.sum(axis=1), 1.0)
    assert (behaviour[~t.valid] == 0).all()
    runs = [e for e in rollouts() if e["policy_id"] == policy]
    assert len(runs) == 300

    def close(samples, exact):
        error = np.std(samples) / math.sqrt(len(samples))
        assert abs(np.mean(samples) - exact) <= 3 * error + 0.01, (np.mean(samples), exact, error)

    close([sum(s["reward"] for s in e["steps"]) for e in runs], t.play(behaviour))
    close([len(e["steps"]) for e in runs], t.visitation(behaviour).sum())
    visits = t.visitation(behaviour)
    for s in np.argsort(visits)[::-1][:6]:  # by text, which equals the state for these
        same = [i for i in range(len(t.states)) if t.page(i) == t.page(s)]
        close([sum(step["observation"] == t.page(s) for step in e["steps"]) for e in runs], visits[same].sum())


def transitions(t, policy):
    """P(s'|s), without what ends the episode."""
    matrix = np.zeros((len(t.states), len(t.states)))
    for s in range(len(matrix)):
        for a in range(len(t.actions[s])):
            if t.next[s, a] >= 0:
                matrix[s, t.next[s, a]] += policy[s, a]
    return matrix


@pytest.mark.parametrize("limit", [1, 2, STEP_LIMIT])
def test_returns_and_visits_by_powers_of_the_matrix(limit):
    t = task()
    policy = t.behaviours()["skilled-0.4"]
    matrix = transitions(t, policy)
    visits = sum(np.linalg.matrix_power(matrix, k)[0] for k in range(limit))
    np.testing.assert_allclose(t.visitation(policy, limit), visits, atol=1e-12)
    assert t.play(policy, limit) == pytest.approx(visits @ (policy * t.reward).sum(axis=1), abs=1e-12)


def test_values_by_solving_the_linear_equations():
    t = task()
    policy = t.behaviours()["skilled-0.4"]
    n = len(t.states)
    transition = transitions(t, policy)
    want = np.linalg.solve(np.eye(n) - GAMMA * transition, (policy * t.reward).sum(axis=1))
    v, q = t.evaluate(policy, GAMMA)
    np.testing.assert_allclose(v, want, atol=1e-10)
    np.testing.assert_allclose((policy * np.nan_to_num(q)).sum(axis=1), want, atol=1e-10)
    half, _ = t.expectile(policy, GAMMA, 0.5)
    np.testing.assert_allclose(half, want, atol=1e-10)


def test_the_expectile_rises_to_the_best_supported_action():
    t = task()
    policy = t.behaviours()["skilled-0.4"].copy()
    last = t.evaluate(policy, GAMMA)[0]
    for tau in (0.7, 0.9, 0.999, 0.99999):
        v, _ = t.expectile(policy, GAMMA, tau)
        assert (v >= last - 1e-12).all()
        last = v
    np.testing.assert_allclose(last, t.optimal(GAMMA)[0], atol=2e-3)  # every action is in the support
    # an action that the behaviour never takes does not count
    supported = t.greedy(t.optimal(GAMMA)[1], 0.0)
    _, q_best = t.optimal(GAMMA)
    worst = np.nanargmin(np.where(t.valid, q_best, np.inf), axis=1)
    poor = np.zeros_like(supported)
    poor[np.arange(len(worst)), worst] = 1.0
    assert t.expectile(poor, GAMMA, 0.99999)[0][0] == 0.0


def test_expectile_by_hand():
    x, w = np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]])
    assert expectile(x, w, 0.5) == pytest.approx([0.5])
    assert expectile(x, w, 0.9) == pytest.approx([0.9])
    assert expectile(np.array([[0.0, 1.0, 5.0]]), np.array([[0.75, 0.25, 0.0]]), 0.75) == pytest.approx([0.5])


def test_ties_go_to_the_first_action_and_epsilon_is_uniform():
    t = task()
    q = np.zeros_like(t.reward)
    policy = t.greedy(q, 0.3)
    k = len(t.actions[0])
    assert policy[0, :k] == pytest.approx([0.7 + 0.3 / k] + [0.3 / k] * (k - 1))
    assert (policy[0, k:] == 0).all()


def test_the_mixture_is_what_a_large_log_shows():
    t = task()
    mixture = t.mixture()
    np.testing.assert_allclose(mixture.sum(axis=1), 1.0)
    taken = np.zeros(len(t.actions[0]))
    for e in rollouts():
        for step in e["steps"]:
            if step["observation"] == t.page(0):
                taken[t.actions[0].index(step["action"])] += 1
    share = taken / taken.sum()
    error = np.sqrt(share * (1 - share) / taken.sum())
    assert (abs(share - mixture[0, : len(share)]) < 4 * error + 0.005).all()


# -- logs ------------------------------------------------------------------------------------------------------


def test_records_are_read_without_a_rejection(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(map(orjson.dumps, record([task(0), task(1)], 8))))
    episodes = [e for e in read(tmp_path / "log.jsonl") if isinstance(e, Episode)]
    assert len(episodes) == 16
    for e in episodes:
        assert e.quality_flags == ()
        decisions = [s for s in e.steps if not s.is_final_observation]
        assert e.truncated == (len(decisions) < len(e.steps)) == (not e.terminated)
        assert len(decisions) <= STEP_LIMIT
        assert e.truncated is False or len(decisions) == STEP_LIMIT
        assert e.outcome_reward == decisions[-1].reward
        assert e.success == (e.outcome_reward == 1.0)
        for s in decisions:
            assert s.candidates is not None
            assert [c.action for c in s.candidates].count(s.action or "") == 1
            assert s.behavior_logprob is not None
            assert s.behavior_logprob <= 0
    assert len({e.native_id for e in episodes}) == 16
    assert {e.success for e in episodes} == {True, False}


def test_the_seed_decides_the_log():
    logs = [list(record([Task(Site.draw(2), 1)], 4, seed=s)) for s in (5, 5, 6)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]
    assert list(record([Task(Site.draw(2), 0), Task(Site.draw(2), 1)], 4, seed=5))[4:] == logs[0]


def test_sites_and_tasks_differ():
    assert len({task(n).goal for n in range(8)}) == 8
    assert Site.draw(0) != Site.draw(1)
    assert Site.draw(0) == Site.draw(0)
