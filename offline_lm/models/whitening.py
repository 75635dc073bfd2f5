"""How far scales of features are evened out before heads read them: as foretells the returns of other tasks best."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import layer_norm

from offline_lm.models.heads import LEAST_VARIANCE

FLOORS = (0.001, 0.01, 0.1)
"""Floors of `Head.whiten` that are tried."""
_FOLDS = 4
_RIDGE = 0.01
_DIRECTIONS = 512


@torch.no_grad()
def best_floor(
    features: Float[Tensor, "n d"], returns: Float[Tensor, " n"], group: Int[Tensor, " n"]
) -> tuple[float, dict[float, float]]:
    """The floor under which a ridge regression on whitened features foretells the returns of other groups best.

    Where what comes is like what was logged (one maze), quiet directions carry the value, and a low floor wins; where
    new tasks come they are noise, and a high one does. Cross-validated in closed form over whole groups, on the 512
    directions in which the features vary most.

    Args:
        features: of logged actions.
        returns: their known returns.
        group: what a fold holds whole: tasks, or episodes where there are few tasks.

    Returns:
        The floor, the highest of equals, or where there is one group; and the share of the variance that each explains.
    """
    x, y = layer_norm(features.double(), features.shape[1:]), returns.double()
    centred = x - x.mean(dim=0)
    variance, directions = torch.linalg.eigh(centred.T.cov(correction=0))
    loud = slice(-_DIRECTIONS, None)
    z, variance = centred @ directions[:, loud], variance.clamp(min=0)
    _, number = group.unique(return_inverse=True)
    order = torch.randperm(int(number.max()) + 1, generator=torch.Generator().manual_seed(0))
    if len(order) < 2:
        return max(FLOORS), {}
    fold = (order % _FOLDS).to(number.device)[number]
    found = {}
    for floor in FLOORS:
        white = z * (variance[loud] + max(floor * variance.mean().item(), LEAST_VARIANCE)).rsqrt()
        error = 0.0
        for k in fold.unique():
            a, b, known = white[fold != k], white[fold == k], y[fold != k]
            gram = a.T @ a + _RIDGE * len(a) * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
            foretold = b @ torch.linalg.solve(gram, a.T @ (known - known.mean())) + known.mean()
            error += (foretold - y[fold == k]).square().sum().item()
        found[floor] = 1 - error / max((y - y.mean()).square().sum().item(), 1e-12)
    return max(reversed(FLOORS), key=lambda floor: found[floor]), found
