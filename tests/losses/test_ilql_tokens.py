"""ILQL's targets, penalty and policy at the level of tokens: by hand, against numpy, and at their fixed points."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import root
from scipy.special import logsumexp, softmax
from torch.testing import assert_close

from offline_lm.algos.ilql import ILQL, TokenBatch
from offline_lm.losses.ilql import perturbed_logprobs, taken_q, token_cql, token_targets
from offline_lm.losses.returns import next_values
from offline_lm.losses.td import ensemble_min, td_target

torch.set_num_threads(1)
NAN = float("nan")


def d(*x):
    return torch.tensor(x, dtype=torch.float64)


# Two turns, of 2 tokens and of 1, the second ends the episode; then a turn of 3 tokens and its final observation.
TURNS = {
    "lengths": torch.tensor([2, 1, 3, 0]), "rewards": d(0.25, 5.0, 1.0, 7.0), "continues": d(1.0, 0.0, 1.0, 1.0),
    "offsets": torch.tensor([0, 2, 4]),
}  # fmt: skip


def test_targets_by_hand():
    y = token_targets(d(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), d(1.0, 3.0, 4.0, 9.0), **TURNS, gamma=0.5)
    # within a response V of its next position, undiscounted and with no reward; behind it r + gamma V(s')
    assert y.tolist() == [2.0, 0.25 + 0.5 * 3.0, 5.0, 5.0, 6.0, 1.0 + 0.5 * 9.0]
    assert y.dtype == torch.float64


def test_nothing_is_taken_from_behind_a_termination():
    y = token_targets(d(1.0, 2.0, 3.0, NAN, 5.0, 6.0), d(1.0, 3.0, NAN, 9.0), **TURNS, gamma=0.5)
    assert y.tolist()[:3] == [2.0, 1.75, 5.0]


def test_with_one_token_a_turn_it_is_the_turns_own_target():
    drawn = torch.Generator().manual_seed(0)
    v, rewards = torch.randn(2, 5, generator=drawn, dtype=torch.float64)
    continues, offsets = d(1.0, 1.0, 0.0, 1.0, 1.0), torch.tensor([0, 3, 5])
    y = token_targets(v, v, torch.ones(5, dtype=torch.long), rewards, continues, offsets, gamma=0.9)
    assert_close(y, td_target(rewards, continues, next_values(v, offsets), gamma=0.9))


def test_targets_want_every_token_and_no_more():
    for tokens, states in ((5, 4), (7, 4), (6, 3)):
        with pytest.raises(ValueError, match="values of tokens"):
            token_targets(torch.zeros(tokens), torch.zeros(states), **TURNS, gamma=0.5)


def test_the_penalty_by_hand_and_against_numpy():
    q = d(0.0, math.log(3.0)).reshape(1, 1, 2)
    assert token_cql(q, torch.tensor([0])).item() == pytest.approx(math.log(4.0))
    assert token_cql(q, torch.tensor([1])).item() == pytest.approx(math.log(4.0 / 3.0))
    drawn = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 7, generator=drawn, dtype=torch.float64, requires_grad=True)
    taken = torch.tensor([0, 6, 3, 3, 1])
    each = logsumexp(q.detach().numpy(), axis=2) - q.detach().numpy()[:, np.arange(5), taken.numpy()]
    np.testing.assert_allclose(token_cql(q, taken).detach().numpy(), each.sum(axis=0), rtol=1e-12)
    assert_close(token_cql(q.float(), taken).double(), token_cql(q, taken), rtol=1e-5, atol=0)
    assert torch.autograd.gradcheck(lambda x: token_cql(x, taken), q)
    np.testing.assert_array_equal(
        taken_q(q, taken).detach().numpy(), q.detach().numpy()[:, np.arange(5), taken.numpy()]
    )
    with pytest.raises(ValueError, match="one token a position"):
        token_cql(q, taken[:1])


def test_the_policy_by_hand():
    half = d(0.5, 0.5).log()[None]
    assert_close(perturbed_logprobs(half, d(math.log(3.0) / 2, 0.0)[None], beta=2.0).exp(), d(0.75, 0.25)[None])
    assert_close(perturbed_logprobs(half, d(9.0, 0.0)[None], beta=0.0), half)
    # V is taken away by the softmax, and so are a position's other constants
    shifted = perturbed_logprobs(half + 3.0, d(math.log(3.0) / 2, 0.0)[None] - 8.0, beta=2.0)
    assert_close(shifted.exp(), d(0.75, 0.25)[None])
    with pytest.raises(ValueError, match="shape"):
        perturbed_logprobs(torch.zeros(3, 4), torch.zeros(1, 4), beta=1.0)


def test_the_fixed_point_on_a_tabular_token_mdp():
    """Of 4 runs one says 0 at s0 and earns 1; three say 1 and come to s1, where two say 0 (nothing), one 1 (2)."""
    # positions: 0 s0, 1 s0 "0", 2 s0 "1", 3 s1, 4 s1 "0", 5 s1 "1"; token 2 ends a response
    said = [(0, 0), (1, 2)] + 2 * [(0, 1), (2, 2), (3, 0), (4, 2)] + [(0, 1), (2, 2), (3, 1), (5, 2)]
    at, taken = (torch.tensor(x) for x in zip(*said, strict=True))
    state_at = torch.tensor([0, 0, 3, 0, 3, 0, 3])
    turns = {
        "lengths": torch.full((7,), 2), "rewards": d(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0),
        "continues": d(0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0), "offsets": torch.tensor([0, 1, 3, 5, 7]),
    }  # fmt: skip
    algo = ILQL(gamma=0.8, tau=0.8, alpha=0.0, beta=1.0, polyak=1.0)
    v = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.bincount(at).double().reciprocal()[at]  # of any positive weights the fixed point is the same
    optimiser = torch.optim.SGD([v, q], lr=0.5)
    for _ in range(120):
        losses = algo.loss(TokenBatch(
            v=v[at], q=q[:, at], logits=torch.zeros(14, 3, dtype=torch.float64), taken=taken,
            q_bar=ensemble_min(taken_q(q[:, at], taken)).detach(),
            target=token_targets(v[at], v[state_at], **turns, gamma=algo.gamma), weight=weight, value_weight=weight,
            unit=1.0,
        ))  # fmt: skip
        optimiser.zero_grad()
        (losses["v"] + losses["q"]).backward()
        optimiser.step()
    # V(s1), the .8-expectile of 0, 0 and 2, is 2 * .8 / (.8 + 2 * .2); V(s0) that of 1 and three times .8 V(s1)
    v1 = 4 / 3
    v0 = (0.8 * 3 * 0.8 * v1 + 0.2 * 1.0) / (0.8 * 3 + 0.2)
    assert v.tolist() == pytest.approx([v0, 1.0, 0.8 * v1, v1, 0.0, 2.0], abs=1e-7)
    for member in q:
        assert member[0, :2].tolist() == pytest.approx([1.0, 0.8 * v1], abs=1e-7)
        assert [member[3, 0].item(), member[3, 1].item()] == pytest.approx([0.0, 2.0], abs=1e-7)


def test_the_fixed_point_with_the_penalty():
    """Of one state: 2 p (Q - y) + alpha (softmax Q - p) = 0, which scipy solves."""
    p, y, alpha = np.array([0.75, 0.25]), np.array([0.0, 0.0]), 0.5
    solved = root(lambda q: 2 * p * (q - y) + alpha * (softmax(q) - p), y, tol=1e-13).x
    assert solved[1] < -0.1, "the rarer action is undervalued"
    q = torch.tensor(solved).expand(1, 4, 2).clone().requires_grad_()
    taken, weight = torch.tensor([0, 0, 0, 1]), torch.full((4,), 0.25, dtype=torch.float64)
    losses = ILQL(gamma=1.0, tau=0.5, alpha=alpha, beta=1.0, polyak=1.0).loss(TokenBatch(
        v=torch.zeros(4, dtype=torch.float64), q=q, logits=torch.zeros(4, 2, dtype=torch.float64), taken=taken,
        q_bar=torch.zeros(4, dtype=torch.float64), target=torch.tensor(y)[taken], weight=weight, value_weight=weight,
        unit=1.0,
    ))  # fmt: skip
    (losses["q"] + losses["cql"]).backward()
    assert q.grad is not None
    assert_close(q.grad.sum(dim=1), torch.zeros(1, 2, dtype=torch.float64), atol=1e-9, rtol=0)
