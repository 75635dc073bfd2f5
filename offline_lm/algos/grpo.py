"""GRPO and what followed it: an episode against the other runs of its task, without a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from offline_lm.algos.checks import check_at_least_0, check_one_of, check_share
from offline_lm.losses.clipping import gspo_clip, ppo_clip
from offline_lm.losses.groups import group_advantages
from offline_lm.losses.policy import Aggregate, kl_k3
from offline_lm.types import Logged, Responses

_AGGREGATES: dict[str, Aggregate] = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token", "gspo": "sequence"}


@dataclass(frozen=True)
class GRPO:
    """A = (R - mean) / std over the logged runs of a task, on every token of every turn; then the clipped surrogate.

    Groups are of logged runs, whatever policies made them. A group of one, or in which all runs came to the same,
    has advantage 0; how many did is the metric `silent_groups`.

    Args:
        gamma: discount per turn, of the returns in the report; the outcome has none.
        variant: grpo (Shao et al. 2024, eq. 3), the mean of tokens, then of responses; dr_grpo (Liu et al. 2025), not
            divided by the standard deviation, nor by a response's length; dapo (Yu et al. 2025, eq. 8), the mean of all
            tokens, usually with `clip_high` above `clip_low`; gspo (Zheng et al. 2025, eq. 5), ratios of responses.
        clip_low, clip_high: how far a ratio may go below and above 1.
        kl: weight of the divergence from the policy as this loss begins, behind `actor.clone_first`.
    """

    gamma: float
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo"]
    clip_low: float
    clip_high: float
    kl: float

    critic: ClassVar[None] = None
    needs: ClassVar[Literal["nothing"]] = "nothing"
    candidates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("clip_low", self.clip_low)
        check_at_least_0("clip_high", self.clip_high)
        check_at_least_0("kl", self.kl)
        check_one_of("variant", self.variant, list(_AGGREGATES))

    @property
    def ratios(self) -> Literal["token", "response"]:
        return "response" if self.variant == "gspo" else "token"

    @property
    def aggregate(self) -> Aggregate:
        return _AGGREGATES[self.variant]

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        known = ~logged.outcome.isnan()
        of_episode = torch.full_like(logged.outcome, torch.nan)
        of_episode[known], silent = group_advantages(
            logged.outcome[known], logged.task[known], divide_by_std=self.variant != "dr_grpo"
        )
        of_step = of_episode.repeat_interleave(logged.offsets.diff())
        return of_step, {"silent_groups": silent / max(len(logged.task[known].unique()), 1)}

    def loss(self, batch: Responses) -> dict[str, Tensor]:
        clipped = gspo_clip if self.variant == "gspo" else ppo_clip
        parts = {
            "actor": clipped(
                batch.logprobs, batch.old, batch.advantages, batch.owner, batch.weight,
                low=self.clip_low, high=self.clip_high,
            )
        }  # fmt: skip
        return parts | ({"kl": self.kl * kl_k3(batch.logprobs, batch.reference, batch.weight)} if self.kl else {})
