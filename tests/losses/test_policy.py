"""Losses of the policy over packed responses, by hand, against loops over ragged lists, and in micro-batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm.losses.policy import (
    Aggregate,
    approx_kl,
    awr_weights,
    entropy,
    k3,
    kl_k3,
    policy_gradient,
    sequence_logprob,
    token_weights,
)

torch.set_num_threads(1)
NAN = float("nan")
# Three responses of 2, 3 and 0 tokens; the last token of each is its end of turn.
LOGPROBS = torch.tensor([-1.0, -2.0, -3.0, -5.0, -1.0])
OWNER = torch.tensor([0, 0, 1, 1, 1])


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


@st.composite
def packed(draw):
    """Lengths, owner, log-probabilities of the policy and of a reference, advantages."""
    lengths = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=1, max_size=6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    logprobs, reference = -scale * torch.rand(2, int(lengths.sum()), generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return lengths, torch.arange(len(lengths)).repeat_interleave(lengths), logprobs, reference, advantages


def test_sum_and_mean_by_hand():
    total = sequence_logprob(LOGPROBS, OWNER, 3, reduce="sum").tolist()
    mean = sequence_logprob(LOGPROBS, OWNER, 3, reduce="mean").tolist()
    assert total == [-3.0, -9.0, 0.0]
    assert mean == [-1.5, -3.0, 0.0]
    assert total != mean, "trap 16: one in place of the other fails above"


def test_trap_5_the_mean_counts_tokens_of_the_response_not_columns():
    padded = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -5.0, -1.0]])
    assert padded.mean(dim=-1)[0].item() == -1.0
    assert sequence_logprob(LOGPROBS, OWNER, 2, reduce="mean")[0].item() == -1.5


def test_half_precision_is_added_up_in_float32():
    half = torch.full((3000,), -1.0, dtype=torch.bfloat16)
    owner = torch.zeros(3000, dtype=torch.int64)
    assert sequence_logprob(half, owner, 1, reduce="sum").tolist() == [-3000.0]
    assert half.new_zeros(1).index_add(0, owner, half).item() != -3000.0


def test_reduce_must_be_said():
    with pytest.raises(TypeError, match="reduce"):
        sequence_logprob(LOGPROBS, OWNER, 3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="'sum' or 'mean', not 'total'"):
        sequence_logprob(LOGPROBS, OWNER, 3, reduce="total")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="owner of shape"):
        sequence_logprob(LOGPROBS, OWNER[:2], 3, reduce="sum")


def test_weights_by_hand():
    lengths = torch.tensor([2, 3, 0])
    want: dict[Aggregate, list[float]] = {
        "sequence": [1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9],
        "token": [1 / 5] * 5,
        "constant": [1 / 30] * 5,
        "sum": [1 / 3] * 5,
    }
    for aggregate, weights in want.items():
        got = token_weights(lengths, aggregate, constant=10 if aggregate == "constant" else None, dtype=torch.float64)
        assert got.tolist() == pytest.approx(weights, abs=1e-15), aggregate
    # The first of three is left out: neither n nor T counts it.
    counted = torch.tensor([False, True, True])
    want = {"sequence": [1 / 6] * 3, "token": [1 / 3] * 3, "constant": [1 / 20] * 3, "sum": [1 / 2] * 3}
    for aggregate, weights in want.items():
        constant = 10 if aggregate == "constant" else None
        got = token_weights(lengths, aggregate, constant=constant, counted=counted, dtype=torch.float64)
        assert got.tolist() == pytest.approx([0, 0, *weights], abs=1e-15), aggregate
        nothing = token_weights(lengths, aggregate, constant=constant, counted=torch.zeros(3, dtype=torch.bool))
        assert nothing.tolist() == [0.0] * 5
    assert token_weights(lengths[:0], "sequence").tolist() == []


def test_trap_16_each_aggregate_is_its_own_mean():
    """-log pi, averaged over responses, over tokens, or of whole responses: three numbers, none of them by default."""
    lengths, ones = torch.tensor([2, 3]), torch.ones(2)

    def loss(aggregate):
        return policy_gradient(LOGPROBS, ones, OWNER, token_weights(lengths, aggregate)).item()

    assert loss("sequence") == pytest.approx((1.5 + 3.0) / 2)
    assert loss("token") == pytest.approx(12 / 5)
    assert loss("sum") == pytest.approx((3 + 9) / 2)
    with pytest.raises(TypeError, match="aggregate"):
        token_weights(lengths)  # pyright: ignore[reportCallIssue]


def test_policy_gradient_by_hand():
    logprobs, advantages = LOGPROBS.clone().requires_grad_(), torch.tensor([2.0, -1.0], requires_grad=True)
    loss = policy_gradient(logprobs, advantages, OWNER, token_weights(torch.tensor([2, 3]), "sum"))
    loss.backward()
    assert loss.item() == -(2 * -3 - 1 * -9) / 2
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, -1.0, 0.5, 0.5, 0.5]
    assert advantages.grad is None


def test_trap_7_the_end_of_turn_token_is_trained():
    """The last token of a response has the same share in the gradient as the others."""
    ends = torch.tensor([1, 4])

    def holds(drop_stop):
        logprobs = LOGPROBS.clone().requires_grad_()
        kept = torch.ones(5, dtype=torch.bool)
        kept[ends] = not drop_stop
        owner, lengths = OWNER[kept], torch.bincount(OWNER[kept])
        policy_gradient(logprobs[kept], torch.ones(2), owner, token_weights(lengths, "sequence")).backward()
        assert logprobs.grad is not None
        return logprobs.grad.tolist() == pytest.approx([-1 / 4, -1 / 4, -1 / 6, -1 / 6, -1 / 6])

    assert holds(drop_stop=False)
    assert not holds(drop_stop=True)


def test_awr_weights_by_hand():
    weights, clipped = awr_weights(torch.tensor([0.0, 0.5, -1.0, 1.0, 1e30, -1e30]), beta=0.5, w_max=5.0)
    assert weights.tolist() == pytest.approx([1.0, math.e, math.exp(-2), 5.0, 5.0, 0.0])
    assert weights.max().item() == 5.0
    assert clipped == pytest.approx(1 / 3)
    assert torch.tensor(1e30 / 0.5).exp().isinf(), "what is not computed"
    # An unknown advantage has an unknown weight, and is no part of the share.
    weights, clipped = awr_weights(torch.tensor([NAN, 9.0]), beta=1.0, w_max=20.0)
    assert weights[0].isnan()
    assert clipped == 1.0
    weights, clipped = awr_weights(torch.tensor([], requires_grad=True), beta=1.0, w_max=20.0)
    assert (weights.tolist(), clipped, weights.requires_grad) == ([], 0.0, False)
    assert awr_weights(torch.tensor([0, 1]), beta=1.0, w_max=20.0)[0].tolist() == pytest.approx([1, math.e])
    for beta, w_max in ((0.0, 20.0), (1.0, 0.0), (NAN, 20.0)):
        with pytest.raises(ValueError, match="must be positive"):
            awr_weights(torch.zeros(1), beta=beta, w_max=w_max)


def test_k3_by_hand():
    logprobs = f64(math.log(0.5), math.log(0.2)).requires_grad_()
    reference = f64(math.log(0.25), math.log(0.2)).requires_grad_()
    weight = f64(0.5, 0.5)
    loss = kl_k3(logprobs, reference, weight)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.5 - math.log(0.5) - 1))
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.5 * (1 - 0.5), 0.0])
    assert reference.grad is None


def test_k3_averages_to_the_divergence_in_its_direction():
    """Over all outcomes, weighted by the policy that drew them: KL(drawn from || other), and not the reverse."""
    pi, other = f64(0.7, 0.2, 0.1), f64(0.1, 0.3, 0.6)
    forward, backward = ((a * (a / b).log()).sum().item() for a, b in ((pi, other), (other, pi)))
    assert forward != pytest.approx(backward, rel=0.05)
    assert kl_k3(pi.log(), other.log(), pi).item() == pytest.approx(forward)
    assert (other * k3(pi.log() - other.log())).sum().item() == pytest.approx(backward)
    # Ten tokens drawn from `other`, each as often as it is likely.
    drawn = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    assert approx_kl(pi.log()[drawn], other.log()[drawn]).item() == pytest.approx(backward)


def test_k3_near_nothing_in_float32():
    log_ratio = torch.tensor([1e-4, -1e-5, 0.0])
    exact = k3(log_ratio.double())
    torch.testing.assert_close(k3(log_ratio).double(), exact, rtol=0.02, atol=0)
    plain = (log_ratio.exp() - log_ratio - 1).double()
    assert ((plain - exact).abs() > 0.5 * exact)[:2].all()


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, math.log(3), -math.inf], [1000.0, 0.0, 0.0]])
    logits.requires_grad_()
    got = entropy(logits)
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert got.tolist() == pytest.approx([math.log(2), quarter, 0.0], abs=1e-6)
    got.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert entropy(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("aggregate", ["sequence", "token", "sum"])
def test_gradcheck(aggregate):
    generator = torch.Generator().manual_seed(0)
    logprobs, reference = -torch.rand(2, 5, generator=generator, dtype=torch.float64)
    logprobs.requires_grad_()
    advantages, weight = f64(0.5, -2.0), token_weights(torch.tensor([2, 3]), aggregate, dtype=torch.float64)
    for loss in (
        lambda x: policy_gradient(x, advantages, OWNER, weight),
        lambda x: kl_k3(x, reference, weight),
        lambda x: sequence_logprob(x, OWNER, 3, reduce="sum"),
        lambda x: sequence_logprob(x, OWNER, 3, reduce="mean"),
    ):
        assert torch.autograd.gradcheck(loss, logprobs)
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy, logits)


@settings(max_examples=100, deadline=None)
@given(packed(), st.sampled_from(["sequence", "token", "constant", "sum"]), st.data())
def test_against_loops_and_in_micro_batches(batch, aggregate, data):
    lengths, owner, logprobs, reference, advantages = batch
    n = len(lengths)
    counted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    constant = 7 if aggregate == "constant" else None
    responses = list(zip(logprobs.split(lengths.tolist()), reference.split(lengths.tolist()), strict=True))
    kept = [i for i in range(n) if counted[i]]
    tokens = sum(len(responses[i][0]) for i in kept)

    def scale(i):
        each = {"sequence": len(kept) * len(responses[i][0]), "token": tokens, "constant": 7 * len(kept)}
        return each.get(aggregate, len(kept))

    gradient = kl = 0.0
    for i in kept:
        for own, other in zip(*map(torch.Tensor.tolist, responses[i]), strict=True):
            gradient -= advantages[i].item() * own / scale(i)
            kl += (math.exp(other - own) - (other - own) - 1) / scale(i)

    # What is left out is unknown, and stays out of loss and gradient.
    advantages = advantages.where(counted, NAN)
    reference = reference.where(counted[owner], NAN)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        weight = token_weights(lengths, aggregate, constant=constant, counted=counted, dtype=dtype)
        leaf = logprobs.to(dtype).requires_grad_()
        losses = (
            lambda x, at, w=weight: policy_gradient(x[at], advantages.to(x.dtype), owner[at], w[at]),
            lambda x, at, w=weight: kl_k3(x[at], reference.to(x.dtype)[at], w[at]),
        )
        for loss, want in zip(losses, (gradient, kl), strict=True):
            whole = loss(leaf, torch.arange(len(owner)))
            assert whole.item() == pytest.approx(want, rel=tolerance, abs=tolerance)
            (grad,) = torch.autograd.grad(whole, leaf)
            assert (grad[~counted[owner]] == 0).all()
            parts = [loss(leaf, torch.nonzero(owner == i).flatten()) for i in range(n)]
            (added,) = torch.autograd.grad(sum(parts[1:], parts[0]), leaf)
            torch.testing.assert_close(added, grad, rtol=1e-6, atol=1e-6)


def test_an_unknown_that_counts_is_not_hidden():
    weight = torch.full((2,), 0.5)
    assert policy_gradient(torch.tensor([-1.0, NAN]), torch.ones(1), torch.zeros(2).long(), weight).isnan()
    assert kl_k3(torch.tensor([-1.0, -1.0]), torch.tensor([NAN, -1.0]), weight).isnan()


def test_mistakes():
    weight = torch.full((5,), 0.2)
    with pytest.raises(ValueError, match="weight of shape"):
        policy_gradient(LOGPROBS, torch.ones(2), OWNER, weight[:4])
    with pytest.raises(ValueError, match=r"one advantage a response, \[n\]"):
        policy_gradient(LOGPROBS, torch.ones(2, 1), OWNER, weight)
    with pytest.raises(ValueError, match=r"end to end, \[t\]"):
        policy_gradient(LOGPROBS[:, None], torch.ones(2), OWNER, weight)
    with pytest.raises(ValueError, match="reference of shape"):
        kl_k3(LOGPROBS, LOGPROBS[:, None], weight)
    with pytest.raises(ValueError, match="sampled_from of shape"):
        approx_kl(LOGPROBS, LOGPROBS[:1])
    lengths = torch.tensor([2, 3])
    mistakes: list[tuple[Aggregate, int | None]] = [("constant", None), ("constant", 0), ("token", 7)]
    for aggregate, constant in mistakes:
        with pytest.raises(ValueError, match="'constant' is 1 or more"):
            token_weights(lengths, aggregate, constant=constant)
    with pytest.raises(ValueError, match="not 'mean'"):
        token_weights(lengths, "mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one length a response"):
        token_weights(lengths, "sum", counted=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="negative length"):
        token_weights(torch.tensor([2, -3]), "sum")
