"""A value function alone, from Monte Carlo returns: the critic of ArCHer PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offline_lm.algos.checks import check_rate, check_share
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class CriticMC:
    """V: ½ (V(s_t) - G_t)². Q stays untrained, and is null in the store.

    Args:
        gamma: discount per turn.
        polyak: as for `q_mc`.
    """

    gamma: float
    polyak: float | None

    trains_q: ClassVar[bool] = False
    needs_candidates: ClassVar[bool] = False
    estimand: ClassVar[Estimand] = "returns"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_rate("polyak", self.polyak)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        known = batch.acted & batch.return_mask
        return {"v": 0.5 * critic.v.regress(critic.v(batch.states), batch.returns, known, batch.weight)}
