import copy
from typing import Any

import pytest
import torch
from torch import nn

from offline_lm.losses.hl_gauss import make_support
from offline_lm.models.heads import Head, Heads, polyak, target_of

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def shaken(module):
    """Every parameter random, so that no bias is 0 and no norm the identity."""
    g = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g)
    return module


def test_an_ensemble_is_k_separate_networks():
    head = shaken(Head(5, 3, 4))
    got = head(X)
    assert got.shape == (3, 7)
    for i in range(3):
        layers = []
        for w, b in zip(head.weights, head.biases, strict=True):
            linear = nn.Linear(w.shape[1], w.shape[2])
            linear.weight.data, linear.bias.data = w.data[i].T, b.data[i, 0]
            layers += [linear, nn.GELU()]
        network = nn.Sequential(head.norm, *layers[:-1])
        torch.testing.assert_close(got[i], network(X)[:, 0])


def test_members_start_apart_and_values_near_zero():
    torch.manual_seed(0)
    heads = Heads(5, ensemble=2)
    q = heads.q_values(X)
    assert (q[0] - q[1]).abs().max() > 1e-3
    assert max(q.abs().max(), heads.values(X).abs().max()) < 0.5


def test_a_categorical_head_is_read_as_the_mean_of_its_bins():
    head = Head(5, 2, 4, make_support(0.0, 1.0, 11))
    logits = head(X)
    assert logits.shape == (2, 7, 11)
    assert head.support is not None
    certain = torch.full((2, 7, 11), -1e4)
    certain[0, :, 3], certain[1, :, 7] = 0.0, 0.0
    width = 1.0 / 5  # 11 bins: 3 of margin on either side
    torch.testing.assert_close(head.read(certain)[:, 0], torch.tensor([0.5 * width, 4.5 * width]))
    uniform = head.read(torch.zeros(2, 7, 11))
    torch.testing.assert_close(uniform, torch.full((2, 7), 0.5))


@pytest.mark.parametrize("loss", ["mse", "hl_gauss"])
def test_regression_reaches_its_target(loss):
    torch.manual_seed(0)
    heads = Heads(5, ensemble=2, hidden=16, loss=loss, bins=21)
    y, mask = torch.linspace(0, 1, 7), torch.tensor([True] * 6 + [False])
    optimizer = torch.optim.Adam(heads.parameters(), 0.01)
    for _ in range(400):
        optimizer.zero_grad()
        (heads.q.regress(heads.q(X), y, mask) + heads.v.expectile(heads.v(X), y, 0.5, mask)).backward()
        optimizer.step()
    assert (heads.q_values(X) - y)[:, :6].abs().max() < 0.02
    assert (heads.values(X) - y)[:6].abs().max() < 0.02


def test_the_bins_move_with_the_weights():
    heads = Heads(5, loss="hl_gauss").to("meta")
    assert heads.q.support is not None
    assert heads.q.support.edges.is_meta
    heads = Heads(5, loss="hl_gauss").double()
    assert heads.v.support is not None
    assert heads.v.support.edges.dtype == torch.float64


def test_the_target_equals_the_online_heads_at_step_0_and_follows():
    online = shaken(Heads(5, hidden=4))
    target = target_of(online)
    assert isinstance(target, Heads)
    assert (target.q_values(X) == online.q_values(X)).all()
    assert (target.values(X) == online.values(X)).all()
    assert not any(p.requires_grad for p in target.parameters())
    before = copy.deepcopy(target)
    for p in online.parameters():
        p.data += 1.0
    assert not (target.values(X) == online.values(X)).any()
    polyak(target, online, 0.1)
    for t, b, o in zip(target.parameters(), before.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(t, 0.9 * b + 0.1 * o)
    polyak(target, online, 1.0)
    torch.testing.assert_close(target.values(X), online.values(X))


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="mse or hl_gauss, not 'l1'"):
        Heads(5, loss="l1")


def test_one_value_for_all_returns_still_has_bins():
    heads = Heads(5, loss="hl_gauss", low=0.0, high=0.0)
    assert heads.values(X).isfinite().all()


@pytest.mark.parametrize("loss", ["mse", "hl_gauss"])
def test_products_in_bfloat16_stay_close_and_losses_are_float32(loss):
    torch.manual_seed(0)
    heads, x = Heads(64, hidden=64, loss=loss), torch.randn(256, 64)
    y, mask = x[:, 0].sigmoid(), torch.ones(256, dtype=torch.bool)

    def gradients():
        heads.zero_grad()
        raw = heads.q(x)
        assert raw.dtype == torch.float32
        loss = heads.q.regress(raw, y, mask) + heads.v.expectile(heads.v(x), y, 0.8, mask)
        assert loss.dtype == torch.float32
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in heads.parameters() if p.grad is not None])

    exact_loss, exact = gradients()
    heads.compute_in(torch.bfloat16)
    half_loss, half = gradients()
    torch.testing.assert_close(half_loss, exact_loss, rtol=0.01, atol=0)
    assert 0 < (half - exact).norm() / exact.norm() < 0.02  # not 0: bfloat16 was used
    assert all(p.dtype == torch.float32 for p in heads.parameters())
    heads.compute_in(None)
    assert torch.equal(gradients()[1], exact)


def test_what_target_and_online_module_share_does_not_move():
    shared, online = nn.Linear(2, 2), nn.Linear(2, 2)
    target = copy.deepcopy(online)
    before = shared.weight.clone()
    with torch.no_grad():
        online.weight += 1.0
    polyak(nn.ModuleList([shared, target]), nn.ModuleList([shared, online]), 0.5)
    assert torch.equal(shared.weight, before)
    torch.testing.assert_close(target.weight, online.weight - 0.5)


@pytest.mark.parametrize("floor", [1e-4, 0.1, 10.0])
def test_whitening_evens_out_scales_down_to_its_floor(floor):
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3, 3, 1, 1, 0.3, 0.1, 0.1, 0.1]
    )
    heads = Heads(8, whitening=floor)
    heads.whiten(x, x)
    seen = heads.q.norm(x)
    white = (seen - heads.q.mean) @ heads.q.whitening
    before, after = (torch.linalg.eigvalsh(y.T.cov(correction=0)).clamp(min=0) for y in (seen, white))
    torch.testing.assert_close(after, before / (before + floor * before.mean()), atol=1e-4, rtol=1e-3)
    assert white.mean(dim=0).abs().max() < 1e-5


def test_whitening_is_kept_with_the_heads_and_heads_without_it_hold_nothing():
    x = torch.randn(64, 8)
    heads = Heads(8, whitening=0.1)
    heads.whiten(x, x**3)
    options: dict[str, Any] = heads.options
    again = Heads(8, **options)
    again.load_state_dict(heads.state_dict())
    torch.testing.assert_close(again.q_values(x), heads.q_values(x))
    assert not torch.allclose(heads.q.mean, heads.v.mean)
    plain = Heads(8)
    plain.whiten(x, x)
    assert {name for name, _ in plain.named_buffers()} == set()
