"""GRPO with a second comparison: of what was done on the same page by several runs of a task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offline_lm.algos.checks import check_at_least_0
from offline_lm.algos.grpo import GRPO
from offline_lm.losses.groups import gigpo_advantages
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
        known_run = ~logged.outcome.isnan()
        episode = torch.arange(len(known_run)).repeat_interleave(logged.offsets.diff())
        known = logged.acted & ~logged.returns.isnan() & known_run[episode]
        numbered = (known_run.cumsum(0) - 1)[episode[known]]
        found = torch.full_like(logged.returns, torch.nan)
        found[known], silent, silent_pages = gigpo_advantages(
            logged.outcome[known_run], logged.task[known_run], logged.returns[known], logged.page[known], numbered,
            omega=self.omega, divide_by_std=self.variant != "dr_grpo",
        )  # fmt: skip
        return found, {
            "silent_groups": silent / max(len(logged.task[known_run].unique()), 1),
            "silent_pages": silent_pages / max(len(logged.page[known].unique()), 1),
        }
