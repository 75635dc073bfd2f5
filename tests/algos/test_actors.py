"""Advantages of the algorithms that train an actor, worked out by hand on three short episodes."""

import math
from dataclasses import replace

import pytest
import torch

from offline_lm.algos.archer_ppo import ArcherPPO
from offline_lm.algos.awr import AWR
from offline_lm.algos.bc import BC
from offline_lm.algos.best_of_n import BestOfN
from offline_lm.algos.filtered_bc import FilteredBC
from offline_lm.algos.gigpo import GiGPO
from offline_lm.algos.grpo import GRPO
from offline_lm.algos.ppo import PPO, turn_gae
from offline_lm.algos.reinforce import Reinforce
from offline_lm.types import Logged, Responses

NAN = math.nan


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


# Task 0: two turns to success and two to failure; task 1: one turn that was cut off, with its final observation.
LOGGED = Logged(
    offsets=torch.tensor([0, 2, 4, 6]),
    reward=f64(0, 1, 0, 0, 0, 0),
    continues=f64(1, 0, 1, 0, 1, 1),
    returns=f64(0.5, 1, 0, 0, NAN, NAN),
    acted=torch.tensor([True, True, True, True, True, False]),
    bootstrap_mask=torch.tensor([True, True, True, True, True, False]),
    v=f64(0.2, 0.6, 0.2, 0.4, 0.1, 0.3),
    q=f64(0.3, 0.9, 0.1, 0.0, 0.2, NAN),
    outcome=f64(1, 0, NAN),
    task=torch.tensor([0, 0, 1]),
    page=torch.tensor([0, 1, 0, 2, 3, 4]),
    response_q=f64(0.3, 0.5, 0.9, 0.1, 0.0, 0.2, 0.05),
    response_of=torch.tensor([0, 0, 1, 2, 3, 4, 4]),
)


def near(x, *wanted):
    torch.testing.assert_close(x, f64(*wanted), atol=1e-12, rtol=0, equal_nan=True)


def test_bc_clones_everything_and_filtered_bc_the_best_of_each_task():
    near(BC(0.5, "sum").advantages(LOGGED)[0], 1, 1, 1, 1, 1, 1)
    kept, counted = FilteredBC(0.5, 0.5, "sum").advantages(LOGGED)
    near(kept, 1, 1, NAN, NAN, NAN, NAN)  # a return that is not known is not among the best
    assert counted["episodes_kept"] == pytest.approx(1 / 2)


def test_the_best_run_of_a_task_that_always_failed_is_not_cloned():
    returns = f64(1.0, 1, 0.9, 0.9, 0.1, 0.0)
    kept, _ = FilteredBC(0.5, 1.0, "sum").advantages(replace(LOGGED, returns=returns, outcome=f64(1, 1, 0)))
    near(kept, 1, 1, 1, 1, NAN, NAN)  # mean 2/3: task 1 has one run, its best, below it
    equal = replace(LOGGED, returns=f64(0.1, 0.1, 0.1, 0.1, 0.1, 0.1), outcome=f64(0.1, 0.1, 0.1))
    near(FilteredBC(0.5, 0.1, "sum").advantages(equal)[0], 1, 1, 1, 1, 1, 1)  # logs of successes alone lose nothing


def test_awr_weighs_by_advantage_in_standard_deviations():
    weights, counted = AWR(0.5, None, beta=0.5, w_max=3.0, aggregate="sequence").advantages(LOGGED)
    a = [0.1, 0.3, -0.1, -0.4, 0.1]
    mean = sum(a) / 5
    spread = math.sqrt(sum((x - mean) ** 2 for x in a) / 5)
    near(weights[:5], *(min(math.exp((x - mean) / spread / 0.5), 3.0) for x in a))
    assert counted["weights_clipped"] == pytest.approx(1 / 5)


def test_reinforce_with_each_baseline():
    near(Reinforce(0.5, "none", None, "sum").advantages(LOGGED)[0], 0.5, 1, 0, 0, NAN, NAN)
    mean = 1.5 / 4
    found = Reinforce(0.5, "mean", None, "sum").advantages(LOGGED)[0]
    near(found, 0.5 - mean, 1 - mean, -mean, -mean, NAN, NAN)
    near(Reinforce(0.5, "v", None, "sum").advantages(LOGGED)[0], 0.3, 0.4, -0.2, -0.4, NAN, NAN)
    assert [Reinforce(0.5, b, None, "sum").needs for b in ("none", "mean", "v")] == ["nothing", "nothing", "v"]
    with pytest.raises(ValueError, match="baseline=g"):
        Reinforce(0.5, "g", None, "sum")  # pyright: ignore


def test_words_that_an_algorithm_does_not_know_are_told():
    with pytest.raises(ValueError, match="aggregate=mean: one of sequence, token, constant, sum is wanted"):
        BC(0.5, "mean")  # pyright: ignore
    with pytest.raises(ValueError, match="variant=x"):
        GRPO(0.5, "x", 0.2, 0.2, 0.0)  # pyright: ignore


