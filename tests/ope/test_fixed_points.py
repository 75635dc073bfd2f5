"""Every critic on tables finds the solution of its equation; a wrong loss does not."""

from dataclasses import replace

import pytest
import torch

from offline_lm.envs import random_mdp
from offline_lm.ope import fixed_points
from offline_lm.ope.fixed_points import ALGOS, GAMMA, errors, trained, windows

torch.set_num_threads(1)
TASKS = [random_mdp.task(7, n, states=4, branching=1, ends=0.2) for n in range(3)]


def test_every_critic_is_within_a_ten_thousandth_of_its_fixed_point():
    found = errors(TASKS)
    assert set(found) == set(ALGOS)
    assert max(found.values()) < 1e-4, found


def test_solutions_differ_between_critics_that_estimate_different_things():
    data = windows(TASKS, 0)
    shares = (torch.ones(4, 3).numpy() / 12,) * 2
    found = {name: fixed_points.solution(name, TASKS[0], data.policy[0], shares) for name in ALGOS}
    order = [found[name][0].sum() for name in ("sarsa", "iql_lm", "q_learning")]
    assert order == sorted(order)
    assert order[0] < order[1] - 0.01 < order[2] - 0.02
    assert (found["weighted_iql"][0] != found["iql_lm"][0]).any()
    for base in ("iql", "q_learning"):  # the penalty moves values
        assert abs(found[f"cql_lm base={base}"][1] - found["iql_lm" if base == "iql" else base][1]).max() > 0.01


def test_past_a_terminal_nothing_is_bootstrapped():
    """Trap 1 put back: with every step continuing, the same losses miss the solution."""
    data = windows(TASKS, 0)
    torn = replace(data.batch, continues=torch.ones_like(data.batch.continues))
    for name in ("iql_lm", "q_learning"):
        q_right, q_wrong = (trained(ALGOS[name], batch, 12, 36)[1] for batch in (data.batch, torn))
        assert abs(q_right - q_wrong).max() > 0.01


def test_training_that_does_not_settle_is_told():
    growing = replace(ALGOS["sarsa"], gamma=1.0)
    endless = [random_mdp.task(7, 0, states=4, branching=1, ends=0.0)]
    data = windows([replace(endless[0], reward=abs(endless[0].reward) + 1)], 0) if GAMMA < 1 else None
    assert data is not None
    with pytest.raises(FloatingPointError, match="still moves by"):
        trained(growing, data.batch, 4, 12)
