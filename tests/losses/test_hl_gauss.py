"""HL-Gauss targets, their read-out, and the losses on them."""

import math

import pytest
import torch
from torch.testing import assert_close

from offline_lm.losses.hl_gauss import (
    hl_gauss_expectile_loss,
    hl_gauss_loss,
    hl_gauss_mean,
    hl_gauss_targets,
    make_support,
    out_of_range,
)

NAN = float("nan")


@pytest.fixture
def support():
    return make_support(0.0, 1.0, 26, dtype=torch.float64)  # 20 bins inside, 3 of margin on either side


def test_bins_by_hand(support):
    assert support.edges.numel() == 27
    assert support.edges[0].item() == pytest.approx(-0.15)
    assert support.edges[-1].item() == pytest.approx(1.15)
    assert support.sigma == pytest.approx(0.0375)  # .75 of a width of .05
    assert support.centers[3].item() == pytest.approx(0.025)


def test_target_by_hand(support):
    # y on an edge: each neighbour holds the mass within a width, erf(1 / (.75 sqrt 2)) / 2.
    target = hl_gauss_targets(torch.tensor([0.5], dtype=torch.float64), support)[0]
    assert target.sum().item() == pytest.approx(1.0)
    assert target[12].item() == pytest.approx(math.erf(1 / (0.75 * math.sqrt(2))) / 2)
    assert target[12].item() == pytest.approx(target[13].item())


def test_reading_a_target_gives_the_target_back_even_at_the_ends(support):
    y = torch.linspace(0, 1, 101, dtype=torch.float64)
    width = 0.05

    def error(support):
        return (hl_gauss_targets(y, support) @ support.centers - y).abs().max().item()

    assert error(support) < 2e-4 * width
    # Without the margin half of the Gaussian is cut off at 0 and 1, where most returns lie.
    edges = torch.linspace(0, 1, 21, dtype=torch.float64)
    bare = type(support)(edges=edges, low=0.0, high=1.0, sigma=support.sigma)
    assert error(bare) > 0.5 * support.sigma
    assert_close(hl_gauss_mean(hl_gauss_targets(y, support).log(), support), y, atol=1e-5, rtol=0)


def test_targets_out_of_range_are_clamped_and_counted(support):
    y = torch.tensor([-3.0, 0.0, 0.4, 1.0, 1.2, NAN], dtype=torch.float64)
    assert out_of_range(y, support).item() == 2
    mask = torch.tensor([True, True, True, True, False, False])
    assert out_of_range(y, support, mask).item() == 1
    targets = hl_gauss_targets(y[:5], support)
    assert_close(targets[0], targets[1])
    assert_close(targets[4], targets[3])


def test_loss_by_hand(support):
    y = torch.tensor([0.3, 0.9], dtype=torch.float64)
    uniform = torch.zeros(2, 2, 26, dtype=torch.float64)
    assert hl_gauss_loss(uniform, y, support).item() == pytest.approx(2 * math.log(26))  # summed over two members
    assert hl_gauss_loss(uniform[0], y, support).item() == pytest.approx(math.log(26))


def test_gradient_is_the_difference_of_the_distributions(support):
    y = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(1, 26, dtype=torch.float64, requires_grad=True)
    hl_gauss_loss(logits, y, support).backward()
    assert logits.grad is not None
    assert_close(logits.grad[0], 1 / 26 - hl_gauss_targets(y.detach(), support)[0])
    assert y.grad is None


def test_gradcheck_and_float64(support):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 26, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: hl_gauss_loss(x, y, support), logits)
    # The weights are held fixed, and no step crosses the mean: 0.1 and 0.8 lie far from it.
    assert torch.autograd.gradcheck(lambda x: hl_gauss_expectile_loss(x, y, support, 0.8), logits)
    single = hl_gauss_loss(logits.float(), y.float(), make_support(0.0, 1.0, 26))
    assert_close(single.double(), hl_gauss_loss(logits, y, support), rtol=1e-5, atol=0)


