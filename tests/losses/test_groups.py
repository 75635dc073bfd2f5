"""Group-relative advantages of episodes and steps, by hand and against statistics of the standard library."""

import random
import statistics

import pytest
import torch

from offline_lm.losses.groups import gigpo_advantages, group_advantages

NAN = float("nan")


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


def test_by_hand():
    """Group 2 is 1, 0, 0, 1: mean 1/2, sample variance 1/3. Group 0 is 0.3 twice. Group 5 is alone, others empty."""
    rewards = f64(1, 0.3, 0, 0, 0.3, 1, 7)
    groups = torch.tensor([2, 0, 2, 2, 0, 2, 5])
    root = 3**0.5 / 2
    scaled, flat = group_advantages(rewards, groups, divide_by_std=True)
    assert scaled.tolist() == pytest.approx([root, 0, -root, -root, 0, root, 0], abs=1e-15)
    assert scaled[[1, 4, 6]].tolist() == [0, 0, 0]
    assert flat == 2
    plain, flat = group_advantages(rewards, groups, divide_by_std=False)
    assert plain.tolist() == [0.5, 0, -0.5, -0.5, 0, 0.5, 0]
    assert flat == 2


def test_equal_rewards_whose_mean_is_inexact_say_nothing():
    """(0.1 + 0.1 + 0.1) / 3 is not 0.1: divided by its own rounding, an advantage of 1 would come out of nothing."""
    rewards = f64(0.1, 0.1, 0.1)
    assert rewards.sum() / 3 != rewards[0]
    for divide_by_std in (True, False):
        advantages, flat = group_advantages(rewards, torch.zeros(3, dtype=torch.int64), divide_by_std=divide_by_std)
        assert (advantages.tolist(), flat) == ([0, 0, 0], 1)


def test_against_the_standard_library():
    rng = random.Random(0)
    groups = [rng.randrange(6) for _ in range(60)]
    rewards = [rng.choice([0.0, 0.3, 1.0]) for _ in groups]
    found, flat = group_advantages(f64(*rewards), torch.tensor(groups), divide_by_std=True)
    assert flat == 0
    for g in range(6):
        own = [r for r, group in zip(rewards, groups, strict=True) if group == g]
        mean, std = statistics.fmean(own), statistics.stdev(own)
        want = [(r - mean) / std for r in own]
        assert found[torch.tensor(groups) == g].tolist() == pytest.approx(want, abs=1e-12)
    single, _ = group_advantages(f64(*rewards).float(), torch.tensor(groups), divide_by_std=True)
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-6)


def test_an_unknown_reward_stays_in_its_group():
    rewards = f64(NAN, 1, 0, 1, 0)
    advantages, flat = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1]), divide_by_std=False)
    assert advantages[:3].isnan().all()
    assert (advantages[3:].tolist(), flat) == ([0.5, -0.5], 0)


def test_integers_and_nothing_at_all():
    advantages, _ = group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0]), divide_by_std=False)
    assert advantages.tolist() == [0.5, -0.5]
    advantages, flat = group_advantages(f64(), torch.zeros(0, dtype=torch.int64), divide_by_std=True)
    assert (advantages.numel(), flat) == (0, 0)


def test_mistakes():
    with pytest.raises(ValueError, match="one group a return"):
        group_advantages(f64(1, 2), torch.tensor([0]), divide_by_std=True)
    with pytest.raises(ValueError, match="numbered from 0"):
        group_advantages(f64(1, 2), torch.tensor([0, -1]), divide_by_std=True)


def test_returns_that_differ_by_rounding_say_nothing():
    """Two steps, each three turns before success, discounted in another order: a spread of one bit, and no other."""
    for dtype in (torch.float32, torch.float64):
        gamma = torch.tensor(0.9, dtype=dtype)
        returns = torch.stack([gamma * gamma * gamma, gamma * (gamma * gamma) * (1 + torch.finfo(dtype).eps)])
        assert returns[0] != returns[1]
        advantages, flat = group_advantages(returns, torch.tensor([0, 0]), divide_by_std=True)
        assert (advantages.tolist(), flat) == ([0, 0], 1)
        mean = returns.mean()
        assert ((returns - mean) / returns.std()).abs().max() > 0.5, "divided by its own rounding"
    advantages, flat = group_advantages(f64(0.9**2, 0.9**3), torch.tensor([0, 0]), divide_by_std=True)
    assert (advantages.tolist(), flat) == (pytest.approx([0.5**0.5, -(0.5**0.5)]), 0)


