"""Value heads: small ensembles of MLPs on hidden states, read as scalars or as categorical values (HL-Gauss)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from offline_lm.losses.expectile import iql_value_loss
from offline_lm.losses.hl_gauss import (
    Support,
    hl_gauss_expectile_loss,
    hl_gauss_loss,
    hl_gauss_mean,
    make_support,
)
from offline_lm.losses.td import squared_loss

M = TypeVar("M", bound=nn.Module)

LEAST_VARIANCE = 1e-6
"""Of normalised features: what varies less is rounding, and is not made louder."""


class Head(nn.Module):
    """k independent MLPs (width -> hidden -> hidden -> out), computed as batched matrix products.

    Args:
        width: size of the features.
        k: members of the ensemble.
        hidden: size of both hidden layers.
        support: bins of a categorical value; None for a scalar one.
        whitens: whether features are whitened first (`whiten`).

    Attributes:
        autocast: dtype that the products are computed in, where it is not the weights'.
    """

    def __init__(
        self, width: int, k: int, hidden: int, support: Support | None = None, *, whitens: bool = False
    ) -> None:
        super().__init__()
        self.k, self.support = k, support
        self.autocast: torch.dtype | None = None
        out = 1 if support is None else len(support.centers)
        sizes = [width, hidden, hidden, out]
        # Without its own gain and bias, which the first layer has already: a backward product the less.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.whitens = whitens
        self.mean: Tensor
        self.whitening: Tensor
        if whitens:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("whitening", torch.eye(width))
        self.weights = nn.ParameterList(nn.Parameter(_uniform(k, a, b)) for a, b in pairwise(sizes))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(k, 1, b)) for b in sizes[1:])
        with torch.no_grad():
            self.weights[-1].mul_(0.1)  # values start near 0, where most returns are

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Head:
        super()._apply(fn, recurse)
        if self.support is not None:  # the bins go where the weights go: .to(device), .double()
            self.support = replace(self.support, edges=fn(self.support.edges))
        return self

    def forward(self, features: Float[Tensor, "n d"]) -> Tensor:
        """Raw outputs, in the dtype of the weights: values [k, n], or logits [k, n, m] of categorical values."""
        dtype = self.weights[0].dtype
        x = self.norm(features.to(dtype))
        if self.whitens:
            x = (x - self.mean) @ self.whitening
        x = x.expand(self.k, -1, -1)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
                x = torch.baddbmm(b, x, w)
                if i < len(self.weights) - 1:
                    x = nn.functional.gelu(x)
        x = x.to(dtype)
        return x if self.support is not None else x[..., 0]

    @torch.no_grad()
    def whiten(self, features: Float[Tensor, "n d"], floor: float) -> None:
        """From now on give the directions in which the `features` vary scales that are closer to each other.

        A backbone's features differ most in what has little to do with values. What tells two actions of a page apart
        may vary a hundredth as much, and would be learnt last.

        Args:
            floor: added to the variances, as a share of their mean: towards 0 all scales are 1, and noise is as loud as
                the rest; the greater, the more is left as it is.
        """
        x = self.norm(features.double())
        self.mean.copy_(x.mean(dim=0))
        variance, directions = torch.linalg.eigh((x - x.mean(dim=0)).T.cov(correction=0))
        scale = (variance.clamp(min=0) + max(floor * variance.mean().item(), LEAST_VARIANCE)).rsqrt()
        self.whitening.copy_(directions * scale @ directions.T)

    def read(self, raw: Tensor) -> Float[Tensor, "k n"]:
        """The values that raw outputs stand for."""
        return raw if self.support is None else hl_gauss_mean(raw, self.support)

    def regress(
        self,
        raw: Tensor,
        target: Float[Tensor, " n"],
        mask: Bool[Tensor, " n"],
        weight: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Squared error, or cross-entropy to the HL-Gauss target; masked mean, summed over the ensemble."""
        if self.support is None:
            return squared_loss(raw, target, mask, weight)
        return hl_gauss_loss(raw, target, self.support, mask, weight)

    def expectile(
        self,
        raw: Tensor,
        target: Float[Tensor, " n"],
        tau: float,
        mask: Bool[Tensor, " n"],
        weight: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Expectile regression of an ensemble of one (Kostrikov 2021, eq. 5), or its HL-Gauss surrogate."""
        if self.support is None:
            return iql_value_loss(raw[0], target, tau, mask, weight)
        return hl_gauss_expectile_loss(raw[0], target, self.support, tau, mask, weight)


def _uniform(k: int, fan_in: int, fan_out: int) -> Tensor:
    bound = math.sqrt(3.0 / fan_in)
    return torch.empty(k, fan_in, fan_out).uniform_(-bound, bound)


class Heads(nn.Module):
    """The V head and the ensemble of Q heads of one critic.

    Args:
        low, high: least and greatest return that the data can reach: the range of categorical values.
        loss: mse or hl_gauss.
        whitening: the floor of `Head.whiten`; None: features are read as they are.
    """

    def __init__(
        self, width: int, *, ensemble: int = 2, hidden: int = 256, loss: str = "mse", bins: int = 101,
        low: float = 0.0, high: float = 1.0, whitening: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if loss not in ("mse", "hl_gauss"):
            raise ValueError(f"loss is mse or hl_gauss, not {loss!r}")
        self.options = dict(
            ensemble=ensemble, hidden=hidden, loss=loss, bins=bins, low=low, high=high, whitening=whitening
        )
        self.floor = whitening
        support = None if loss == "mse" else make_support(low, high if high > low else low + 1.0, bins)
        self.v = Head(width, 1, hidden, support, whitens=whitening is not None)
        self.q = Head(width, ensemble, hidden, support, whitens=whitening is not None)

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Compute the products of both heads in `dtype`, through autocast; None: in that of the weights."""
        self.v.autocast = self.q.autocast = dtype

    def whiten(self, states: Float[Tensor, "n d"], actions: Float[Tensor, "m d"]) -> None:
        """`Head.whiten` of both heads by the features that each will read; nothing where `whitening` is None."""
        if self.floor is not None:
            self.v.whiten(states, self.floor)
            self.q.whiten(actions, self.floor)

    def values(self, states: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return self.v.read(self.v(states))[0]

    def q_values(self, actions: Float[Tensor, "n d"]) -> Float[Tensor, "k n"]:
        return self.q.read(self.q(actions))


def target_of(module: M) -> M:
    """A copy that is never trained by gradients; equal to the online parameters at step 0 (trap 8)."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, rate: float) -> None:
    """Move every parameter of `target` a share `rate` towards `online`'s, in one call; what both share stays."""
    pairs = [(t, o) for t, o in zip(target.parameters(), online.parameters(), strict=True) if t is not o]
    torch._foreach_lerp_([t for t, _ in pairs], [o for _, o in pairs], rate)  # pyright: ignore
