"""PPO with advantages of turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from offline_lm.algos.checks import check_at_least_0, check_one_of, check_share
from offline_lm.losses.clipping import ppo_clip
from offline_lm.losses.policy import Aggregate, kl_k3
from offline_lm.losses.returns import next_values, reverse_scan, td_residuals
from offline_lm.types import Logged, Responses


@dataclass(frozen=True)
class PPO:
    """The clipped surrogate (Schulman et al. 2017, eq. 7) on GAE over turns (Schulman et al. 2015, eq. 16).

    A turn's advantage is that of each of its tokens: lambda decays from turn to turn, never from token to token, and
    never over what the page said (trap 13). Ratios are to the policy of `actor.behaviour`.

    Args:
        gamma: discount per turn; that of the critic.
        critic: what V comes from; it is trained to its end before the actor begins.
        lam: lambda; 0 the one-step advantage, 1 Monte Carlo minus V.
        clip_low, clip_high: how far a token's ratio may go below and above 1.
        kl: weight of the divergence from the policy as this loss begins, behind `actor.clone_first`.
        normalize: divide advantages by their standard deviation over the logs, after taking off their mean.
        aggregate: of a response's tokens.
    """

    gamma: float
    critic: Any
    lam: float
    clip_low: float
    clip_high: float
    kl: float
    normalize: bool
    aggregate: Aggregate

    needs: ClassVar[Literal["v"]] = "v"
    candidates: ClassVar[bool] = False
    ratios: ClassVar[Literal["token"]] = "token"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_one_of("aggregate", self.aggregate, get_args(Aggregate))
        check_share("lam", self.lam)
        check_share("clip_low", self.clip_low)
        check_at_least_0("clip_high", self.clip_high)
        check_at_least_0("kl", self.kl)

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        advantage = turn_gae(logged, self.gamma, self.lam)
        return (standardized(advantage, logged.acted) if self.normalize else advantage), {}

    def loss(self, batch: Responses) -> dict[str, Tensor]:
        parts = {
            "actor": ppo_clip(
                batch.logprobs, batch.old, batch.advantages, batch.owner, batch.weight,
                low=self.clip_low, high=self.clip_high,
            )
        }  # fmt: skip
        return parts | ({"kl": self.kl * kl_k3(batch.logprobs, batch.reference, batch.weight)} if self.kl else {})


def turn_gae(logged: Logged, gamma: float, lam: float) -> Tensor:
    """GAE of each logged turn, float64 [n]; NaN where no one-step target exists.

    There, as where an episode was cut off and what it came to was not logged, the sum of the turns before ends: they
    take V's word for the rest.
    """
    following = next_values(logged.v, logged.offsets)
    delta = td_residuals(logged.reward, logged.continues, logged.v, following, gamma=gamma)
    known = logged.bootstrap_mask & ~delta.isnan()
    carried = gamma * lam * logged.continues * known
    return reverse_scan(carried, delta.where(known, 0.0), logged.offsets).where(known, torch.nan)


def standardized(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with mean 0 and standard deviation 1 over what is known of it where `mask` holds."""
    known = x[mask & ~x.isnan()]
    return (x - known.mean()) / known.std(correction=0).clamp(min=1e-8)
