"""Clipped surrogates and the health of an update, by hand, against loops in float64, and in micro-batches."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offline_lm.losses.clipping import gspo_clip, ppo_clip, update_health
from offline_lm.losses.policy import policy_gradient, token_weights

torch.set_num_threads(1)
NAN = float("nan")


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


@st.composite
def packed(draw, min_length=0):
    """Lengths, owner, log-probabilities of the policy and of the one before, advantages."""
    lengths = torch.tensor(draw(st.lists(st.integers(min_length, 6), min_size=1, max_size=6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    logprobs, old = -scale * torch.rand(2, int(lengths.sum()), generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return lengths, torch.arange(len(lengths)).repeat_interleave(lengths), logprobs, old, advantages


def logs(*ratios):
    return torch.tensor(ratios, dtype=torch.float64).log()


def test_ppo_by_hand():
    """Ratios 0.5, 1, 2 for A = 1 and for A = -2, clipped to 0.8 .. 1.3: min(rho A, clip(rho) A)."""
    logprobs = logs(0.5, 1, 2, 0.5, 1, 2).requires_grad_()
    old = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    advantages = f64(1, -2).requires_grad_()
    owner = torch.tensor([0, 0, 0, 1, 1, 1])
    weight = torch.ones(6, dtype=torch.float64)
    loss = ppo_clip(logprobs, old, advantages, owner, weight, low=0.2, high=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-((0.5 + 1 + 1.3) + (-2 * 0.8 + -2 * 1 + -2 * 2)))
    assert logprobs.grad is not None
    # d rho / d logp = rho; none where the clip is active.
    assert logprobs.grad.tolist() == pytest.approx([-0.5, -1, 0, 0, 2, 4])
    assert old.grad is None
    assert advantages.grad is None


def test_gspo_by_hand():
    """Two responses: ratios 4 and 1/2 have the geometric mean sqrt 2; 1/2, 1/2, 1/2 have 1/2."""
    logprobs = logs(4, 0.5, 0.5, 0.5, 0.5).requires_grad_()
    old, owner = torch.zeros(5, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1])
    weight = token_weights(torch.tensor([2, 3]), "sequence", dtype=torch.float64)
    root = math.sqrt(2)
    loss = gspo_clip(logprobs, old, f64(3, -1), owner, weight, low=0.2, high=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(-(3 * root - 1 * 0.8) / 2)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-3 * root / 4, -3 * root / 4, 0, 0, 0])
    clipped = gspo_clip(logprobs, old, f64(3, 1), owner, weight, low=0.2, high=0.4)
    assert clipped.item() == pytest.approx(-(3 * 1.4 + 0.5) / 2)
    # Trap 16: with the sum for the mean the ratios would be 2 and 1/8.
    assert loss.item() != pytest.approx(-(3 * 1.5 - 1 * 0.8) / 2)


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    logprobs = f64(-0.3, -1.2, -0.1, -2.0, -0.7).requires_grad_()
    owner, advantages = torch.tensor([0, 0, 1, 1, 1]), f64(0.7, -1.3)
    weight = token_weights(torch.tensor([2, 3]), "sequence", dtype=torch.float64)
    (want,) = torch.autograd.grad(policy_gradient(logprobs, advantages, owner, weight), logprobs)
    for clip in (ppo_clip, gspo_clip):
        loss = clip(logprobs, logprobs.detach(), advantages, owner, weight, low=0.2, high=0.2)
        (grad,) = torch.autograd.grad(loss, logprobs)
        torch.testing.assert_close(grad, want)
        assert loss.item() == pytest.approx(-(0.7 - 1.3) / 2)


def test_low_1_and_high_inf_clip_nothing():
    logprobs, weight = logs(1e-6, 1e6, 1e-6, 1e6), torch.ones(4, dtype=torch.float64)
    owner = torch.tensor([0, 0, 1, 1])
    loss = ppo_clip(logprobs, torch.zeros_like(logprobs), f64(1, -2), owner, weight, low=1.0, high=math.inf)
    assert loss.item() == pytest.approx(-(1e-6 + 1e6) * (1 - 2))


def test_a_ratio_that_overflows_meets_no_zero():
    """exp(200) is inf in float32, and inf * 0 is NaN: in the loss for A = 0, in the gradient for A > 0."""
    owner, weight = torch.tensor([0, 1, 2]), torch.ones(3)
    advantages, old = torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3)
    for clip in (ppo_clip, gspo_clip):
        logprobs = torch.tensor([200.0, 200.0, -200.0], requires_grad=True)
        loss = clip(logprobs, old, advantages, owner, weight, low=0.2, high=0.2)
        loss.backward()
        assert loss.item() == pytest.approx(-(0 + 1.2 - 0.8))
        assert logprobs.grad is not None
        assert logprobs.grad.tolist() == [0.0, 0.0, 0.0]
    logprobs = torch.tensor([200.0, 200.0, -200.0], requires_grad=True)
    ratio = logprobs.exp()
    torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[:2].isnan().all(), "the textbook form"


@pytest.mark.parametrize("clip", [ppo_clip, gspo_clip])
def test_gradcheck(clip):
    generator = torch.Generator().manual_seed(0)
    logprobs, old = -torch.rand(2, 9, generator=generator, dtype=torch.float64)
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    weight = token_weights(torch.bincount(owner), "sequence", dtype=torch.float64)
    logprobs.requires_grad_()
    advantages = f64(1.0, -1.0, 0.5, -2.0)
    assert torch.autograd.gradcheck(lambda x: clip(x, old, advantages, owner, weight, low=0.15, high=0.25), logprobs)


@settings(max_examples=100, deadline=None)
@given(packed(), st.floats(0, 0.9), st.floats(0, 2), st.data())
def test_against_loops_and_in_micro_batches(batch, low, high, data):
    lengths, owner, logprobs, old, advantages = batch
    n = len(lengths)
    counted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    kept = [i for i in range(n) if counted[i]]
    log_ratios = [x.tolist() for x in (logprobs - old).split(lengths.tolist())]

    def surrogate(ratio, a):
        return min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)

    ppo = gspo = 0.0
    for i in kept:
        own, a = log_ratios[i], advantages[i].item()
        if own:
            ppo -= sum(surrogate(math.exp(x), a) for x in own) / len(own) / len(kept)
            gspo -= surrogate(math.exp(sum(own) / len(own)), a) / len(kept)

    # What is left out is unknown, and stays out of loss and gradient.
    advantages = advantages.where(counted, NAN)
    old = old.where(counted[owner], NAN)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        weight = token_weights(lengths, "sequence", counted=counted, dtype=dtype)
        leaf = logprobs.to(dtype).requires_grad_()
        for clip, want in ((ppo_clip, ppo), (gspo_clip, gspo)):

            def loss(at, clip=clip, leaf=leaf, weight=weight):
                ours, theirs = leaf[at], old.to(leaf.dtype)[at]
                return clip(ours, theirs, advantages.to(leaf.dtype), owner[at], weight[at], low=low, high=high)

            whole = loss(torch.arange(len(owner)))
            assert whole.item() == pytest.approx(want, rel=tolerance, abs=tolerance)
            (grad,) = torch.autograd.grad(whole, leaf)
            assert (grad[~counted[owner]] == 0).all()
            parts = [loss(torch.nonzero(owner == i).flatten()) for i in range(n)]
            (added,) = torch.autograd.grad(sum(parts[1:], parts[0]), leaf)
            torch.testing.assert_close(added, grad, rtol=1e-6, atol=1e-6)


def test_an_unknown_that_counts_is_not_hidden():
    owner, weight = torch.zeros(2, dtype=torch.int64), torch.full((2,), 0.5)
    logprobs, old = torch.zeros(2), torch.tensor([0.0, NAN])
    for clip in (ppo_clip, gspo_clip):
        assert clip(logprobs, old, torch.ones(1), owner, weight, low=0.2, high=0.2).isnan()
        assert clip(logprobs, logprobs, torch.tensor([NAN]), owner, weight, low=0.2, high=0.2).isnan()


def test_health_by_hand():
    """A > 0: 2 is clipped and 1/2 is not. A < 0: 1/2 is, 2 is not. A = 0: neither."""
    logprobs, old = logs(2, 0.5, 2, 0.5, 2, 0.5), torch.zeros(6, dtype=torch.float64)
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    got = update_health(logprobs, old, owner, 3, low=0.2, high=0.2, advantages=f64(1, -1, 0))
    assert got["clip_fraction"] == pytest.approx(2 / 6)
    assert got["approx_kl"] == pytest.approx(((2 - math.log(2) - 1) + (0.5 + math.log(2) - 1)) / 2)
    assert got["ratio_max"] == pytest.approx(2.0)
    assert got["ess"] == pytest.approx(1.0)  # every response weighs 2 / 2
    # Responses that weigh 4 and 1: 25 / 17 of 2. One without a token is none.
    log_ratio, owner = logs(2, 2, 1), torch.tensor([0, 0, 2])
    got = update_health(log_ratio, old[:3], owner, 3, low=0.2, high=0.2, advantages=f64(1, 1, 1))
    assert got["ess"] == pytest.approx(25 / 17 / 2)
    assert got["clip_fraction"] == pytest.approx(2 / 3)


def test_health_of_responses():
    """Ratios 4 and 1/4 make a response's 1, ratios 2 and 8 make 4: geometric means."""
    logprobs, owner = logs(4, 0.25, 2, 8), torch.tensor([0, 0, 1, 1])
    old, advantages = torch.zeros_like(logprobs), f64(1, 1)
    tokens, responses = (
        update_health(logprobs, old, owner, 2, low=0.2, high=0.2, advantages=advantages, sequence_level=sequence_level)
        for sequence_level in (False, True)
    )
    assert (tokens["clip_fraction"], tokens["ratio_max"]) == (0.75, pytest.approx(8.0))
    assert (responses["clip_fraction"], responses["ratio_max"]) == (0.5, pytest.approx(4.0))
    assert tokens["ess"] == responses["ess"] == pytest.approx(17**2 / (1 + 16**2) / 2)


