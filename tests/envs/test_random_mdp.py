"""Random processes against linear algebra, policy iteration and rollouts."""

import math

import numpy as np
import pytest

from offline_lm.envs import exact, random_mdp

GAMMA = 0.9
DRAWS = [{"number": n} for n in range(4)] + [{"number": 9, "branching": 1, "ends": 0.0}, {"number": 5, "states": 30}]
drawn = pytest.mark.parametrize("given", DRAWS, ids=str)


def tables(mdp):
    """P [S, A, S] and R [S, A], row by row."""
    p, r = np.zeros((*mdp.next.shape, len(mdp.states))), np.zeros(mdp.next.shape)
    o = mdp.outcomes
    for s, a, to, chance, reward in zip(o.state, o.action, o.next, o.chance, o.reward, strict=True):
        r[s, a] += chance * reward
        if to >= 0:
            p[s, a, to] += chance
    return p, r


def value(p, r, policy):
    """V of a policy by solving Bellman's linear equations."""
    flow = np.einsum("sa,sat->st", policy, p)
    return np.linalg.solve(np.eye(len(flow)) - GAMMA * flow, (policy * r).sum(axis=1))


@drawn
def test_values_by_linear_algebra(given):
    mdp = random_mdp.task(0, **given)
    p, r = tables(mdp)
    policy = mdp.behaviours()["behaviour"]
    want = value(p, r, policy)
    v, q = mdp.evaluate(policy, GAMMA)
    np.testing.assert_allclose(v, want, atol=1e-10)
    np.testing.assert_allclose(q, r + GAMMA * p @ want, atol=1e-10)
    np.testing.assert_allclose(mdp.expectile(policy, GAMMA, 0.5)[0], want, atol=1e-10)


@drawn
def test_the_optimum_by_policy_iteration(given):
    mdp = random_mdp.task(0, **given)
    p, r = tables(mdp)
    chosen = np.eye(mdp.next.shape[1])
    policy = chosen[np.zeros(len(r), dtype=int)]
    for _ in range(50):
        policy = chosen[(r + GAMMA * p @ value(p, r, policy)).argmax(axis=1)]
    want = value(p, r, policy)
    v, q = mdp.optimal(GAMMA)
    np.testing.assert_allclose(v, want, atol=1e-10)
    np.testing.assert_array_equal(mdp.greedy(q), policy)


@drawn
def test_the_expectile_fixed_point_has_no_gradient(given):
    """IQL's two losses at once: Q is the mean of its targets, and V's weighted errors over the behaviour cancel."""
    mdp = random_mdp.task(0, **given)
    p, r = tables(mdp)
    policy = mdp.behaviours()["behaviour"]
    v, q = mdp.expectile(policy, GAMMA, 0.8)
    np.testing.assert_allclose(q, r + GAMMA * p @ v, atol=1e-10)
    error = q - v[:, None]
    weight = np.where(error < 0, 0.2, 0.8)
    np.testing.assert_allclose((policy * weight * error).sum(axis=1), 0, atol=1e-10)
    assert (v > mdp.evaluate(policy, GAMMA)[0]).all()
    assert (v < mdp.optimal(GAMMA)[0]).all()


def test_draws_are_as_asked():
    mdp = random_mdp.task(3, 7, states=9, actions=4, branching=3, ends=0.3)
    o = mdp.outcomes
    assert mdp.next.shape == (9, 4)
    assert len(o.next) == 9 * 4 * 3
    np.testing.assert_allclose(mdp.start, 1 / 9)
    assert 0.1 < np.mean(o.next == -1) < 0.5
    chances = o.chance.reshape(36, 3)
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    assert (chances > 0).all()
    for successors in o.next.reshape(36, 3):
        going = successors[successors >= 0]
        assert len(set(going)) == len(going)
    assert (np.ptp(o.reward.reshape(36, 3), axis=1) == 0).all()  # whatever happens, the end included
    policy = mdp.behaviours()["behaviour"]
    least = [random_mdp.task(3, n, actions=4).behaviours()["behaviour"].min() for n in range(20)]
    assert 0.01 * (1 - 1e-12) <= min(least) < 0.012
    np.testing.assert_allclose(policy.sum(axis=1), 1)
    np.testing.assert_allclose(mdp.mixture(), policy)
    sure = random_mdp.task(0, 0, branching=1, ends=0.0)
    assert (sure.next >= 0).all()


def test_pages_name_the_state_and_seeds_decide():
    one, same, other = random_mdp.task(0, 1), random_mdp.task(0, 1), random_mdp.task(0, 2)
    assert len(set(one.pages)) == 12
    assert len(set(one.actions[0])) == 3
    assert all(actions == one.actions[0] for actions in one.actions)
    assert one.pages == same.pages
    assert one.reward.tolist() == same.reward.tolist()
    assert one.pages != other.pages
    assert (one.reward != other.reward).all()


def test_logs_earn_what_the_tables_say():
    mdp = random_mdp.task(0, 0)
    policy = mdp.behaviours()["behaviour"]
    episodes = list(exact.record([mdp], 600))
    returns = [sum(step["reward"] for step in e["steps"]) for e in episodes]
    error = np.std(returns) / math.sqrt(len(returns))
    assert abs(np.mean(returns) - mdp.play(policy)) < 3 * error
    assert {e["success"] for e in episodes} == {None}
    assert {e["terminated"] for e in episodes} == {True, False}
    assert all(len(e["steps"]) == 40 for e in episodes if e["truncated"])
