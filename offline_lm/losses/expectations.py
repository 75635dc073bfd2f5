"""Expectations under a policy over the actions that are known at each state: state `owner[a]` has action a.

The known actions of a state stand for all that the policy could do there, in one of two ways. Either they are all, and
the expectation is a sum over them; or they were drawn of a proposal, and it is estimated by importance sampling, with
weights that sum to 1 at each state (Owen 2013, "Monte Carlo theory, methods and examples", section 9.2). Both are a
softmax of ``log pi(a|s) + proposal[a]``: ``proposal`` is 0 where the actions are all, and else the log of how often an
action was drawn minus its log-probability then. -inf leaves an action out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def candidate_softmax(scores: Float[Tensor, " m"], owner: Int[Tensor, " m"], n: int) -> Float[Tensor, " m"]:
    """The probability of each action among those of its state, from its log-probability up to a constant of the state.

    With gradient. A score of -inf is probability 0, also where a state has no other.

    Raises:
        ValueError: not one owner an action.
    """
    _check(scores, owner)
    top = scores.new_full((n,), -torch.inf).scatter_reduce(0, owner, scores.detach(), "amax")
    top = top.where(top > -torch.inf, 0.0)
    mass = (scores - top[owner]).exp()
    total = torch.zeros_like(top).index_add(0, owner, mass)
    return mass / total.where(total > 0, 1.0)[owner]


def candidate_mean(
    q: Float[Tensor, " m"], probability: Float[Tensor, " m"], owner: Int[Tensor, " m"], n: int
) -> Float[Tensor, " n"]:
    """``E_{a ~ pi(.|s)} Q(s, a)`` of each of n states, without gradient; NaN for one whose actions all weigh 0.

    What V follows in ArCHer (Zhou et al. 2024, arXiv 2402.19446), an expectation in place of a sample. What weighs 0
    may have any Q, NaN too.

    Raises:
        ValueError: not one owner, or not one probability, an action.
    """
    _check(q, owner)
    _check(probability, owner)
    total = q.new_zeros(n).index_add(0, owner, probability.to(q.dtype))
    weighted = (probability * q.detach()).where(probability > 0, 0.0).to(q.dtype)
    mean = q.new_zeros(n).index_add(0, owner, weighted) / total
    return mean.masked_fill(total <= 0, torch.nan)


def expected_advantage(
    logprobs: Float[Tensor, " m"],
    advantages: Float[Tensor, " m"],
    owner: Int[Tensor, " m"],
    n: int,
    *,
    proposal: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, " n"]:
    """``E_{a ~ pi(.|s)} A(s, a)`` of each of n states, with gradient into pi and none into A.

    The gradient is that of the score function, ``sum_a pi(a|s) A(s, a) grad log pi(a|s)``, of all actions at once: the
    policy gradient of ArCHer without the noise of drawing one. Since probabilities sum to 1,
    a constant of the state, V(s), shifts its value alone.

    Args:
        logprobs: log pi(a|s), the sum over an action's tokens, up to a constant of the state.
        proposal: see above; none given: the actions of a state are all.

    Raises:
        ValueError: shapes disagree.
    """
    _check(advantages, owner)
    probability = candidate_softmax(logprobs if proposal is None else logprobs + proposal, owner, n)
    return probability.new_zeros(n).index_add(0, owner, probability * advantages.detach())


def _check(x: Tensor, owner: Tensor) -> None:
    if x.dim() != 1 or owner.shape != x.shape:
        raise ValueError(f"{tuple(owner.shape)} owners for actions of shape {tuple(x.shape)}")
