"""Means over the steps that count."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(
    x: Float[Tensor, "*k n"], mask: Bool[Tensor, " n"] | None = None, weight: Float[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """Mean of ``x`` over the steps where ``mask`` holds, summed over any leading (ensemble) axes.

    ``weight`` makes it the weighted mean, ``sum w x / sum w``, without gradient into the weights. Summing over the
    ensemble keeps the gradient of each member the same whatever its size. A mask that holds nowhere gives 0 with zero
    gradients, so that a batch without a usable step leaves the parameters as they are.

    Raises:
        ValueError: mask or weight is not of the shape of the last axis of ``x``.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weights of shape {tuple(weight.shape)} for steps of shape {tuple(x.shape)}")
    if mask is None:
        mask = torch.ones(x.shape[-1:], dtype=torch.bool, device=x.device)
    if mask.shape != x.shape[-1:]:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for steps of shape {tuple(x.shape)}")
    # where, not a product: 0 * NaN is NaN.
    kept = x.where(mask, 0.0)
    if weight is None:
        return kept.sum() / mask.sum().clamp(min=1)
    weight = weight.detach().where(mask, 0.0)
    total = weight.sum()
    return (weight * kept).sum() / total.where(total > 0, 1.0)


def masked_difference(
    target: Float[Tensor, " n"], prediction: Float[Tensor, "*k n"], mask: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, "*k n"]:
    """``target - prediction``, 0 where the mask does not hold; no gradient flows into the target.

    Masking before anything is squared keeps NaN targets out of the gradient, where ``0 * NaN`` would bring
    them back.

    Raises:
        ValueError: ``prediction`` is not ``[..., n]`` for a target ``[n]``. Broadcasting ``[n, 1]`` against
            ``[n]`` would give ``[n, n]`` and train every value on the mean target, without an error.
    """
    if target.dim() != 1 or prediction.shape[-1:] != target.shape:
        raise ValueError(f"predictions of shape {tuple(prediction.shape)} for targets of shape {tuple(target.shape)}")
    difference = target.detach() - prediction
    return difference if mask is None else difference.where(mask, 0.0)
