"""Clipped surrogates over packed responses, laid out and weighted as in `policy`, and the health of an update."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offline_lm.losses.policy import approx_kl, check_tokens, of_tokens, sequence_logprob, without_uncounted


def ppo_clip(
    logprobs: Float[Tensor, " t"],
    old: Float[Tensor, " t"],
    advantages: Float[Tensor, " n"],
    owner: Int[Tensor, " t"],
    weight: Float[Tensor, " t"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, ""]:
    """``-sum_t w_t min(rho_t A, clip(rho_t, 1 - low, 1 + high) A)``, ``rho_t = exp(logprobs - old)``, per token.

    PPO's (Schulman et al. 2017, eq. 7) for ``low = high``; DAPO raises the upper bound alone (Yu et al. 2025, eq. 8).
    ``low = 1, high = inf`` clips nothing. A ratio beyond the range of the dtype gives an infinite loss where A < 0,
    since nothing bounds it there, and counts as clipped where A >= 0.

    Args:
        old: log-probabilities of the tokens under the policy that drew them; no gradient flows into them.

    Raises:
        ValueError: shapes disagree, ``low`` does not lie in 0..1, or ``high`` is negative.
    """
    check_tokens(logprobs, old=old, owner=owner, weight=weight)
    log_ratio, advantage = without_uncounted(weight, logprobs - old.detach(), of_tokens(advantages, owner))
    return -(weight.detach() * _surrogate(log_ratio, advantage, low, high)).sum()


def gspo_clip(
    logprobs: Float[Tensor, " t"],
    old: Float[Tensor, " t"],
    advantages: Float[Tensor, " n"],
    owner: Int[Tensor, " t"],
    weight: Float[Tensor, " t"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, ""]:
    """`ppo_clip` with one ratio a response, ``s_i = exp(mean_t(logprobs - old))`` (GSPO: Zheng et al. 2025, eq. 5-7).

    A response weighs what its tokens weigh together: 1/n, as in the paper, for ``token_weights(..., "sequence")``.
    Micro-batches must hold whole responses.

    Raises:
        ValueError: as `ppo_clip`.
    """
    check_tokens(logprobs, old=old, owner=owner, weight=weight)
    if advantages.dim() != 1:
        raise ValueError(f"one advantage a response, [n]; these have shape {tuple(advantages.shape)}")
    n = advantages.numel()
    (log_ratio,) = without_uncounted(weight, logprobs - old.detach())
    sequence = sequence_logprob(log_ratio, owner, n, reduce="mean")
    share = sequence_logprob(weight.detach(), owner, n, reduce="sum")
    (advantage,) = without_uncounted(share, advantages.detach())
    return -(share * _surrogate(sequence, advantage, low, high)).sum()


@torch.no_grad()
def update_health(
    logprobs: Float[Tensor, " t"],
    old: Float[Tensor, " t"],
    owner: Int[Tensor, " t"],
    n: int,
    *,
    low: float,
    high: float,
    advantages: Float[Tensor, " n"],
    counted: Bool[Tensor, " n"] | None = None,
    sequence_level: bool = False,
) -> dict[str, float]:
    """How far an update has gone from the policy that drew its n responses.

    Give it the whole update: an effective sample size is no mean over micro-batches.

    Args:
        counted: responses that count (all, if not given), as in `token_weights`.
        sequence_level: clip fraction and largest ratio are of responses (`gspo_clip`), not of tokens (`ppo_clip`).

    Returns:
        - ``approx_kl``: `approx_kl` to ``old``, the mean over tokens, in nats;
        - ``clip_fraction``: share of tokens without gradient since the clip is active: a ratio above 1 + high with
          A > 0, or below 1 - low with A < 0;
        - ``ratio_max``: the largest ratio; infinite where it overflows;
        - ``ess``: ``(sum w)^2 / (n sum w^2)`` over the n responses that count, ``w = pi(a|s) / old(a|s)`` of the whole
          response (Kish 1965): from 1/n where one outweighs the rest to 1 where all weigh the same.

        All NaN where no response with a token counts.

    Raises:
        ValueError: as `ppo_clip`.
    """
    check_tokens(logprobs, old=old, owner=owner)
    if counted is None:
        counted = torch.ones(n, dtype=torch.bool, device=owner.device)
    if advantages.shape != (n,) or counted.shape != (n,):
        raise ValueError(f"{n} responses, advantages {tuple(advantages.shape)}, counted {tuple(counted.shape)}")
    bottom, top = _log_bounds(low, high)
    kept = counted[owner]
    logprobs, old, owner = logprobs[kept], old[kept], owner[kept]
    if owner.numel() == 0:
        return dict.fromkeys(("approx_kl", "clip_fraction", "ratio_max", "ess"), math.nan)

    log_ratio = logprobs - old
    held = torch.bincount(owner, minlength=n) > 0
    log_weights = sequence_logprob(log_ratio, owner, n, reduce="sum")[held]
    if sequence_level:
        each, advantage = sequence_logprob(log_ratio, owner, n, reduce="mean")[held], advantages[held]
    else:
        each, advantage = log_ratio, advantages[owner]
    active = ((advantage > 0) & (each > top)) | ((advantage < 0) & (each < bottom))
    weights = (log_weights - log_weights.max()).exp()  # a common factor cancels, an overflow does not
    ess = weights.sum().square() / weights.square().sum() / weights.numel()
    return {
        "approx_kl": approx_kl(logprobs, old).item(),
        "clip_fraction": active.float().mean().item(),
        "ratio_max": each.max().exp().item(),
        "ess": ess.item(),
    }


def _log_bounds(low: float, high: float) -> tuple[float, float]:
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"a ratio is clipped to 1 - low .. 1 + high, low in 0..1 and high >= 0: {low}, {high}")
    return (math.log1p(-low) if low < 1 else -math.inf), math.log1p(high)


def _surrogate(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """``min(rho A, clip(rho) A)``, bounded as a logarithm on the one side where it is bounded at all.

    The textbook form computes the unbounded ratio as well, and where that overflows its gradient is 0 * inf.
    """
    bottom, top = _log_bounds(low, high)
    bounded = log_ratio.clamp(max=top).where(advantage >= 0, log_ratio.clamp(min=bottom))
    return advantage * bounded.exp()
