"""Reductions over candidates, and the conservative penalty, against loops over states in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm.losses.candidates import candidate_logsumexp, candidate_max
from offline_lm.losses.conservative import cql_penalty
from offline_lm.losses.masks import masked_mean

torch.set_num_threads(1)


def test_by_hand():
    q, owner = torch.tensor([[1.0, 3.0, -2.0], [0.0, 0.0, 5.0]]), torch.tensor([0, 0, 2])
    assert candidate_max(q[0], owner, 3).tolist() == pytest.approx([3.0, math.nan, -2.0], nan_ok=True)
    got = candidate_logsumexp(q, owner, 3)
    assert got[0].tolist() == pytest.approx([math.log(math.e + math.e**3), 0.0, -2.0])
    assert got[1].tolist() == pytest.approx([math.log(2), 0.0, 5.0])


def test_the_penalty_is_zero_where_the_logged_action_is_the_only_one():
    q = torch.tensor([[0.3, -1.2]], requires_grad=True)
    loss = cql_penalty(q, torch.tensor([0, 1]), q)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert q.grad is not None
    assert q.grad.abs().max() < 1e-7


def test_the_penalty_pushes_the_logged_action_up_and_the_others_down_by_their_softmax():
    q = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    cql_penalty(q, torch.zeros(3, dtype=torch.long), q[:, :1]).backward()
    share = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64).softmax(0)
    assert q.grad is not None
    assert torch.allclose(q.grad[0], share - torch.tensor([1.0, 0.0, 0.0]))


def test_huge_values_do_not_overflow():
    q = torch.tensor([[1000.0, 1000.0, -1000.0]], requires_grad=True)
    out = candidate_logsumexp(q, torch.tensor([0, 0, 1]), 3)
    assert out[0].tolist() == pytest.approx([1000 + math.log(2), -1000.0, 0.0])
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.tolist() == [[0.5, 0.5, 1.0]]


def test_shapes_that_disagree_are_told():
    with pytest.raises(ValueError, match="owners for candidates"):
        candidate_max(torch.zeros(3), torch.zeros(2, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="ensemble of 2"):
        cql_penalty(torch.zeros(1, 3), torch.zeros(3, dtype=torch.long), torch.zeros(2, 1))


@settings(max_examples=3 * settings().max_examples, deadline=None)
@given(
    st.lists(st.lists(st.floats(-50, 50), max_size=5), min_size=1, max_size=6),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_against_loops(states, k, random):
    owner = [s for s, own in enumerate(states) for _ in own]
    order = list(range(len(owner)))
    random.shuffle(order)
    flat = [x for own in states for x in own]
    q = torch.tensor([[flat[i] * (m + 1) / k for i in order] for m in range(k)], dtype=torch.float32).reshape(k, -1)
    at = torch.tensor([owner[i] for i in order], dtype=torch.long)
    best, total = candidate_max(q[0], at, len(states)), candidate_logsumexp(q, at, len(states))
    for s, own in enumerate(states):
        mine = q.double()[:, at == s]
        if not own:
            assert best[s].isnan()
            assert total[:, s].tolist() == [0.0] * k
        else:
            assert best[s].item() == mine[0].max().item()
            assert total[:, s].tolist() == pytest.approx(mine.logsumexp(1).tolist(), rel=1e-6, abs=1e-5)


def test_a_weighted_mean():
    x = torch.tensor([[1.0, math.nan, 4.0], [2.0, 5.0, 6.0]])
    mask, weight = torch.tensor([True, False, True]), torch.tensor([3.0, math.nan, 1.0])
    assert masked_mean(x, mask, weight).item() == pytest.approx((3 * 3 + 1 * 10) / 4)
    assert masked_mean(x, mask, torch.ones(3)).item() == masked_mean(x, mask).item()
    assert masked_mean(x, torch.zeros(3, dtype=torch.bool), weight).item() == 0.0
    with pytest.raises(ValueError, match="weights of shape"):
        masked_mean(x, mask, torch.ones(2))


def test_the_maximum_carries_no_gradient_and_a_state_without_candidates_no_nan():
    q, owner = torch.tensor([[1.0, 3.0]], requires_grad=True), torch.tensor([1, 1])
    assert not candidate_max(q[0], owner, 2).requires_grad
    with torch.autograd.set_detect_anomaly(True):  # a NaN on the way back is an error, though none arrives at q
        candidate_logsumexp(q, owner, 2).sum().backward()
    assert q.grad is not None
    assert q.grad[0].tolist() == pytest.approx(torch.tensor([1.0, 3.0]).softmax(0).tolist())
    with pytest.raises(ValueError, match="owners for candidates"):
        candidate_logsumexp(q, owner[:1], 2)


def test_the_penalty_of_masked_and_weighted_steps():
    """Step 0 has two equal candidates: log 2; step 1 has the logged one alone: 0."""
    q, owner, logged = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([0, 0, 1]), torch.tensor([[0.0, 1.0]])
    assert cql_penalty(q, owner, logged).item() == pytest.approx(math.log(2) / 2)
    assert cql_penalty(q, owner, logged, torch.tensor([True, False])).item() == pytest.approx(math.log(2))
    weighted = cql_penalty(q, owner, logged, None, torch.tensor([3.0, 1.0]))
    assert weighted.item() == pytest.approx(0.75 * math.log(2))
