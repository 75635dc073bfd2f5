"""Exact values of finite text sites, against slower code written another way, and against rollouts."""

import functools
import math
from dataclasses import replace

import numpy as np
import orjson
import pytest

from offline_lm.envs import exact, office, shop
from offline_lm.envs.exact import End, Go, Move, State, TextMDP, expectile
from offline_lm.envs.play import play_once, play_texts
from offline_lm.logs.jsonl import read
from offline_lm.types import Episode

GAMMA = 0.95
SITES = {site.BENCHMARK: site for site in (shop, office)}
both = pytest.mark.parametrize("site", SITES)


@functools.cache
def task(site="shop", n=0, seed=0):
    return SITES[site].Task(SITES[site].Site.draw(seed), n).mdp


# -- by hand ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corridor():
    """Three rooms in a row; the last one's door pays 1, a window in the middle pays 0.2 and the careless one more."""
    moves = {
        ("a",): [("stay", ("a",)), ("right", ("b",))],
        ("b",): [("left", ("a",)), ("right", ("c",)), ("window", End(0.2, 1.0))],
        ("c",): [("left", ("b",)), ("door", End(1.0, 0.0))],
    }
    return TextMDP.explore(
        ("a",), lambda s: (f"room {s[0]}", moves[s]), benchmark="hall", seed=3, number=4, goal="Out.", limit=3
    )


def test_exploring_gives_the_tables(corridor):
    assert corridor.states == [("a",), ("b",), ("c",)]
    assert corridor.pages == ["room a", "room b", "room c"]
    assert corridor.paths == [[], ["right"], ["right", "right"]]
    assert corridor.actions == [["stay", "right"], ["left", "right", "window"], ["left", "door"]]
    assert corridor.next.tolist() == [[0, 1, -2], [0, 2, -1], [1, -1, -2]]
    assert corridor.reward.tolist() == [[0, 0, 0], [0, 0, 0.2], [0, 1, 0]]
    assert corridor.mistaken.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert corridor.valid.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert (corridor.site, corridor.task_id) == ("hall3", "hall3/4")


def test_values_of_the_corridor_by_hand(corridor):
    v, q = corridor.optimal(0.5)
    assert v.tolist() == [0.25, 0.5, 1.0]
    np.testing.assert_array_equal(q, [[0.125, 0.25, np.nan], [0.125, 0.5, 0.2], [0.25, 1.0, np.nan]])
    greedy = corridor.greedy(q)
    assert greedy.tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert corridor.play(greedy) == 1.0
    assert corridor.play(greedy, 2) == 0.0
    assert corridor.visitation(greedy).tolist() == [1.0, 1.0, 1.0]
    careless = corridor.behaviours(0.5)["careless-0.3"]
    np.testing.assert_allclose(careless, [[0.15, 0.85, 0], [0.1, 0.1, 0.8], [0.85, 0.15, 0]])
    # in three steps: right and window; stay, right and window; right, right and door
    assert corridor.play(careless) == pytest.approx(0.85 * 0.8 * 0.2 * 1.15 + 0.85 * 0.1 * 0.15)


@pytest.fixture(scope="module")
def toss():
    """A toss that ends the game well or leads to a second state, which leads back; one of the two is the start."""
    moves = {
        ("a",): [("toss", [(0.25, End(2.0)), (0.75, Go(("b",), -1.0))])],
        ("b",): [("back", Go(("a",), 0.5)), ("out", End(0.0))],
    }
    return TextMDP.explore(
        [(0.6, ("a",)), (0.4, ("b",))], lambda s: (f"state {s[0]}", moves[s]),
        benchmark="toss", seed=0, number=0, goal="Win.", limit=3, success=2.0,
    )  # fmt: skip


def test_chance_and_steps_that_earn_by_hand(toss):
    assert toss.next.tolist() == [[-3, -2], [0, -1]]
    assert toss.reward.tolist() == [[-0.25, 0], [0.5, 0]]
    assert toss.transitions.toarray().tolist() == [[0, 0.75], [0, 0], [1, 0], [0, 0]]
    v, q = toss.optimal(0.5)
    np.testing.assert_allclose(v, [-1 / 13, 6 / 13], atol=1e-12)
    np.testing.assert_allclose(q, [[-1 / 13, np.nan], [6 / 13, 0]], atol=1e-12)
    policy = np.array([[1, 0], [1, 0.0]])
    assert toss.visitation(policy).tolist() == pytest.approx([0.6 + 0.4 + 0.45, 0.4 + 0.45 + 0.3])
    assert toss.play(policy) == pytest.approx(1.45 * -0.25 + 1.15 * 0.5)
    assert toss.play(policy, 1) == pytest.approx(0.6 * -0.25 + 0.4 * 0.5)
    assert play_texts(toss, lambda states: [0] * len(states)) == pytest.approx(toss.play(policy))


