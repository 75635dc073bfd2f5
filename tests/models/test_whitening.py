"""The floor of whitening goes by what foretells returns: quiet directions that carry the value, or that are noise."""

import pytest
import torch

from offline_lm.models.whitening import FLOORS, best_floor

G = torch.Generator().manual_seed(0)
LOUD = torch.randn(2000, 4, generator=G)
QUIET = torch.randn(2000, 12, generator=G)
TASK = torch.arange(2000) // 20


def features(quiet=QUIET):
    return torch.cat([LOUD, 0.01 * quiet], dim=1)


def test_quiet_directions_that_carry_the_value_want_a_low_floor():
    floor, found = best_floor(features(), QUIET[:, 0] + 0.1 * LOUD[:, 0], TASK)
    assert floor == min(FLOORS)
    assert found[0.001] > found[0.01] > found[0.1]


def test_quiet_directions_that_are_noise_want_a_high_floor():
    noise = 0.03 * torch.randn(80, 100, generator=G)
    floor, found = best_floor(torch.cat([LOUD[:80], noise], dim=1), LOUD[:80, 0], TASK[: 80 * 20 : 20] // 4)
    assert floor == max(FLOORS)
    assert found[0.1] > found[0.01] > found[0.001]


@pytest.mark.parametrize("returns", [torch.zeros(2000), torch.ones(2000)])
def test_returns_that_are_all_equal_leave_the_highest_floor(returns):
    assert best_floor(features(), returns, TASK)[0] == max(FLOORS)


def test_a_single_group_leaves_the_highest_floor():
    assert best_floor(features(), QUIET[:, 0], torch.zeros(2000, dtype=torch.int64)) == (max(FLOORS), {})
