"""The device that a user names."""

from __future__ import annotations

import torch

from offline_lm.errors import UserError


def device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU; any other name as torch has it.

    Raises:
        UserError: no such device, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError(f"device={name}: {str(error).splitlines()[0]}") from error


def row_tokens(device: torch.device) -> int:
    """Tokens of a packed row in one forward pass: on a CPU few, since more would leave its caches, a fifth slower."""
    return 2048 if device.type == "cpu" else 16_384


def sent(tensor: torch.Tensor, to: torch.device) -> torch.Tensor:
    """A copy on the device; to a GPU from pinned memory, so that nobody waits for it."""
    return tensor.pin_memory().to(to, non_blocking=True) if to.type == "cuda" else tensor.to(to)
