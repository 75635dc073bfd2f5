"""Group-relative advantages, by hand and against statistics of the standard library."""

import random
import statistics

import pytest
import torch

from offline_lm.losses.groups import group_advantages

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
    with pytest.raises(ValueError, match="one group an episode"):
        group_advantages(f64(1, 2), torch.tensor([0]), divide_by_std=True)
    with pytest.raises(ValueError, match="numbered from 0"):
        group_advantages(f64(1, 2), torch.tensor([0, -1]), divide_by_std=True)