def test_a_policy_that_does_nothing_twice_on_a_page_by_hand(corridor, toss):
    q = np.array([[1, 0, np.nan], [0, 0.1, 0.3], [0, 1, np.nan]])
    assert corridor.play(corridor.greedy(q)) == 0.0  # it stays for ever
    assert play_once(corridor, q) == 0.2  # it stays, goes right and opens the window
    assert play_once(corridor, q, 2) == 0.0
    # where all has been done it does the best again: from a, toss, back, toss; from b, back, toss, out
    back = np.array([[0, np.nan], [1, 0]])
    assert play_once(toss, back) == pytest.approx(0.6 * (-0.25 + 0.75 * (0.5 - 0.25)) + 0.4 * (0.5 - 0.25))


@both
def test_the_best_policy_does_nothing_twice_anyway(site):
    _, q = task(site).optimal(GAMMA)
    assert play_once(task(site), q) == pytest.approx(task(site).play(task(site).greedy(q)))


def test_what_is_recorded_of_chance(toss):
    toss = replace(toss, policies={"back": np.array([[1, 0], [1, 0.0]])})
    episodes = list(exact.record([toss], 4000))
    assert np.mean([e["steps"][0]["observation"] == "state a" for e in episodes]) == pytest.approx(0.6, abs=0.04)
    tosses = [s["reward"] for e in episodes for s in e["steps"] if s["action"] == "toss"]
    assert set(tosses) == {2.0, -1.0}
    assert tosses.count(2.0) / len(tosses) == pytest.approx(0.25, abs=0.03)
    returns = [sum(s["reward"] for s in e["steps"]) for e in episodes]
    assert returns == [e["outcome_reward"] for e in episodes]
    assert np.mean(returns) == pytest.approx(toss.play(toss.policies["back"]), abs=0.08)
    assert all(e["success"] == e["terminated"] == (e["steps"][-1]["reward"] == 2.0) for e in episodes)
    assert not any(e["success"] for e in exact.record([replace(toss, success=1.0)], 9))
    assert {e["success"] for e in exact.record([replace(toss, success=None)], 9)} == {None}


def test_a_transcript_goes_on_and_drops_its_oldest_lines():
    moves: dict[State, list[Move]] = {
        (0,): [("up", Go((1,), told="higher"))],
        (1,): [("up", Go((1,), told="top"))],
    }
    tower = TextMDP.explore(
        (0,), lambda s: ("ground", moves[s]), benchmark="t", seed=0, number=0, goal="", limit=3, lines=4
    )
    assert tower.pages == ["ground", "ground\nup\nhigher"]
    (episode,) = exact.record([tower], 1)
    pages = [step["observation"] for step in episode["steps"]] + [episode["final_observation"]]
    assert pages == ["ground", "ground\nup\nhigher", "up\nhigher\nup\ntop", "up\ntop\nup\ntop"]
    seen = []
    play_texts(tower, lambda states: seen.extend(states) or [0])
    assert [s["observation"] for s in seen] == pages[:3]
    assert [s["history"] for s in seen] == [[], ["up"], ["up", "up"]]


def test_chances_must_sum_to_one_and_values_must_exist(monkeypatch):
    def one_action(after):
        return TextMDP.explore(
            (0,), lambda s: ("", [("x", after)]), benchmark="", seed=0, number=0, goal="", limit=1
        )  # fmt: skip

    with pytest.raises(ValueError, match="sum to 1"):
        one_action([(0.5, End(1.0))])
    cost = one_action(Go((0,), -1.0))
    monkeypatch.setattr(exact, "_SWEEPS", 500)
    assert cost.evaluate(np.ones((1, 1)), 0.5)[0] == pytest.approx([-2])
    with pytest.raises(ValueError, match="for ever"):
        cost.evaluate(np.ones((1, 1)), 1.0)


# -- against other code ----------------------------------------------------------------------------------------


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


@both
@pytest.mark.parametrize("n", range(3))
def test_optimal_values_by_another_iteration(site, n):
    t = task(site, n)
    mdp = plain(t)
    want = best(mdp, GAMMA)
    v, q = t.optimal(GAMMA)
    np.testing.assert_allclose(v, [want[s] for s in mdp], rtol=0, atol=1e-12)
    for s, moves in mdp.items():
        for a, (after, r) in enumerate(moves):
            assert q[s, a] == pytest.approx(r + (GAMMA * want[after] if after is not None else 0.0), abs=1e-12)
        assert np.isnan(q[s, len(moves) :]).all()


@functools.cache
def rollouts(site):
    return list(exact.record([task(site)], 1200, seed=7))


@both
@pytest.mark.parametrize("policy", ["skilled-0.1", "skilled-0.4", "careless-0.3", "random"])
def test_returns_and_visits_agree_with_rollouts(site, policy):
    t = task(site)
    behaviour = t.behaviours()[policy]
    np.testing.assert_allclose(behaviour.sum(axis=1), 1.0)
    assert (behaviour[~t.valid] == 0).all()
    runs = [e for e in rollouts(site) if e["policy_id"] == policy]
    assert len(runs) == 300

    def close(samples, exactly):
        error = np.std(samples) / math.sqrt(len(samples))
        assert abs(np.mean(samples) - exactly) <= 3 * error + 0.01, (np.mean(samples), exactly, error)

    close([sum(s["reward"] for s in e["steps"]) for e in runs], t.play(behaviour))
    close([len(e["steps"]) for e in runs], t.visitation(behaviour).sum())
    visits = t.visitation(behaviour)
    for s in np.argsort(visits)[::-1][:6]:  # by text, which equals the state for these
        same = [i for i in range(len(t.states)) if t.pages[i] == t.pages[s]]
        close([sum(step["observation"] == t.pages[s] for step in e["steps"]) for e in runs], visits[same].sum())


