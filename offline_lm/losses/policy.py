"""Log-probabilities of responses, from log-probabilities of their tokens."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor


def sequence_logprob(
    logprobs: Float[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"], *, reduce: Literal["sum", "mean"]
) -> Float[Tensor, " n"]:
    """``log pi(a|s)`` of each response from ``log pi(token | before)``, over the tokens where ``mask`` holds.

    ``reduce`` has no default, because the two are different quantities: "sum" is the log-probability, what
    importance ratios need; "mean" is per token, what `awr` uses so that long responses do not outweigh short
    ones. A response without a token gives 0.

    Raises:
        ValueError: ``reduce`` is neither, or shapes disagree.
    """
    if mask.shape != logprobs.shape:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for log-probabilities of {tuple(logprobs.shape)}")
    total = logprobs.where(mask, 0.0).sum(dim=-1)
    if reduce == "sum":
        return total
    if reduce == "mean":
        return total / mask.sum(dim=-1).clamp(min=1)
    raise ValueError(f"reduce must be 'sum' or 'mean', not {reduce!r}")
