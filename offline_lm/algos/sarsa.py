"""SARSA: Q of the behaviour, bootstrapped from the next logged action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offline_lm.algos.checks import check_count, check_rate, check_share
from offline_lm.losses.returns import n_step_returns, next_values
from offline_lm.losses.td import ensemble_min
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class Sarsa:
    """Q_i: (Q_i(s_t, a_t) - r_t - gamma * continue_t * min Q̄(s_{t+1}, a_{t+1}))² (Sutton & Barto 2018, eq. 6.7).

    V: (V(s_t) - min Q̄(s_t, a_t))², the behaviour's value, so that advantages can be read. A step that leads on to one
    without a logged action (a final observation) has no target.

    Args:
        gamma: discount per turn.
        n_step: rewards before Q̄ (eq. 7.4); where fewer steps are logged, as many as there are.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel.
    """

    gamma: float
    n_step: int
    polyak: float | None

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = False
    estimand: ClassVar[Estimand] = "behaviour"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_rate("polyak", self.polyak)
        check_count("n_step", self.n_step)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            q_bar = ensemble_min(target.q_values(batch.target_actions))
            follows = next_values(batch.acted.float(), batch.offsets) > 0
            known = batch.acted & batch.bootstrap_mask & (follows | (batch.continues == 0))
            # a step without a target of its own hands its Q̄ to the one before, and ends the recurrence
            reward, continues = batch.reward.where(known, q_bar), batch.continues.where(known, 0.0)
            following = next_values(q_bar, batch.offsets)
            y = n_step_returns(reward, continues, following, batch.offsets, gamma=self.gamma, steps=self.n_step)
        return {
            "v": critic.v.regress(critic.v(batch.states), q_bar, batch.acted, batch.weight),
            "q": critic.q.regress(critic.q(batch.actions), y, known, batch.weight),
        }
