"""REINFORCE from replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from offline_lm.algos.checks import check_one_of, check_share
from offline_lm.losses.policy import Aggregate, policy_gradient
from offline_lm.types import Logged, Responses


@dataclass(frozen=True)
class Reinforce:
    """-log pi(a|s) (G_t - b) (Williams 1992; with b = V: Sutton & Barto, section 13.4).

    The logs' states and responses stand for the policy's own, which holds near the policy that made them. What pulls
    down the likelihood of bad responses has no bound here; `ppo` bounds it.

    Args:
        gamma: discount per turn.
        baseline: none, mean (of G over the logs), or v.
        critic: what V comes from, of baseline=v.
        aggregate: of a response's tokens; "sum" is the gradient of the response's log-probability.
    """

    gamma: float
    baseline: Literal["none", "mean", "v"]
    critic: Any
    aggregate: Aggregate

    candidates: ClassVar[bool] = False
    ratios: ClassVar[Literal["none"]] = "none"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_one_of("aggregate", self.aggregate, get_args(Aggregate))
        check_one_of("baseline", self.baseline, ("none", "mean", "v"))

    @property
    def needs(self) -> Literal["nothing", "v"]:
        return "v" if self.baseline == "v" else "nothing"

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        if self.baseline == "none":
            return logged.returns, {}
        return logged.returns - (logged.v if self.baseline == "v" else logged.returns[logged.acted].nanmean()), {}

    def loss(self, batch: Responses) -> dict[str, Tensor]:
        return {"actor": policy_gradient(batch.logprobs, batch.advantages, batch.owner, batch.weight)}
