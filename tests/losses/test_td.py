"""Bellman targets, masked squared losses and ensembles."""

import pytest
import torch
from torch.testing import assert_close

from offline_lm.losses.masks import masked_difference, masked_mean
from offline_lm.losses.td import ensemble_min, mc_loss, squared_loss, td_error, td_target

NAN = float("nan")


def test_target_by_hand():
    rewards, continues = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 0.0])
    after = torch.tensor([2.0, 4.0, 100.0], requires_grad=True)
    target = td_target(rewards, continues, after, gamma=0.5)
    assert target.tolist() == [2.0, 2.0, 3.0]
    assert not target.requires_grad
    assert td_error(torch.tensor([1.0, 5.0, 3.0]), target).tolist() == [1.0, -3.0, 0.0]


def test_trap_1_nothing_is_bootstrapped_past_a_terminal():
    rewards, after = torch.tensor([1.0]), torch.tensor([0.75])
    assert td_target(rewards, torch.zeros(1), after, gamma=1.0).tolist() == [1.0]
    bug = rewards + 1.0 * after
    assert bug.tolist() != [1.0]
    # No state follows, so its value may be unknown: multiplying by 0 does not hide that.
    assert td_target(rewards, torch.zeros(1), torch.tensor([NAN]), gamma=1.0).tolist() == [1.0]


def test_squared_losses_by_hand():
    prediction, target = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 1.0, 0.0])
    mask = torch.tensor([True, True, False])
    assert squared_loss(prediction, target, mask).item() == 2.5  # (4 + 1) / 2
    assert mc_loss(prediction, target, mask).item() == 1.25
    # An ensemble: summed over members.
    assert squared_loss(torch.stack([prediction, target]), target, mask).item() == 2.5


def test_gradient_flows_into_the_prediction_only_and_is_the_same_for_any_ensemble():
    target = torch.tensor([3.0, 1.0], requires_grad=True)
    for k in (1, 2, 5):
        prediction = torch.tensor([1.0, 2.0]).repeat(k, 1).requires_grad_()
        squared_loss(prediction, target).backward()
        assert prediction.grad is not None
        assert prediction.grad.tolist() == [[-2.0, 1.0]] * k
    assert target.grad is None


def test_gradcheck():
    prediction = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    target, mask = torch.randn(4, dtype=torch.float64), torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda p: squared_loss(p, target, mask), prediction)
    assert torch.autograd.gradcheck(lambda p: mc_loss(p, target, mask), prediction)


def test_float64_agrees_with_float32():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    assert_close(
        squared_loss(prediction.float(), target.float()).double(),
        squared_loss(prediction, target),
        rtol=1e-6,
        atol=0,
    )


def test_what_is_masked_may_be_unknown():
    mask = torch.tensor([True, False])
    target = torch.tensor([1.0, NAN])

    def holds(loss_of):
        prediction = torch.zeros(2, requires_grad=True)
        loss = loss_of(prediction)
        loss.backward()
        assert prediction.grad is not None
        return loss.item() == 1.0 and prediction.grad.tolist() == [-2.0, 0.0]

    assert holds(lambda p: squared_loss(p, target, mask))
    assert not holds(lambda p: ((target - p).square() * mask).sum() / mask.sum()), "0 * NaN in the loss"
    assert not holds(lambda p: masked_mean((target - p).square(), mask)), "0 * NaN in the gradient"


def test_a_mask_that_holds_nowhere_gives_zero_and_zero_gradients():
    prediction = torch.ones(3, requires_grad=True)
    loss = squared_loss(prediction, torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [0.0] * 3


def test_masked_mean_counts_steps_not_rows():
    x, mask = torch.tensor([1.0, 2.0, 60.0]), torch.tensor([True, True, False])
    assert masked_mean(x, mask).item() == 1.5
    assert masked_mean(x).item() == 21.0
    assert masked_mean(torch.tensor([1.0, 2.0, NAN]), mask).item() == 1.5
    assert (x * mask).mean().item() != 1.5
    with pytest.raises(ValueError, match="mask of shape"):
        masked_mean(x, mask[:1])


def test_a_column_of_values_is_refused_rather_than_broadcast():
    values, target = torch.zeros(3, 1), torch.tensor([1.0, 2.0, 3.0])
    assert (target - values).shape == (3, 3), "what torch would do"
    with pytest.raises(ValueError, match="predictions of shape"):
        squared_loss(values, target)


def test_trap_9_the_minimum_over_twins():
    q = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0]])
    want = [1.0, 4.0, 2.0]
    assert ensemble_min(q).tolist() == want
    assert q.amax(dim=0).tolist() != want
    assert q.mean(dim=0).tolist() != want
    with pytest.raises(ValueError, match=r"\[k, n\]"):
        ensemble_min(q[0])


def test_weights_by_hand():
    prediction, target = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 1.0, 0.0])
    mask = torch.tensor([True, True, False])
    weight = torch.tensor([0.5, 0.25, NAN], requires_grad=True)
    prediction.requires_grad_()
    loss = squared_loss(prediction, target, mask, weight)  # (.5 * 4 + .25 * 1) / .75
    assert loss.item() == 3.0
    loss.backward()
    assert weight.grad is None, "a weight is no parameter"
    assert prediction.grad is not None
    assert prediction.grad.tolist() == pytest.approx([-4 * 0.5 / 0.75, 2 * 0.25 / 0.75, 0.0])


def test_a_masked_difference_is_zero():
    target, prediction = torch.tensor([NAN, 3.0]), torch.tensor([[1.0, 1.0], [2.0, 5.0]])
    assert masked_difference(target, prediction, torch.tensor([False, True])).tolist() == [[0.0, 2.0], [0.0, -2.0]]
