"""The actor of Digi-Q: clone the best known action of a state, where it is better than the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from offline_lm.algos.checks import check_at_least_0, check_one_of, check_share
from offline_lm.losses.policy import Aggregate, policy_gradient
from offline_lm.types import Logged, Responses


@dataclass(frozen=True)
class BestOfN:
    """-log pi(a*|s), a* = argmax of Q over the known actions of s, where Q(s, a*) - V(s) > delta (Bai et al. 2025).

    Known are the logged action and its candidates; Digi-Q samples them from its actor.

    Args:
        gamma: discount per turn; that of the critic.
        critic: what Q and V come from.
        delta: by how much the best action must exceed V.
        aggregate: of a response's tokens.
    """

    gamma: float
    critic: Any
    delta: float
    aggregate: Aggregate

    needs: ClassVar[Literal["q"]] = "q"
    candidates: ClassVar[bool] = True
    ratios: ClassVar[Literal["none"]] = "none"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_one_of("aggregate", self.aggregate, get_args(Aggregate))
        check_at_least_0("delta", self.delta)

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        best = torch.full_like(logged.v, -torch.inf)
        best.scatter_reduce_(0, logged.response_of, logged.response_q, "amax")
        better = best - logged.v > self.delta
        chosen = better[logged.response_of] & (logged.response_q == best[logged.response_of])
        counted = {"states_cloned": better[logged.acted].double().mean().item()}
        return torch.where(chosen, 1.0, torch.nan).double(), counted

    def loss(self, batch: Responses) -> dict[str, Tensor]:
        return {"actor": policy_gradient(batch.logprobs, batch.advantages, batch.owner, batch.weight)}
