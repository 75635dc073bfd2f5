"""GRPO with a second comparison: of what was done on the same page by several runs of a task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offline_lm.algos.checks import check_at_least_0
from offline_lm.algos.grpo import GRPO, outcome_advantages
from offline_lm.losses.groups import group_advantages
from offline_lm.types import Logged


@dataclass(frozen=True)
class GiGPO(GRPO):
    """A = A_episode + omega * A_step (Feng et al. 2025, eq. 8).

    A_step compares returns G_t from the same page of the same task, in whatever run and turn it was seen (eq. 6-7). A
    page that one turn alone saw, or from which all came to the same, adds 0.

    Args:
        omega: weight of the comparison of steps.
    """

    omega: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_0("omega", self.omega)

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        divide = self.variant != "dr_grpo"
        of_episode, silent = outcome_advantages(logged, divide_by_std=divide)
        known = logged.acted & ~logged.returns.isnan()
        of_step = torch.full_like(logged.returns, torch.nan)
        of_step[known], silent_pages = group_advantages(logged.returns[known], logged.page[known], divide_by_std=divide)
        counted = {
            "silent_groups": silent / len(logged.task.unique()),
            "silent_pages": silent_pages / max(len(logged.page[known].unique()), 1),
        }
        return of_episode.repeat_interleave(logged.offsets.diff()) + self.omega * of_step, counted
