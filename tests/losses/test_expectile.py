"""Expectile regression against numbers worked by hand and its defining equation."""

import pytest
import torch
from torch.testing import assert_close

from offline_lm.losses.expectile import expectile_loss, expectile_weight, iql_value_loss
from offline_lm.losses.td import ensemble_min

NAN = float("nan")


def test_by_hand():
    diff = torch.tensor([2.0, -2.0, 0.0, 1.0], dtype=torch.float64)
    want = torch.tensor([3.6, 0.4, 0.0, 0.9], dtype=torch.float64)
    assert_close(expectile_loss(diff, 0.9), want)
    assert not torch.allclose(expectile_loss(-diff, 0.9), want), "value minus target: the expectile 1 - tau"
    assert_close(expectile_loss(diff, 0.5), 0.5 * diff.square())


def test_its_minimum_is_the_expectile():
    # Targets 0 and 1, equally often: .9 * (1 - v) = .1 * v, so v = .9.
    values = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0.0, 1.0], dtype=torch.float64)
    optimiser = torch.optim.SGD([values], lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        iql_value_loss(values.expand(2), targets, 0.9).backward()
        optimiser.step()
    assert values.item() == pytest.approx(0.9, abs=1e-9)


def test_iql_value_loss_by_hand_with_twins():
    q = torch.tensor([[1.0, 3.0, NAN], [2.0, 0.0, 0.0]], requires_grad=True)
    values = torch.tensor([0.0, 2.0, 0.0], requires_grad=True)
    mask = torch.tensor([True, True, False])
    loss = iql_value_loss(values, ensemble_min(q), 0.75, mask)
    loss.backward()
    assert loss.item() == 0.875  # min is 1 and 0: (.75 * 1 + .25 * 4) / 2
    assert values.grad is not None
    assert values.grad.tolist() == [-0.75, 0.5, 0.0]
    assert q.grad is None
    # Trap 9: with the maximum the second step would pull the value up.
    assert iql_value_loss(values, q.amax(dim=0), 0.75, mask).item() != 0.875


def test_gradcheck_and_float64():
    generator = torch.Generator().manual_seed(0)
    values, targets = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: iql_value_loss(v, targets, 0.8), values)
    single = iql_value_loss(values.float(), targets.float(), 0.8).double()
    assert_close(single, iql_value_loss(values, targets, 0.8), rtol=1e-6, atol=0)


def test_a_mask_that_holds_nowhere():
    values = torch.ones(2, requires_grad=True)
    loss = iql_value_loss(values, torch.zeros(2), 0.9, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tau", [0.0, 1.0, 70.0])
def test_tau_out_of_range(tau):
    with pytest.raises(ValueError, match="an expectile lies between 0 and 1"):
        expectile_loss(torch.ones(1), tau)


def test_weights_by_hand():
    assert expectile_weight(torch.tensor([-1.0, 0.0, 1.0]), 0.75).tolist() == [0.25, 0.75, 0.75]
    values, q = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    loss = iql_value_loss(values, q, 0.75, None, torch.tensor([3.0, 1.0]))
    assert loss.item() == (3 * 0.75 * 1 + 0.25 * 4) / 4
