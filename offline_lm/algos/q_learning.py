"""Q-learning over the actions that are known at a state: the logged one and its candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offline_lm.algos.checks import check_rate, check_share
from offline_lm.losses.candidates import candidate_max
from offline_lm.losses.returns import next_values
from offline_lm.losses.td import ensemble_min, td_target
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class QLearning:
    """Q_i: (Q_i(s_t, a_t) - r_t - gamma * continue_t * max_{a in C(s_{t+1})} min_i Q̄_i(s_{t+1}, a))² (Watkins 1989).

    V: (V(s_t) - max_{a in C(s_t)} min_i Q̄_i(s_t, a))², so that advantages can be read. C: the logged action and the
    candidates. A step that leads on to a state of which no action is known has no target.

    Args:
        gamma: discount per turn.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel.
    """

    gamma: float
    polyak: float | None

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = True
    estimand: ClassVar[Estimand] = "optimum"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_rate("polyak", self.polyak)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            best = candidate_max(
                ensemble_min(target.q_values(batch.target_candidates)), batch.candidate_of, len(batch.reward)
            )
            y = td_target(batch.reward, batch.continues, next_values(best, batch.offsets), gamma=self.gamma)
        known = batch.acted & batch.bootstrap_mask & ~y.isnan()
        return {
            "v": critic.v.regress(critic.v(batch.states), best, batch.acted, batch.weight),
            "q": critic.q.regress(critic.q(batch.actions), y, known, batch.weight),
        }