def test_what_is_masked_may_be_unknown_and_all_may_be_masked(support):
    y = torch.tensor([0.3, NAN], dtype=torch.float64)
    logits = torch.zeros(2, 26, dtype=torch.float64, requires_grad=True)
    losses = (hl_gauss_loss, lambda x, y, s, m: hl_gauss_expectile_loss(x, y, s, 0.5, m))
    for loss_of, want in zip(losses, (math.log(26), 0.5 * math.log(26)), strict=True):
        loss = loss_of(logits, y, support, torch.tensor([True, False]))
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(want)
        assert grad.isfinite().all()
        assert grad[1].abs().max().item() == 0.0
        assert loss_of(logits, y, support, torch.zeros(2, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.9])
def test_the_expectile_surrogate_settles_at_the_expectile(support, tau):
    q = torch.tensor([0.0, 0.1, 0.6, 1.0], dtype=torch.float64)
    low, high = 0.0, 1.0  # the expectile by bisection of sum w (q - v) = 0
    for _ in range(60):
        v = (low + high) / 2
        pull = ((q - v) * (tau - (q < v).double()).abs()).sum()
        low, high = (v, high) if pull > 0 else (low, v)
    logits = torch.zeros(1, 26, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(600):
        optimiser.zero_grad()
        hl_gauss_expectile_loss(logits.expand(4, 26), q, support, tau).backward()
        optimiser.step()
    assert hl_gauss_mean(logits, support).item() == pytest.approx(v, abs=1e-3)
    if tau == 0.9:
        assert abs(q.mean().item() - v) > 0.2, "the mean is another number"


def test_shapes_and_ranges_that_do_not_fit_are_refused(support):
    with pytest.raises(ValueError, match="26 bins"):
        hl_gauss_loss(torch.zeros(2, 25), torch.zeros(2), support)
    with pytest.raises(ValueError, match="logits of shape"):
        hl_gauss_loss(torch.zeros(1, 26), torch.zeros(2), support)
    with pytest.raises(ValueError, match="low must be below high"):
        make_support(1.0, 1.0, 26)
    with pytest.raises(ValueError, match="give at least 8"):
        make_support(0.0, 1.0, 7)


def test_a_margin_is_four_sigma_rounded_up_and_two_bins_between_are_enough():
    support = make_support(1.0, 3.0, 8, sigma_to_width=0.6)  # 2.4 bins of margin: 3 on either side
    assert support.edges.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert support.sigma == pytest.approx(0.6)


def test_the_mass_adds_up_to_one_at_the_ends_too(support):
    mass = hl_gauss_targets(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), support).sum(dim=1)
    assert mass.tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_types_follow_the_values_and_members_are_read_one_by_one(support):
    assert hl_gauss_targets(torch.tensor([0.5]), support).dtype == torch.float32
    logits = torch.zeros(2, 3, 26)
    logits[1, 2, 20] = 100.0
    means = hl_gauss_mean(logits, support)
    assert means.dtype == torch.float32
    assert means[0].tolist() == pytest.approx([0.5] * 3)
    assert means[1].tolist() == pytest.approx([0.5, 0.5, support.centers[20].item()])


def test_weights_by_hand(support):
    """Uniform logits cost log 26 whatever the target; certain and wrong ones cost 100."""
    y, logits = torch.tensor([0.5, 0.0], dtype=torch.float64), torch.zeros(2, 26, dtype=torch.float64)
    logits[1, 25] = 100.0
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert hl_gauss_loss(logits, y, support, None, weight).item() == pytest.approx((3 * math.log(26) + 100) / 4)
    # V is 1/2 at the first step, up to rounding, and 1.125 at the second: q lies below it, which weighs 1 - tau
    above = hl_gauss_expectile_loss(logits, y + torch.tensor([0.1, 0.0]), support, 0.75, None, weight)
    assert above.item() == pytest.approx((3 * 0.75 * math.log(26) + 0.25 * 100) / 4)
