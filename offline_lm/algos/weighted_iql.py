"""Implicit Q-learning in which steps that soon led to success count more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offline_lm.algos.checks import check_at_least_0, check_rate, check_share
from offline_lm.algos.iql_lm import targets
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class WeightedIQL:
    """The losses of `iql_lm`, each step weighted by 1 + weight * max(G_t, 0), and by 1 where its return is unknown.

    With one reward at the end G_t = gamma^(T-1-t) R, so that successful steps near the end weigh most: what Q-Evolve
    (arXiv 2606.07367) finds to steady bootstrapping from sparse rewards. The form of the weight is ours.
    Where no return is positive it is `iql_lm`; where the world is left to chance it favours lucky outcomes.

    Args:
        gamma: discount per turn.
        tau: expectile.
        weight: 0 is `iql_lm`.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel.
    """

    gamma: float
    tau: float
    weight: float
    polyak: float | None

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = False
    estimand: ClassVar[Estimand] = "expectile"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("tau", self.tau, ends=False)
        check_at_least_0("weight", self.weight)
        check_rate("polyak", self.polyak)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        q_bar, y, known = targets(target, batch, self.gamma)
        weight = 1 + self.weight * batch.returns.where(batch.return_mask, 0.0).clamp_min(0)
        weight = weight if batch.weight is None else weight * batch.weight
        return {
            "v": critic.v.expectile(critic.v(batch.states), q_bar, self.tau, known, weight),
            "q": critic.q.regress(critic.q(batch.actions), y, known, weight),
        }
