"""Conservative Q-learning over candidates: IQL or Q-learning, with actions that were not logged pushed down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from offline_lm.algos.checks import check_at_least_0, check_rate, check_share
from offline_lm.algos.iql_lm import IQL
from offline_lm.algos.q_learning import QLearning
from offline_lm.losses.conservative import cql_penalty
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class CQL:
    """The losses of `base`, plus alpha (log sum_{a in C(s)} exp Q_i(s, a) - Q_i(s, a_t)) (Kumar et al. 2020, eq. 4).

    C: the logged action and the candidates; logs without candidates make the penalty 0.

    Args:
        base: iql or q_learning.
        alpha: weight of the penalty.
        gamma: discount per turn.
        tau: expectile of V, of base=iql.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel.
    """

    base: Literal["iql", "q_learning"]
    alpha: float
    gamma: float
    tau: float
    polyak: float | None

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.base not in ("iql", "q_learning"):
            raise ValueError(f"base={self.base}: iql or q_learning is wanted")
        check_at_least_0("alpha", self.alpha)
        check_share("gamma", self.gamma)
        check_share("tau", self.tau, ends=False)
        check_rate("polyak", self.polyak)

    @property
    def estimand(self) -> Estimand:
        return IQL.estimand if self.base == "iql" else QLearning.estimand

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        iql, q_learning = IQL(self.gamma, self.tau, self.polyak), QLearning(self.gamma, self.polyak)
        losses = (iql if self.base == "iql" else q_learning).loss(critic, target, batch)
        logged, candidates = critic.q_values(batch.actions), critic.q_values(batch.candidates)
        penalty = cql_penalty(candidates, batch.candidate_of, logged, batch.acted, batch.weight)
        return losses | {"cql": self.alpha * penalty}
