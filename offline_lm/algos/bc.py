"""Behaviour cloning: the log-likelihood of what was logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from offline_lm.algos.checks import check_one_of, check_share
from offline_lm.losses.policy import Aggregate, policy_gradient
from offline_lm.types import Logged, Responses


@dataclass(frozen=True)
class BC:
    """-log pi(a|s) of every logged response, good or bad: the baseline of all actors.

    Args:
        gamma: discount per turn, of the returns in the report; the loss has none.
        aggregate: of a response's tokens (`losses.policy.token_weights`).
    """

    gamma: float
    aggregate: Aggregate

    critic: ClassVar[None] = None
    needs: ClassVar[Literal["nothing"]] = "nothing"
    candidates: ClassVar[bool] = False
    ratios: ClassVar[Literal["none"]] = "none"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_one_of("aggregate", self.aggregate, get_args(Aggregate))

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        return torch.ones_like(logged.reward), {}

    def loss(self, batch: Responses) -> dict[str, Tensor]:
        return {"actor": policy_gradient(batch.logprobs, batch.advantages, batch.owner, batch.weight)}