def test_health_without_what_does_not_count():
    logprobs = torch.tensor([0.0, -1.0, 0.0], requires_grad=True)
    old, owner = torch.tensor([0.0, NAN, 0.0]), torch.tensor([0, 1, 2])
    advantages, counted = torch.tensor([1.0, NAN, 1.0]), torch.tensor([True, False, True])
    for sequence_level in (False, True):
        got = update_health(
            logprobs,
            old,
            owner,
            3,
            low=0.2,
            high=0.2,
            advantages=advantages,
            counted=counted,
            sequence_level=sequence_level,
        )
        assert got == {"approx_kl": 0.0, "clip_fraction": 0.0, "ratio_max": 1.0, "ess": pytest.approx(1.0)}
    got = update_health(
        logprobs, old, owner, 3, low=0.2, high=0.2, advantages=advantages, counted=torch.zeros(3, dtype=torch.bool)
    )
    assert all(math.isnan(x) for x in got.values())
    assert set(got) == {"approx_kl", "clip_fraction", "ratio_max", "ess"}


def test_weights_beyond_the_range_of_floats():
    """exp(1000) overflows; two such responses beside one of weight 1 still are 2 of 3."""
    logprobs, owner = torch.tensor([1000.0, 1000.0, 0.0]), torch.arange(3)
    got = update_health(logprobs, torch.zeros(3), owner, 3, low=0.2, high=0.2, advantages=torch.ones(3))
    assert got["ess"] == pytest.approx(2 / 3)
    assert got["ratio_max"] == math.inf
    got = update_health(-logprobs, torch.zeros(3), owner, 3, low=0.2, high=0.2, advantages=torch.ones(3))
    assert got["ess"] == pytest.approx(1 / 3)


