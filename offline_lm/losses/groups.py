"""Group-relative advantages: an episode against the other episodes of its task."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def group_advantages(
    rewards: Float[Tensor, " e"], groups: Int[Tensor, " e"], *, divide_by_std: bool
) -> tuple[Float[Tensor, " e"], int]:
    """``A_i = (R_i - mean) / std`` over the episodes of i's group, one number for the whole episode.

    With ``divide_by_std`` it is GRPO's (Shao et al. 2024, section 4.1.2), with the sample standard deviation (n - 1),
    as trl and verl have it; without it Dr. GRPO's (Liu et al. 2025, section 3.2). A group of one, or one whose rewards
    are all equal, says nothing: its advantages are 0.

    Args:
        rewards: the outcome R of each episode. A NaN makes NaN of its group and of no other.
        groups: the group of each episode, numbered from 0; numbers may be left out.

    Returns:
        The advantages, and the number of groups that say nothing.

    Raises:
        ValueError: shapes disagree, or a group has a negative number.
    """
    if rewards.dim() != 1 or groups.shape != rewards.shape:
        raise ValueError(f"one group an episode: rewards {tuple(rewards.shape)}, groups {tuple(groups.shape)}")
    if rewards.numel() == 0:
        return rewards.clone(), 0
    if groups.min() < 0:
        raise ValueError("groups are numbered from 0")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    size = int(groups.max()) + 1

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(size).index_add_(0, groups, x)

    n = total(torch.ones_like(rewards))
    high = rewards.new_zeros(size).scatter_reduce_(0, groups, rewards, "amax", include_self=False)
    low = rewards.new_zeros(size).scatter_reduce_(0, groups, rewards, "amin", include_self=False)
    flat = high == low  # not std == 0: equal rewards need not have an exact mean
    advantages = rewards - (total(rewards) / n)[groups]
    if divide_by_std:
        advantages = advantages / (total(advantages.square()) / (n - 1)).sqrt()[groups]
    return advantages.masked_fill(flat[groups], 0.0), int((flat & (n > 0)).sum())
