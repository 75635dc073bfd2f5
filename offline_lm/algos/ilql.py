"""Implicit language Q-learning: IQL whose actions are tokens, and a policy out of its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from offline_lm.algos.checks import check_at_least_0, check_rate, check_share
from offline_lm.losses.expectile import expectile_loss
from offline_lm.losses.ilql import taken_q, token_cql
from offline_lm.losses.masks import masked_difference
from offline_lm.types import Estimand


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """T tokens of logged responses, end to end, and what is said at the position before each.

    A part of an update's batch: weights were made for the whole of it, so that losses of the parts add up.
    """

    v: Float[Tensor, " t"]
    q: Float[Tensor, "k t vocab"]
    logits: Float[Tensor, "t vocab"]
    """of the behaviour policy"""
    taken: Int[Tensor, " t"]
    """the token that follows"""
    q_bar: Float[Tensor, " t"]
    """the least of the target's ensemble, of the taken token"""
    target: Float[Tensor, " t"]
    """`losses.ilql.token_targets` of the target's V"""
    weight: Float[Tensor, " t"]
    """of each token in the cross-entropy of the behaviour policy"""
    value_weight: Float[Tensor, " t"]
    """of each token in the losses of values; 0 where the turn has no target, which then may be NaN"""
    unit: float
    """what values are measured in within the losses: the standard deviation of the logs' returns"""


@dataclass(frozen=True)
class ILQL:
    """Snell et al. 2022, section 4.2: one loss for V, Q over the vocabulary, and the behaviour policy.

    V: L2^tau(min_i Q̄_i(s, a) - V(s)). Q_i: (Q_i(s, a) - y)², y = V̄ at the next position, r + gamma * continue * V̄(s')
    at the end of a response. Plus alpha times the cross-entropy of the taken token with Q_i for logits (CQL), and
    -log pi_beta(a|s). Weighted sums over tokens, whose weights are those of a mean over an update.

    All share one backbone; the paper's pi_beta is a model of its own. Values are measured in standard deviations of
    the logs' returns, so that neither alpha nor beta depends on the reward's unit, and no loss drowns the other.

    Args:
        gamma: discount per turn; from token to token of a response there is none.
        tau: expectile; 0.5 is the behaviour's value, towards 1 the best logged token's.
        alpha: weight of the penalty on tokens that were not logged.
        beta: of the policy, log pi_beta + beta (min Q̄ - V); 0 is the behaviour policy.
        polyak: rate at which the target follows the online parameters, per update; None: set by how far values travel,
            token by token.
    """

    gamma: float
    tau: float
    alpha: float
    beta: float
    polyak: float | None

    trains_q: ClassVar[bool] = True
    # of tokens: nested over a response, it is that of turns where responses part at one token, or tau is 1/2
    estimand: ClassVar[Estimand] = "expectile"

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("tau", self.tau, ends=False)
        check_at_least_0("alpha", self.alpha)
        check_at_least_0("beta", self.beta)
        check_rate("polyak", self.polyak)

    def loss(self, batch: TokenBatch) -> dict[str, Tensor]:
        w, known = batch.value_weight, batch.value_weight != 0
        v_error = masked_difference(batch.q_bar, batch.v, known) / batch.unit
        q_error = masked_difference(batch.target, taken_q(batch.q, batch.taken), known) / batch.unit
        spoken = cross_entropy(batch.logits, batch.taken, reduction="none")
        return {
            "v": (w * expectile_loss(v_error, self.tau)).sum(),
            "q": (w * q_error.square().sum(dim=0)).sum(),
            "cql": self.alpha * (w * token_cql(batch.q / batch.unit, batch.taken)).sum(),
            "lm": (batch.weight * spoken).sum(),
        }
