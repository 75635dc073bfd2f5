"""Behaviour cloning of the best episodes of each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from offline_lm.algos.checks import check_one_of, check_share
from offline_lm.losses.policy import Aggregate, policy_gradient
from offline_lm.types import Logged, Responses


@dataclass(frozen=True)
class FilteredBC:
    """-log pi(a|s) over episodes in the top share of return within their task (DESIGN section 5).

    Where all runs of a task went wrong the best of them is still wrong: the outcome of an episode must also be no less
    than the mean of all logs.

    Args:
        gamma: discount per turn: of two successes the shorter one is the better.
        top: share of a task's episodes that is cloned; ties with the last of them are.
        aggregate: of a response's tokens (`losses.policy.token_weights`).
    """

    gamma: float
    top: float
    aggregate: Aggregate

    critic: ClassVar[None] = None
    needs: ClassVar[Literal["nothing"]] = "nothing"
    candidates: ClassVar[bool] = False
    ratios: ClassVar[Literal["none"]] = "none"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_one_of("aggregate", self.aggregate, get_args(Aggregate))
        check_share("top", self.top)

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        first, outcome = logged.returns[logged.offsets[:-1]], logged.outcome
        mean = outcome.nanmean()
        kept = outcome >= mean - 1e-9 * mean.abs()  # a mean of equal outcomes may be rounded up
        for task in logged.task.unique():
            own = logged.task == task
            kept[own] &= first[own] >= first[own].nanquantile(1 - self.top, interpolation="higher")
        rows = kept.repeat_interleave(logged.offsets.diff())
        return torch.where(rows, 1.0, torch.nan).double(), {
            "episodes_kept": (kept.sum() / (~first.isnan()).sum()).item()
        }

    def loss(self, batch: Responses) -> dict[str, Tensor]:
        return {"actor": policy_gradient(batch.logprobs, batch.advantages, batch.owner, batch.weight)}
