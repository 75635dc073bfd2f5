"""Regression of Q on Monte Carlo returns: the baseline to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offline_lm.algos.checks import check_rate, check_share
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class QMC:
    """Q_i: (Q_i(s_t, a_t) - G_t)², and V: (V(s_t) - G_t)² on the same returns, so that advantages can be read.

    Args:
        gamma: discount per turn.
        polyak: not used by the loss; kept so that the target's values follow and can be monitored.
    """

    gamma: float
    polyak: float | None

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = False
    estimand: ClassVar[Estimand] = "returns"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_rate("polyak", self.polyak)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        known = batch.acted & batch.return_mask
        return {
            "v": critic.v.regress(critic.v(batch.states), batch.returns, known, batch.weight),
            "q": critic.q.regress(critic.q(batch.actions), batch.returns, known, batch.weight),
        }