def test_turns_have_gae_and_a_cut_off_episode_takes_the_word_of_v():
    # residuals: 0.5*0.6-0.2 = 0.1, 1-0.6 = 0.4; 0.5*0.4-0.2 = 0, -0.4; 0.5*0.3-0.1 = 0.05
    near(turn_gae(LOGGED, 0.5, 0.0), 0.1, 0.4, 0.0, -0.4, 0.05, NAN)
    near(turn_gae(LOGGED, 0.5, 0.8), 0.1 + 0.4 * 0.4, 0.4, -0.4 * 0.4, -0.4, 0.05, NAN)
    unlogged = replace(LOGGED, bootstrap_mask=torch.tensor([True, False, True, True, True, False]))
    near(turn_gae(unlogged, 0.5, 0.8)[:2], 0.1, NAN)  # trap 3: what came after is unknown, and is not 0


def test_ppo_standardises_and_archer_ppo_is_its_one_step_form():
    raw = PPO(0.5, None, 0.0, 0.2, 0.2, 0.0, normalize=False, aggregate="sequence").advantages(LOGGED)[0]
    near(raw, 0.1, 0.4, 0.0, -0.4, 0.05, NAN)
    archer = ArcherPPO(0.5, None, 0.0, 0.2, 0.2, 0.0, normalize=True, aggregate="sequence").advantages(LOGGED)[0]
    known = raw[:5]
    torch.testing.assert_close(archer[:5], (known - known.mean()) / known.std(correction=0))


@pytest.mark.parametrize(("top", "kept"), [(0.1, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_the_share_of_a_task_that_is_cloned_is_no_greater_than_asked_for(top, kept):
    one = replace(
        LOGGED, offsets=torch.arange(5), returns=f64(0.6, 0.9, 0.7, 0.8), outcome=f64(1, 1, 1, 1),
        task=torch.zeros(4, dtype=torch.int64),
    )  # fmt: skip
    found, _ = FilteredBC(0.5, top, "sum").advantages(one)
    assert (found == 1).sum() == kept
    assert found[1] == 1


@pytest.mark.parametrize(("variant", "scale"), [("grpo", math.sqrt(0.5)), ("dr_grpo", 1.0)])
def test_grpo_compares_the_runs_of_a_task_and_counts_the_silent(variant, scale):
    found, counted = GRPO(0.5, variant, 0.2, 0.2, 0.0).advantages(LOGGED)
    near(found, 0.5 / scale, 0.5 / scale, -0.5 / scale, -0.5 / scale, NAN, NAN)
    assert counted == {"silent_groups": 0.0}
    equal = replace(LOGGED, outcome=f64(1, 1, 1))
    found, counted = GRPO(0.5, variant, 0.2, 0.2, 0.0).advantages(equal)
    near(found, 0, 0, 0, 0, 0, 0)
    assert counted == {"silent_groups": 1.0}


def test_gigpo_adds_a_comparison_of_steps_from_the_same_page():
    found, counted = GiGPO(0.5, "dr_grpo", 0.2, 0.2, 0.0, omega=2.0).advantages(LOGGED)
    # page 0 was seen with returns 0.5 and 0; pages 1 and 2 once each
    near(found, 0.5 + 2 * 0.25, 0.5, -0.5 - 2 * 0.25, -0.5, NAN, NAN)
    assert counted["silent_pages"] == pytest.approx(2 / 3)


def test_best_of_n_clones_the_best_known_response_where_it_beats_v():
    chosen, counted = BestOfN(0.5, None, 0.05, "sum").advantages(LOGGED)
    near(chosen, NAN, 1, 1, NAN, NAN, 1, NAN)
    assert counted["states_cloned"] == pytest.approx(3 / 5)


def test_losses_reach_the_log_probabilities_with_the_weights_they_were_given():
    batch = Responses(
        logprobs=f64(-1, -2, -3).requires_grad_(), owner=torch.tensor([0, 0, 1]), weight=f64(0.25, 0.25, 0.5),
        advantages=f64(2, -1), state=torch.tensor([0, 1]), old=f64(-1, -2, -3), reference=f64(-1, -2, -2.5),
    )  # fmt: skip
    (loss,) = BC(0.5, "sum").loss(batch).values()
    assert loss.item() == pytest.approx(-(0.25 * 2 * (-1 - 2) + 0.5 * -1 * -3))
    (gradient,) = torch.autograd.grad(loss, batch.logprobs)
    near(gradient, -0.5, -0.5, 0.5)
    parts = PPO(0.5, None, 0.0, 0.2, 0.2, 0.1, normalize=False, aggregate="sequence").loss(batch)
    assert parts["actor"].item() == pytest.approx(-(0.5 * 2 - 0.5))  # at ratio 1
    assert parts["kl"].item() == pytest.approx(0.1 * 0.5 * (math.exp(0.5) - 0.5 - 1))
    for variant in ("grpo", "gspo"):
        (loss,) = GRPO(0.5, variant, 0.2, 0.2, 0.0).loss(batch).values()
        assert loss.item() == pytest.approx(-0.5)
