"""The critic of Digi-Q: one-step TD for Q and V of the behaviour on features of a represented, frozen backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offline_lm.algos.checks import check_rate, check_share
from offline_lm.algos.iql_lm import targets
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class DigiQ:
    """Q_i: (Q_i(s, a) - r - gamma * continue * V̄(s'))²; V: (V(s) - min_i Q̄_i(s, a))² (Bai et al. 2025, eq. 3.2-3.3).

    V follows Q of the logged action, so that both are the behaviour's, where Digi-Q samples an action of its actor.
    What it trains on is what makes it Digi-Q: `model.stage` and `model.train=heads`, our defaults.

    Args:
        gamma: discount per turn.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel.
    """

    gamma: float
    polyak: float | None

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = False
    estimand: ClassVar[Estimand] = "behaviour"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_rate("polyak", self.polyak)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        q_bar, y, known = targets(target, batch, self.gamma)
        return {
            "v": critic.v.regress(critic.v(batch.states), q_bar, known, batch.weight),
            "q": critic.q.regress(critic.q(batch.actions), y, known, batch.weight),
        }
