"""HL-Gauss: regression as classification over bins (Farebrother et al. 2024, "Stop Regressing", section 3.1).

A value is a categorical distribution over ``m`` bins, read out as its mean; the target is a Gaussian around
the scalar target, integrated over each bin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offline_lm.losses.expectile import expectile_weight
from offline_lm.losses.masks import masked_mean


@dataclass(frozen=True, slots=True)
class Support:
    """Where the bins lie: evenly spaced ``edges``, and the range ``low..high`` that targets may take."""

    edges: Float[Tensor, " m+1"]
    low: float
    high: float
    sigma: float
    """standard deviation of the Gaussian, in units of value"""

    @property
    def centers(self) -> Float[Tensor, " m"]:
        return (self.edges[:-1] + self.edges[1:]) / 2


def make_support(
    low: float,
    high: float,
    bins: int,
    *,
    sigma_to_width: float = 0.75,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Support:
    """``bins`` bins over ``low..high`` and a margin of four sigma on either side.

    The margin matters where most returns are exactly 0 or 1, the ends of the range: without it the Gaussian
    is cut in half there, and the mean that is read out is off by 0.8 sigma. ``sigma_to_width`` = 0.75 is the
    paper's choice.

    Raises:
        ValueError: ``low >= high``, or too few bins to hold the margins and two bins between them.
    """
    margin = math.ceil(4 * sigma_to_width)
    inner = bins - 2 * margin
    if not low < high:
        raise ValueError(f"low must be below high: {low}, {high}")
    if inner < 2:
        raise ValueError(f"{bins} bins are too few: {2 * margin} of them are margin; give at least {2 * margin + 2}")
    width = (high - low) / inner
    steps = torch.arange(-margin, inner + margin + 1, dtype=dtype, device=device)
    return Support(edges=low + width * steps, low=low, high=high, sigma=sigma_to_width * width)


def out_of_range(y: Float[Tensor, " n"], support: Support, mask: Bool[Tensor, " n"] | None = None) -> Int[Tensor, ""]:
    """How many targets `hl_gauss_targets` will clamp: report it, since a clamped target is a wrong one."""
    outside = (y < support.low) | (y > support.high)
    return (outside if mask is None else outside & mask).sum()


@torch.no_grad()
def hl_gauss_targets(y: Float[Tensor, " n"], support: Support) -> Float[Tensor, "n m"]:
    """The mass of a Gaussian at ``y`` in each bin, normalised over the support.

    Targets outside ``low..high`` are clamped to it; `out_of_range` counts them.
    """
    y = y.clamp(support.low, support.high)
    cdf = torch.special.ndtr((support.edges.to(y.dtype) - y[..., None]) / support.sigma)
    return cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])


def hl_gauss_mean(logits: Float[Tensor, "*k n m"], support: Support) -> Float[Tensor, "*k n"]:
    """The value that logits stand for: the mean of their distribution, each bin at its centre."""
    return logits.softmax(dim=-1) @ support.centers.to(logits.dtype)


def _cross_entropy(
    logits: Float[Tensor, "*k n m"], y: Float[Tensor, " n"], support: Support, mask: Bool[Tensor, " n"] | None
) -> Float[Tensor, "*k n"]:
    if y.dim() != 1 or logits.shape[-2:] != (y.shape[0], support.edges.numel() - 1):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} for {tuple(y.shape)} targets and {support.edges.numel() - 1} bins"
        )
    if mask is not None:
        y = y.where(mask, support.low)
    return -(hl_gauss_targets(y, support) * logits.log_softmax(dim=-1)).sum(dim=-1)


def hl_gauss_loss(
    logits: Float[Tensor, "*k n m"],
    y: Float[Tensor, " n"],
    support: Support,
    mask: Bool[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over steps, weighted by ``weight``, of the cross-entropy to the HL-Gauss target, summed over an ensemble.

    Raises:
        ValueError: shapes disagree.
    """
    return masked_mean(_cross_entropy(logits, y, support, mask), mask, weight)


def hl_gauss_expectile_loss(
    logits: Float[Tensor, "n m"],
    q_min: Float[Tensor, " n"],
    support: Support,
    tau: float,
    mask: Bool[Tensor, " n"] | None = None,
    weight: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """The value loss of IQL for a categorical value: cross-entropy weighted by ``|tau - 1(u < 0)|``.

    ``u = q_min - V`` with V the mean that is read out, held fixed. It is a surrogate: no upper bound or
    rewriting of L2^tau, whose numbers cannot be compared with it. Its stationary point is the right one,
    though: where the gradient vanishes the distribution is the weighted mixture of the targets, so its mean
    satisfies sum_i w_i (q_i - V) = 0, which defines the tau-expectile (up to the error of the bins, below
    2e-4 of their width).

    Raises:
        ValueError: shapes disagree, or ``tau`` does not lie between 0 and 1.
    """
    entropy = _cross_entropy(logits, q_min, support, mask)
    diff = q_min.detach() - hl_gauss_mean(logits.detach(), support)
    return masked_mean(expectile_weight(diff, tau) * entropy, mask, weight)
