"""Implicit Q-learning at the level of turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offline_lm.algos.checks import check_rate, check_share
from offline_lm.losses.returns import next_values
from offline_lm.losses.td import ensemble_min, td_target
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class IQL:
    """Kostrikov et al. 2021: V is an expectile of Q over logged actions, Q bootstraps from V; no action is invented.

    V: L2^tau(min_i Q̄_i(s, a) - V(s)) (eq. 5). Q_i: (Q_i(s, a) - r - gamma * continue * V̄(s'))² (eq. 6).

    Args:
        gamma: discount per turn.
        tau: expectile; 0.5 is the behaviour's value, towards 1 the best logged action's.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel.
    """

    gamma: float
    tau: float
    polyak: float | None

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = False
    estimand: ClassVar[Estimand] = "expectile"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("tau", self.tau, ends=False)
        check_rate("polyak", self.polyak)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        q_bar, y, known = targets(target, batch, self.gamma)
        return {
            "v": critic.v.expectile(critic.v(batch.states), q_bar, self.tau, known, batch.weight),
            "q": critic.q.regress(critic.q(batch.actions), y, known, batch.weight),
        }


@torch.no_grad()
def targets(target: Heads, batch: Batch, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """What V and Q follow, min_i Q̄_i(s, a) and r + gamma * continue * V̄(s'), and where they are known; each [n]."""
    q_bar = ensemble_min(target.q_values(batch.target_actions))
    v_next = next_values(target.values(batch.target_states), batch.offsets)
    y = td_target(batch.reward, batch.continues, v_next, gamma=gamma)
    return q_bar, y, batch.acted & batch.bootstrap_mask
