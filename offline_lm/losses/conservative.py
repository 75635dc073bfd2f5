"""The conservative penalty: values of actions that were not logged are pushed below those that were."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from offline_lm.losses.candidates import candidate_logsumexp
from offline_lm.losses.masks import masked_mean


def cql_penalty(
    candidates: Float[Tensor, "k m"],
    owner: Int[Tensor, " m"],
    logged: Float[Tensor, "k n"],
    mask: Bool[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over steps, by ``weight``, of ``log sum_{a in C(s)} exp Q(s, a) - Q(s, a_t)``, summed over an ensemble.

    CQL(H) of Kumar et al. 2020 (eq. 4), with the candidates C(s), the logged action among them, for the action space.
    It is at least 0, and 0 where the logged action is the only candidate.

    Args:
        candidates: Q of every candidate of every step, end to end; owner: its step.
        logged: Q of the logged actions.

    Raises:
        ValueError: shapes disagree.
    """
    k, n = logged.shape
    if candidates.shape[:1] != (k,):
        raise ValueError(f"candidates of shape {tuple(candidates.shape)} for an ensemble of {k}")
    return masked_mean(candidate_logsumexp(candidates, owner, n) - logged, mask, weight)
