"""Bellman targets, and squared losses against targets that are held fixed."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from offline_lm.losses.masks import masked_difference, masked_mean


def ensemble_min(q: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    """The pessimistic member of an ensemble, ``min_i Q_i`` (Fujimoto et al. 2018, eq. 10).

    Raises:
        ValueError: ``q`` has no ensemble axis in front; the minimum over steps would be one number for all of
            them.
    """
    if q.dim() < 2:
        raise ValueError(f"an ensemble has shape [k, n]; this has {tuple(q.shape)}")
    return q.amin(dim=0)


def td_target(
    rewards: Float[Tensor, " n"],
    continues: Float[Tensor, " n"],
    next_values: Float[Tensor, " n"],
    *,
    gamma: float,
) -> Float[Tensor, " n"]:
    """``y_t = r_t + gamma continue_t V(s_{t+1})`` (Sutton & Barto 2018, eq. 6.2), without gradient.

    ``continues`` is 1 - terminated; where it is 0 the next value does not count, whatever it is.
    """
    # where: after a terminal step there may be no value at all (NaN), and 0 * NaN is NaN.
    following = next_values.detach().where(continues != 0, 0.0)
    return torch.addcmul(rewards, continues, following, value=gamma)


def td_error(values: Float[Tensor, "*k n"], target: Float[Tensor, " n"]) -> Float[Tensor, "*k n"]:
    """``y_t - V(s_t)``; the gradient flows into the values only.

    Raises:
        ValueError: the last axis of ``values`` is not that of ``target``.
    """
    return masked_difference(target, values)


def squared_loss(
    prediction: Float[Tensor, "*k n"],
    target: Float[Tensor, " n"],
    mask: Bool[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over steps, weighted by ``weight``, of ``(target - prediction)^2``, summed over an ensemble.

    No gradient flows into the target.

    This is the Q loss of IQL (Kostrikov et al. 2021, eq. 6) for ``target = td_target(...)``.
    """
    return masked_mean(masked_difference(target, prediction, mask).square(), mask, weight)


def mc_loss(
    values: Float[Tensor, "*k n"], returns: Float[Tensor, " n"], mask: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """Mean of ``1/2 (V(s_t) - G_t)^2``: regression on Monte Carlo returns (Sutton & Barto 2018, eq. 9.1)."""
    return 0.5 * squared_loss(values, returns, mask)
