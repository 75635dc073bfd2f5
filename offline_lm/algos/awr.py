"""Advantage-weighted regression on a critic's advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from offline_lm.algos.checks import check_above_0, check_one_of, check_share
from offline_lm.algos.ppo import standardized
from offline_lm.losses.policy import Aggregate, awr_weights, policy_gradient
from offline_lm.types import Logged, Responses


@dataclass(frozen=True)
class AWR:
    """-min(exp(A / beta), w_max) log pi(a|s), A = min_i Q_i(s, a) - V(s) (Peng et al. 2019; Nair et al. 2020, eq. 13).

    Args:
        gamma: discount per turn; that of the critic.
        critic: what A comes from.
        beta: temperature, in standard deviations of A over the logs, so that it does not hang on the size of rewards.
            Their mean is taken off first, which weighs all alike, and keeps a critic's bias out of `w_max`.
        w_max: the greatest weight.
        aggregate: of a response's tokens; "sequence", their mean, so that long responses do not outweigh short ones.
    """

    gamma: float
    critic: Any
    beta: float
    w_max: float
    aggregate: Aggregate

    needs: ClassVar[Literal["q"]] = "q"
    candidates: ClassVar[bool] = False
    ratios: ClassVar[Literal["none"]] = "none"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_one_of("aggregate", self.aggregate, get_args(Aggregate))
        check_above_0("beta", self.beta)
        check_above_0("w_max", self.w_max)

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        advantage = standardized(logged.q - logged.v, logged.acted)
        weights, clipped = awr_weights(advantage, beta=self.beta, w_max=self.w_max)
        return weights, {"weights_clipped": float(clipped)}

    def loss(self, batch: Responses) -> dict[str, Tensor]:
        return {"actor": policy_gradient(batch.logprobs, batch.advantages, batch.owner, batch.weight)}
