"""ArCHer: a critic of the actor's own values, off-policy from replay, and an actor that climbs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from offline_lm.algos.checks import check_count, check_rate, check_share
from offline_lm.losses.expectations import candidate_mean, expected_advantage
from offline_lm.losses.policy import sequence_logprob
from offline_lm.losses.returns import next_values
from offline_lm.losses.td import ensemble_min, td_target
from offline_lm.models.heads import Heads
from offline_lm.types import Batch, Estimand, Logged, Responses


@dataclass(frozen=True)
class ArcherCritic:
    """Q_i: (Q_i(s, a) - r - gamma * continue * V̄(s'))²; V: (V(s) - E_{a~pi} min_i Q̄_i(s, a))² (Zhou et al. 2024).

    a is the logged action, and pi the actor, which need not have logged anything: `Batch.candidate_weight` is pi of
    the actions known at a state. The paper draws one action; the expectation over them has the same mean.

    Args:
        gamma: discount per turn.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel.
    """

    gamma: float
    polyak: float | None

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = True
    estimand: ClassVar[Estimand] = "actor"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_rate("polyak", self.polyak)

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        if batch.candidate_weight is None:
            raise ValueError("the critic of an actor wants the actor's probabilities of the candidates")
        with torch.no_grad():
            q_bar = ensemble_min(target.q_values(batch.target_candidates))
            of_actor = candidate_mean(q_bar, batch.candidate_weight, batch.candidate_of, len(batch.reward))
            v_next = next_values(target.values(batch.target_states), batch.offsets)
            y = td_target(batch.reward, batch.continues, v_next, gamma=self.gamma)
        return {
            "v": critic.v.regress(critic.v(batch.states), of_actor, ~of_actor.isnan(), batch.weight),
            "q": critic.q.regress(critic.q(batch.actions), y, batch.acted & batch.bootstrap_mask, batch.weight),
        }


@dataclass(frozen=True)
class Archer:
    """-E_{a~pi} (min_i Q_i(s, a) - V(s)) at the logged states, in turn with `ArcherCritic` (Zhou et al. 2024).

    The gradient is that of -log pi(a|s) (min Q - V) with a~pi, A held fixed. Where the candidates of a state are
    complete, pi is taken among them, and the expectation over them is exact; V then changes nothing. Else `samples`
    responses are drawn of the actor as each round begins, and importance weights that sum to 1 follow it from there.

    Args:
        gamma: discount per turn; that of the critic.
        critic: an `ArcherCritic`.
        critic_warmup: share of the critic's updates that come before the actor's first.
        samples: responses drawn at a state whose candidates are not known to be complete.
    """

    gamma: float
    critic: Any
    critic_warmup: float
    samples: int

    aggregate: ClassVar[Literal["sum"]] = "sum"
    needs: ClassVar[Literal["q"]] = "q"
    candidates: ClassVar[bool] = True
    ratios: ClassVar[Literal["none"]] = "none"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("critic_warmup", self.critic_warmup)
        check_count("samples", self.samples)

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        return logged.response_q - logged.v[logged.response_of], {}

    def loss(self, batch: Responses) -> dict[str, Tensor]:
        n = len(batch.advantages)
        states = int(batch.state[-1]) + 1
        logprobs = sequence_logprob(batch.logprobs, batch.owner, n, reduce="sum")
        expected = expected_advantage(logprobs, batch.advantages, batch.state, states, proposal=batch.proposal)
        # aggregate=sum gives every token of a state the same weight
        weight = expected.new_zeros(states).index_put((batch.state[batch.owner],), batch.weight.to(expected.dtype))
        return {"actor": -(weight * expected).sum()}
