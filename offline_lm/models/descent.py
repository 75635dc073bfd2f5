"""How weights move: the share of the learning rate at a step, and one update of a backbone that is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def rate_share(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at `step` of 1 to `steps`: up in a line over `warmup`, down in one to 0.05."""
    return min(1.0, step / max(warmup, 1), 1.05 - step / steps)


def descend(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], loss: Tensor, *, after: str) -> None:
    """Step down the gradient of `loss`, whose norm is cut to 1; both are looked at first.

    Args:
        after: how far training has come and what to mend, for the message: "3 updates: lower lr".

    Raises:
        FloatingPointError: the loss or the gradient is not finite; no weight has changed.
    """
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()} after {after}")
    optimizer.zero_grad()
    loss.backward()
    if not nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
        raise FloatingPointError(f"the gradient is not finite after {after}")
    optimizer.step()