@settings(max_examples=100, deadline=None)
@given(packed(min_length=1), st.floats(0, 0.9), st.floats(0, 2))
def test_health_against_loops(batch, low, high):
    lengths, owner, logprobs, old, advantages = batch
    log_ratio = (logprobs - old).tolist()
    # A ratio at the very bound is on either side of it by rounding.
    assume(all(min(abs(math.exp(x) - 1 + low), abs(math.exp(x) - 1 - high)) > 1e-9 for x in log_ratio))
    got = update_health(logprobs, old, owner, len(lengths), low=low, high=high, advantages=advantages)
    weights = [math.exp(sum(x for x, o in zip(log_ratio, owner, strict=True) if o == i)) for i in range(len(lengths))]
    ratios = [(math.exp(x), advantages[o].item()) for x, o in zip(log_ratio, owner, strict=True)]
    clipped = [(a > 0 and r > 1 + high) or (a < 0 and r < 1 - low) for r, a in ratios]
    assert got["ess"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / len(weights))
    assert got["clip_fraction"] == pytest.approx(sum(clipped) / len(clipped), abs=1e-6)
    assert got["ratio_max"] == pytest.approx(max(r for r, _ in ratios))
    assert got["approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r, _ in ratios) / len(ratios), abs=1e-12)
    # Where the clip is active there is no gradient, and everywhere else there is.
    leaf = logprobs.clone().requires_grad_()
    weight = token_weights(lengths, "sequence", dtype=torch.float64)
    ppo_clip(leaf, old, advantages, owner, weight, low=low, high=high).backward()
    assert leaf.grad is not None
    assert (leaf.grad == 0).tolist() == clipped


def test_mistakes():
    x, owner = torch.zeros(2), torch.tensor([0, 0])
    for clip in (ppo_clip, gspo_clip):
        for low, high in ((-0.1, 0.2), (1.1, 0.2), (0.2, -0.1), (NAN, 0.2)):
            with pytest.raises(ValueError, match="a ratio is clipped to"):
                clip(x, x, torch.ones(1), owner, x, low=low, high=high)
        with pytest.raises(ValueError, match="old of shape"):
            clip(x, x[:1], torch.ones(1), owner, x, low=0.2, high=0.2)
        with pytest.raises(ValueError, match=r"one advantage a response, \[n\]"):
            clip(x, x, torch.ones(1, 1), owner, x, low=0.2, high=0.2)
    with pytest.raises(ValueError, match="2 responses, advantages"):
        update_health(x, x, owner, 2, low=0.2, high=0.2, advantages=torch.ones(1))
