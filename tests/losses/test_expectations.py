"""Expectations under a policy over known actions: by hand, against loops in float64, and as importance sampling."""

import math

import numpy as np
import pytest
import torch

from offline_lm.losses.expectations import candidate_mean, candidate_softmax, expected_advantage

INF, NAN = math.inf, math.nan
OWNER = torch.tensor([0, 0, 2, 2, 2])


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


def near(x, *wanted):
    torch.testing.assert_close(x, f64(*wanted), atol=1e-12, rtol=0, equal_nan=True)


def test_probabilities_sum_to_one_at_each_state():
    scores = f64(math.log(3), 0, 0, math.log(2), 0)
    near(candidate_softmax(scores, OWNER, 3), 0.75, 0.25, 0.25, 0.5, 0.25)
    near(candidate_softmax(scores - 900, OWNER, 3), 0.75, 0.25, 0.25, 0.5, 0.25)  # log-probabilities of long responses
    near(candidate_softmax(f64(-INF, 0, -INF, -INF, -INF), OWNER, 3), 0, 1, 0, 0, 0)


def test_the_mean_of_q_by_hand():
    q, p = f64(1, 5, 2, 4, NAN), f64(0.75, 0.25, 0.5, 0.5, 0)
    near(candidate_mean(q, p, OWNER, 4), 2, NAN, 3, NAN)  # states without actions have none
    near(candidate_mean(q, torch.zeros(5, dtype=torch.float64), OWNER, 3), NAN, NAN, NAN)
    assert not candidate_mean(q.requires_grad_(), p, OWNER, 3).requires_grad


def test_expected_advantages_by_hand():
    logprobs, advantages = f64(math.log(3), 0, 0, 0, 0), f64(-1, 3, 1, 2, 6)
    near(expected_advantage(logprobs, advantages, OWNER, 3), 0, 0, 3)
    proposal = f64(-INF, 0, math.log(2), 0, -INF)
    near(expected_advantage(logprobs, advantages, OWNER, 3, proposal=proposal), 3, 0, 4 / 3)


def test_the_gradient_is_the_score_functions_with_all_actions():
    """sum_a pi(a) A(a) (d log pi(a)), worked out with a loop over actions; a constant of the state changes nothing."""
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=5), rng.normal(size=5)
    wanted = np.zeros(5)
    for s in (0, 2):
        own = np.flatnonzero(OWNER.numpy() == s)
        pi = np.exp(x[own]) / np.exp(x[own]).sum()
        for i, k in enumerate(own):
            d_log = (own == k).astype(float) - pi
            wanted[own] += pi[i] * a[k] * d_log
    for shift in (0.0, 7.0):
        scores = torch.from_numpy(x).requires_grad_()
        expected_advantage(scores, torch.from_numpy(a) + shift, OWNER, 3).sum().backward()
        assert scores.grad is not None
        np.testing.assert_allclose(scores.grad.numpy(), wanted, atol=1e-12)


def test_gradients_agree_with_finite_differences_and_reach_no_advantage():
    scores = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    advantages, proposal = f64(1, -2, 0.5, 3, 1).requires_grad_(), f64(0, 0, math.log(2), 0.3, -INF)
    assert torch.autograd.gradcheck(
        lambda x: expected_advantage(x, advantages.detach(), OWNER, 3, proposal=proposal), scores
    )
    out = expected_advantage(scores, advantages, OWNER, 3, proposal=proposal).sum()
    (of_scores, of_advantages) = torch.autograd.grad(out, [scores, advantages], allow_unused=True)
    assert of_advantages is None
    assert torch.isfinite(of_scores).all()
    assert of_scores[4] == 0


def test_samples_of_an_older_policy_estimate_the_new_ones_expectation():
    """100,000 draws of q, weighted towards pi, against the sum over all actions."""
    rng = np.random.default_rng(0)
    old, new, advantage = rng.normal(size=6), rng.normal(size=6), rng.normal(size=6)
    p_old, p_new = (np.exp(x) / np.exp(x).sum() for x in (old, new))
    counts = rng.multinomial(100_000, p_old)
    proposal = torch.from_numpy(np.log(counts) - np.log(p_old))
    owner = torch.zeros(6, dtype=torch.int64)
    found = expected_advantage(
        torch.from_numpy(np.log(p_new)), torch.from_numpy(advantage), owner, 1, proposal=proposal
    )
    assert found.item() == pytest.approx((p_new * advantage).sum(), abs=0.02)
    assert abs((p_old * advantage).sum() - (p_new * advantage).sum()) > 0.1


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(5,\) owners for actions of shape \(4,\)"):
        candidate_softmax(f64(0, 0, 0, 0), OWNER, 3)
    with pytest.raises(ValueError, match="owners for actions"):
        candidate_mean(f64(0, 0, 0, 0, 0), f64(1), OWNER, 3)