def test_gigpo_by_hand():
    """Task 0 has two runs over states 0, 1, 2 and 0, 3, 0; task 1 has one run over state 0, gamma is 1/2.

    The three steps at state 0 of task 0 have returns 1/4, 0 and 0: mean 1/12. The outcomes are 1 and 0: mean 1/2.
    """
    outcomes, tasks = f64(1, 0, 1), torch.tensor([0, 0, 1])
    returns = f64(0.25, 0.5, 1, 0, 0, 0, 1)
    states = torch.tensor([0, 1, 2, 0, 3, 0, 0])
    episode = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    got, flat_tasks, flat_states = gigpo_advantages(
        outcomes, tasks, returns, states, episode, omega=2.0, divide_by_std=False
    )
    want = [0.5 + 2 / 6, 0.5, 0.5, -0.5 - 2 / 12, -0.5, -0.5 - 2 / 12, 0]
    assert got.tolist() == pytest.approx(want, abs=1e-15)
    assert (flat_tasks, flat_states) == (1, 4)  # task 1; states 1, 2, 3 and state 0 of task 1
    scaled, _, _ = gigpo_advantages(outcomes, tasks, returns, states, episode, omega=1.0, divide_by_std=True)
    step = statistics.stdev([0.25, 0, 0])
    assert scaled[0].item() == pytest.approx(0.5 / statistics.stdev([1, 0]) + (0.25 - 1 / 12) / step)
    assert scaled[6].item() == 0
    alone, _, _ = gigpo_advantages(outcomes, tasks, returns, states, episode, omega=0.0, divide_by_std=False)
    assert alone.tolist() == [0.5, 0.5, 0.5, -0.5, -0.5, -0.5, 0]


def test_gigpo_never_compares_steps_across_tasks():
    outcomes, tasks = f64(1, 0), torch.tensor([0, 1])
    returns, states, episode = f64(1, 0), torch.tensor([5, 5]), torch.tensor([0, 1])
    got, _, flat = gigpo_advantages(outcomes, tasks, returns, states, episode, omega=1.0, divide_by_std=True)
    assert (got.tolist(), flat) == ([0, 0], 2)
    bug, _ = group_advantages(returns, states, divide_by_std=True)
    assert bug.tolist() != [0, 0]


def test_gigpo_against_loops():
    rng = random.Random(1)
    tasks = [rng.randrange(3) for _ in range(20)]
    outcomes = [rng.choice([0.0, 0.3, 1.0]) for _ in tasks]
    steps = [(e, rng.randrange(4), rng.choice([0.0, 0.9, 0.81])) for e in range(20) for _ in range(rng.randrange(6))]

    def relative(value, peers):
        return 0.0 if len(set(peers)) < 2 else (value - statistics.fmean(peers)) / statistics.stdev(peers)

    want = []
    for e, state, value in steps:
        runs = [r for r, task in zip(outcomes, tasks, strict=True) if task == tasks[e]]
        peers = [g for i, s, g in steps if (tasks[i], s) == (tasks[e], state)]
        want.append(relative(outcomes[e], runs) + 0.5 * relative(value, peers))
    episode, states, returns = zip(*steps, strict=True)
    got, _, _ = gigpo_advantages(
        f64(*outcomes),
        torch.tensor(tasks),
        f64(*returns),
        torch.tensor(states),
        torch.tensor(episode),
        omega=0.5,
        divide_by_std=True,
    )
    assert got.tolist() == pytest.approx(want, abs=1e-12)


def test_gigpo_mistakes():
    one, zero = f64(1), torch.tensor([0])
    with pytest.raises(ValueError, match="one state and one episode a step"):
        gigpo_advantages(one, zero, f64(1, 2), zero, zero, omega=1.0, divide_by_std=True)
    for states, episode in ((zero - 1, zero), (zero, zero - 1)):
        with pytest.raises(ValueError, match="states and episodes are numbered from 0"):
            gigpo_advantages(one, zero, one, states, episode, omega=1.0, divide_by_std=True)
