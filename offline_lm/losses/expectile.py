"""Expectile regression: the value loss of implicit Q-learning."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from offline_lm.losses.masks import masked_difference, masked_mean


def expectile_weight(diff: Float[Tensor, "..."], tau: float) -> Float[Tensor, "..."]:
    """``|tau - 1(u < 0)|``: tau where the target is at or above the value, 1 - tau where it is below."""
    if not 0.0 < tau < 1.0:
        raise ValueError(f"an expectile lies between 0 and 1, not at {tau}")
    return diff.detach().lt(0).to(diff.dtype).sub(tau).abs()


def expectile_loss(diff: Float[Tensor, "..."], tau: float) -> Float[Tensor, "..."]:
    """``L2^tau(u) = |tau - 1(u < 0)| u^2``, elementwise (Kostrikov et al. 2021, section 4.1).

    ``diff`` is target minus value, in this order: the other way round it is the expectile 1 - tau. ``tau`` =
    0.5 is half the squared error; towards 1 it approaches the maximum over the actions in the data.

    Raises:
        ValueError: ``tau`` does not lie between 0 and 1.
    """
    return expectile_weight(diff, tau) * diff.square()


def iql_value_loss(
    values: Float[Tensor, " n"],
    q_min: Float[Tensor, " n"],
    tau: float,
    mask: Bool[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over steps of ``L2^tau(min_i Q_i(s, a) - V(s))`` (Kostrikov et al. 2021, eq. 5), weighted by ``weight``.

    ``q_min`` is `offline_lm.losses.td.ensemble_min` of the *target* ensemble; no gradient flows into it.
    """
    return masked_mean(expectile_loss(masked_difference(q_min, values, mask), tau), mask, weight)