def transitions(t, policy):
    """P(s'|s), without what ends the episode."""
    matrix = np.zeros((len(t.states), len(t.states)))
    for s in range(len(matrix)):
        for a in range(len(t.actions[s])):
            if t.next[s, a] >= 0:
                matrix[s, t.next[s, a]] += policy[s, a]
    return matrix


@both
@pytest.mark.parametrize("limit", [1, 2, None])
def test_returns_and_visits_by_powers_of_the_matrix(site, limit):
    t = task(site)
    policy = t.behaviours()["skilled-0.4"]
    matrix = transitions(t, policy)
    visits = sum(np.linalg.matrix_power(matrix, k)[0] for k in range(limit or 15))
    np.testing.assert_allclose(t.visitation(policy, limit), visits, atol=1e-12)
    assert t.play(policy, limit) == pytest.approx(visits @ (policy * t.reward).sum(axis=1), abs=1e-12)


@both
def test_values_by_solving_the_linear_equations(site):
    t = task(site)
    policy = t.behaviours()["skilled-0.4"]
    n = len(t.states)
    want = np.linalg.solve(np.eye(n) - GAMMA * transitions(t, policy), (policy * t.reward).sum(axis=1))
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
    _, q_best = t.optimal(GAMMA)
    worst = np.nanargmin(np.where(t.valid, q_best, np.inf), axis=1)
    poor = np.zeros_like(policy)
    poor[np.arange(len(worst)), worst] = 1.0
    assert t.expectile(poor, GAMMA, 0.99999)[0][0] == 0.0


def test_expectile_by_hand():
    x, w = np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]])
    assert expectile(x, w, 0.5) == pytest.approx([0.5])
    assert expectile(x, w, 0.9) == pytest.approx([0.9])
    assert expectile(np.array([[0.0, 1.0, 5.0]]), np.array([[0.75, 0.25, 0.0]]), 0.75) == pytest.approx([0.5])


def test_ties_go_to_the_first_action_and_epsilon_is_uniform():
    t = task()
    policy = t.greedy(np.zeros_like(t.reward), 0.3)
    k = len(t.actions[0])
    assert policy[0, :k] == pytest.approx([0.7 + 0.3 / k] + [0.3 / k] * (k - 1))
    assert (policy[0, k:] == 0).all()


@both
def test_the_mixture_is_what_a_large_log_shows(site):
    t = task(site)
    mixture = t.mixture()
    np.testing.assert_allclose(mixture.sum(axis=1), 1.0)
    taken = np.zeros(len(t.actions[0]))
    for e in rollouts(site):
        for step in e["steps"]:
            if step["observation"] == t.pages[0]:
                taken[t.actions[0].index(step["action"])] += 1
    share = taken / taken.sum()
    error = np.sqrt(share * (1 - share) / taken.sum())
    assert (abs(share - mixture[0, : len(share)]) < 4 * error + 0.005).all()


# -- logs ------------------------------------------------------------------------------------------------------


@both
def test_records_are_read_without_a_rejection(tmp_path, site):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join(map(orjson.dumps, exact.record([task(site, 0), task(site, 1)], 12))))
    records = list(read(log))
    episodes = [e for e in records if isinstance(e, Episode)]
    assert len(episodes) == len(records) == 24
    for e in episodes:
        assert e.quality_flags == ()
        decisions = [s for s in e.steps if not s.is_final_observation]
        assert e.truncated == (len(decisions) < len(e.steps)) == (not e.terminated)
        assert len(decisions) <= 15
        assert e.truncated is False or len(decisions) == 15
        assert e.outcome_reward == decisions[-1].reward
        assert e.success == (e.outcome_reward == 1.0)
        for s in decisions:
            assert s.candidates is not None
            assert [c.action for c in s.candidates].count(s.action or "") == 1
            assert s.behavior_logprob is not None
            assert s.behavior_logprob <= 0
    assert len({e.native_id for e in episodes}) == 24
    assert {e.success for e in episodes} == {True, False}


@both
def test_the_seed_decides_the_log(site):
    logs = [list(exact.record([task(site, 1, 2)], 4, seed=s)) for s in (5, 5, 6)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]
    assert list(exact.record([task(site, 0, 2), task(site, 1, 2)], 4, seed=5))[4:] == logs[0]


@both
def test_sites_and_tasks_differ(site):
    assert len({task(site, n).goal for n in range(8)}) == 8
    draw = SITES[site].Site.draw
    assert draw(0) != draw(1)
    assert draw(0) == draw(0)
