"""One update of a backbone that is trained: the loss is looked at, then its gradient, and only then is a step taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def descend(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], loss: Tensor, *, after: str) -> None:
    """Step down the gradient of `loss`, whose norm is cut to 1.

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
