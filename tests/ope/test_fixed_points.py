"""Every critic on tables finds the solution of its equation; a wrong loss does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from offline_lm.envs import random_mdp
from offline_lm.ope import fixed_points
from offline_lm.ope.fixed_points import ALGOS, TAU, errors, trained, windows

torch.set_num_threads(1)
TASKS = [random_mdp.task(7, n, states=4, branching=1, ends=0.2) for n in range(3)]


def test_every_critic_is_within_a_ten_thousandth_of_its_fixed_point():
    found = errors(TASKS)
    assert set(found) == set(ALGOS)
    assert max(found.values()) < 1e-4, found


def test_solutions_differ_between_critics_that_estimate_different_things():
    data = windows(TASKS, 0)
    share = np.full((4, 3), 1 / 12)
    found = {name: fixed_points.solution(name, TASKS[1], data.policy[1], (share, share)) for name in ALGOS}
    order = [found[name][0].sum() for name in ("sarsa", "iql_lm", "q_learning")]
    assert order == sorted(order)
    assert order[0] < order[1] - 0.01 < order[2] - 0.02
    assert (found["weighted_iql"][0] != found["iql_lm"][0]).any()
    for base in ("iql", "q_learning"):  # the penalty moves values
        (_, with_it), (_, without) = found[f"cql_lm base={base}"], found["iql_lm" if base == "iql" else base]
        assert with_it is not None
        assert without is not None
        assert abs(with_it - without).max() > 0.01


@pytest.mark.parametrize("wrong", [{"tau": 1 - TAU}, {"gamma": 0.8}], ids=str)
def test_a_wrong_loss_is_found_out(wrong, monkeypatch):
    monkeypatch.setattr(fixed_points, "ALGOS", {"iql_lm": replace(ALGOS["iql_lm"], **wrong)})
    assert errors(TASKS)["iql_lm"] > 0.05


def test_training_that_does_not_settle_is_told():
    """Without a discount a process that goes on, and earns, for ever has no value."""
    (endless,) = [random_mdp.task(7, 0, states=4, branching=1, ends=0.0)]
    data = windows([endless], 0)
    earning = replace(data.batch, reward=torch.ones_like(data.batch.reward))
    with pytest.raises(FloatingPointError, match="still moves by"):
        trained(replace(ALGOS["sarsa"], gamma=1.0), earning, 4, 12, updates=500)
