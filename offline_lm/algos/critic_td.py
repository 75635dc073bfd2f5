"""A value function alone, bootstrapped: TD(lambda), or n steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offline_lm.algos.checks import check_count, check_rate, check_share
from offline_lm.losses.returns import lambda_returns, n_step_returns, next_values
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand


@dataclass(frozen=True)
class CriticTD:
    """V: (V(s_t) - G_t)² with the lambda-return of V̄ (Sutton & Barto 2018, eq. 12.18) or its n-step return (eq. 7.1).

    Q stays untrained. Where a reward or what follows is unknown, at a cut episode's end above all, returns of the steps
    before end in V̄ there.

    Args:
        gamma: discount per turn.
        lam: 0 is the one-step target, 1 Monte Carlo.
        n_step: rewards before V̄, in place of `lam`; None: `lam` holds.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel.
    """

    gamma: float
    lam: float
    n_step: int | None
    polyak: float | None

    trains_q: ClassVar[bool] = False
    needs_candidates: ClassVar[bool] = False
    estimand: ClassVar[Estimand] = "behaviour"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("lam", self.lam)
        check_rate("polyak", self.polyak)
        if self.n_step is not None:
            check_count("n_step", self.n_step)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        known = batch.acted & batch.bootstrap_mask
        with torch.no_grad():
            v = target.values(batch.target_states)
            # a step without a target of its own hands its V̄ to the one before, and ends the recurrence
            reward, continues = batch.reward.where(known, v), batch.continues.where(known, 0.0)
            following = next_values(v, batch.offsets)
            if self.n_step is None:
                y = lambda_returns(reward, continues, following, batch.offsets, gamma=self.gamma, lam=self.lam)
            else:
                y = n_step_returns(reward, continues, following, batch.offsets, gamma=self.gamma, steps=self.n_step)
        return {"v": critic.v.regress(critic.v(batch.states), y, known, batch.weight)}
