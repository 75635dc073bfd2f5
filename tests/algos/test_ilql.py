"""ILQL's loss on tokens: numbers worked out by hand, masks, units, and parts of an update that add up."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch.testing import assert_close

from offline_lm.algos.ilql import ILQL, TokenBatch

torch.set_num_threads(1)
ALGO = ILQL(gamma=0.9, tau=0.75, alpha=0.5, beta=1.0, polyak=0.1)
NAN = float("nan")


def batch_of(n=6, k=2, vocab=5, seed=0, **changed):
    drawn = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    weight = torch.rand(n, generator=drawn, dtype=torch.float64)
    taken = torch.randint(vocab, (n,), generator=drawn)
    made = TokenBatch(
        v=randn(n), q=randn(k, n, vocab), logits=randn(n, vocab), taken=taken, q_bar=randn(n), target=randn(n),
        weight=weight, value_weight=weight / 2, unit=1.0,
    )  # fmt: skip
    return replace(made, **changed)


def part_of(batch, own):
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return TokenBatch(**{
        name: x[:, own] if name == "q" else x if name == "unit" else x[own] for name, x in columns.items()
    })  # fmt: skip


def test_by_hand():
    found = ALGO.loss(TokenBatch(
        v=torch.tensor([0.0, 2.0]), q=torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 4.0]]]),
        logits=torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]), taken=torch.tensor([0, 1]),
        q_bar=torch.tensor([1.0, 0.0]), target=torch.tensor([2.0, 1.0]), weight=torch.tensor([0.5, 0.5]),
        value_weight=torch.tensor([0.25, 1.0]), unit=1.0,
    ))  # fmt: skip
    assert found["v"].item() == pytest.approx(0.25 * 0.75 * 1.0 + 1.0 * 0.25 * 4.0)
    assert found["q"].item() == pytest.approx(0.25 * (1.0 + 1.0) + 1.0 * (1.0 + 9.0))
    first = math.log(1 + math.exp(-3)) + math.log(1 + math.exp(-1))
    second = math.log(2) + math.log(1 + math.exp(-4))
    assert found["cql"].item() == pytest.approx(0.5 * (0.25 * first + second))
    assert found["lm"].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


def test_gradients():
    leaves = [x.requires_grad_() for x in (batch_of().v, batch_of().q, batch_of().logits)]
    assert torch.autograd.gradcheck(
        lambda v, q, logits: tuple(ALGO.loss(batch_of(v=v, q=q, logits=logits)).values()), leaves
    )
    fixed = batch_of(v=leaves[0], q=leaves[1], q_bar=batch_of(seed=1).q_bar.requires_grad_())
    torch.stack([*ALGO.loss(fixed).values()]).sum().backward()
    assert fixed.q_bar.grad is None, "no gradient flows into targets"


def test_a_turn_without_a_target_trains_the_policy_alone():
    whole = batch_of()
    known = torch.tensor([True, True, True, True, False, False])
    unknown = replace(
        whole, v=whole.v.clone().requires_grad_(), q=whole.q.clone().requires_grad_(),
        target=whole.target.where(known, NAN), q_bar=whole.q_bar.where(known, NAN),
        value_weight=whole.value_weight.where(known, 0.0),
    )  # fmt: skip
    got, kept = ALGO.loss(unknown), ALGO.loss(part_of(whole, slice(0, 4)))
    for name in ("v", "q", "cql"):
        assert_close(got[name], kept[name])
    assert_close(got["lm"], ALGO.loss(whole)["lm"])
    torch.stack([*got.values()]).sum().backward()
    assert unknown.v.grad is not None
    assert unknown.q.grad is not None
    assert unknown.v.grad[4:].tolist() == [0.0, 0.0]
    assert not unknown.q.grad[:, 4:].any()


def test_parts_of_an_update_add_up():
    whole = batch_of()
    one, two = (ALGO.loss(part_of(whole, own)) for own in (slice(0, 2), slice(2, 6)))
    for name, loss in ALGO.loss(whole).items():
        assert_close(one[name] + two[name], loss)


def test_the_rewards_unit_does_not_matter():
    plain = batch_of()
    scaled = replace(
        plain, v=7 * plain.v + 3, q=7 * plain.q + 3, q_bar=7 * plain.q_bar + 3, target=7 * plain.target + 3, unit=7.0
    )
    for name, loss in ALGO.loss(plain).items():
        assert_close(ALGO.loss(scaled)[name], loss)


@pytest.mark.parametrize("changed", [{"gamma": 2}, {"tau": 1.0}, {"alpha": -1}, {"beta": math.nan}, {"polyak": "x"}])
def test_settings_out_of_range_are_refused(changed):
    ((name, value),) = changed.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: a number"):
        replace(ALGO, **changed)
