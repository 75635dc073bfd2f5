"""Reductions over the candidate actions of each state, which stand end to end: state `owner[c]` has candidate c."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def candidate_max(q: Float[Tensor, " m"], owner: Int[Tensor, " m"], n: int) -> Float[Tensor, " n"]:
    """``max_{a in C(s)} Q(s, a)`` of each of n states, without gradient; NaN for a state without candidates.

    Raises:
        ValueError: not one owner a candidate.
    """
    _check(q, owner)
    best = q.new_full((n,), -torch.inf).scatter_reduce(0, owner, q.detach(), "amax")
    return best.masked_fill(best == -torch.inf, torch.nan)


def candidate_logsumexp(q: Float[Tensor, "k m"], owner: Int[Tensor, " m"], n: int) -> Float[Tensor, "k n"]:
    """``log sum_{a in C(s)} exp Q(s, a)`` of each of n states and members; 0, without gradient, where none is.

    The largest is taken out first, so that no exponential overflows.

    Raises:
        ValueError: not one owner a candidate.
    """
    _check(q, owner)
    owners = owner.expand_as(q)
    top = q.new_full((len(q), n), -torch.inf).scatter_reduce(1, owners, q.detach(), "amax")
    has = top > -torch.inf
    top = top.where(has, 0.0)
    mass = torch.zeros_like(top).scatter_add(1, owners, (q - top.gather(1, owners)).exp())
    return torch.where(has, mass.where(has, 1.0).log() + top, 0.0)


def _check(q: Tensor, owner: Tensor) -> None:
    if owner.shape != q.shape[-1:]:
        raise ValueError(f"{tuple(owner.shape)} owners for candidates of shape {tuple(q.shape)}")
