"""Group-relative advantages: an episode against the other episodes of its task, a step against those of its state."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def group_advantages(
    returns: Float[Tensor, " e"], groups: Int[Tensor, " e"], *, divide_by_std: bool
) -> tuple[Float[Tensor, " e"], int]:
    """``A_i = (R_i - mean) / std`` over the members of i's group: the episodes of a task, or the steps at one state.

    With ``divide_by_std`` it is GRPO's (Shao et al. 2024, section 4.1.2), with the sample standard deviation (n - 1),
    as trl and verl have it; without it Dr. GRPO's (Liu et al. 2025, section 3.2). A group of one, or one whose returns
    are all equal up to rounding, says nothing: its advantages are 0.

    Args:
        returns: the outcome R of each episode, or the discounted return of each step. A NaN makes NaN of its group and
            of no other.
        groups: the group of each, numbered from 0; numbers may be left out.

    Returns:
        The advantages, and the number of groups that say nothing.

    Raises:
        ValueError: shapes disagree, or a group has a negative number.
    """
    if returns.dim() != 1 or groups.shape != returns.shape:
        raise ValueError(f"one group a return: returns {tuple(returns.shape)}, groups {tuple(groups.shape)}")
    if returns.numel() == 0:
        return returns.clone(), 0
    if groups.min() < 0:
        raise ValueError("groups are numbered from 0")
    returns = returns.to(torch.promote_types(returns.dtype, torch.float32))
    size = int(groups.max()) + 1

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(size).index_add_(0, groups, x)

    n = total(torch.ones_like(returns))
    high = returns.new_zeros(size).scatter_reduce_(0, groups, returns, "amax", include_self=False)
    low = returns.new_zeros(size).scatter_reduce_(0, groups, returns, "amin", include_self=False)
    # Not std == 0: equal rewards need not have an exact mean. Nor high == low: returns that were discounted in another
    # order differ in their last bits, and divided by that spread they would be advantages of 1.
    flat = high - low <= 64 * torch.finfo(returns.dtype).eps * torch.maximum(high.abs(), low.abs())
    advantages = returns - (total(returns) / n)[groups]
    if divide_by_std:
        advantages = advantages / (total(advantages.square()) / (n - 1)).sqrt()[groups]
    return advantages.masked_fill(flat[groups], 0.0), int((flat & (n > 0)).sum())


@torch.no_grad()
def gigpo_advantages(
    outcomes: Float[Tensor, " e"],
    tasks: Int[Tensor, " e"],
    returns: Float[Tensor, " n"],
    states: Int[Tensor, " n"],
    episode: Int[Tensor, " n"],
    *,
    omega: float,
    divide_by_std: bool,
) -> tuple[Float[Tensor, " n"], int, int]:
    """``A = A_episode + omega A_step`` of each step (GiGPO: Feng et al. 2025, eq. 6-8).

    A_episode compares the outcomes of a task's episodes, A_step the returns of all steps of those episodes that stand
    at an identical state (an anchor-state group), wherever in an episode they come; a state that one episode visits
    twice counts twice. Both are `group_advantages`. A state seen once has A_step = 0: what is left is GRPO's advantage.

    Args:
        outcomes: R of each episode; tasks: its task, numbered from 0.
        returns: the discounted return G_t of each step (`offline_lm.losses.returns.discounted_returns`).
        states: the state of each step, numbered from 0; the same number in two tasks is two states.
        episode: which episode each step belongs to.
        omega: the weight of the step level; the paper takes 1.

    Returns:
        The advantages, the number of tasks whose episodes say nothing, and the number of states whose steps do.

    Raises:
        ValueError: shapes disagree, or a number is negative.
    """
    if returns.dim() != 1 or states.shape != returns.shape or episode.shape != returns.shape:
        shapes = f"returns {tuple(returns.shape)}, states {tuple(states.shape)}, episode {tuple(episode.shape)}"
        raise ValueError(f"one state and one episode a step: {shapes}")
    if (states < 0).any() or (episode < 0).any():
        raise ValueError("states and episodes are numbered from 0")
    of_episode, flat_tasks = group_advantages(outcomes, tasks, divide_by_std=divide_by_std)
    _, anchors = torch.stack([tasks[episode], states]).unique(dim=1, return_inverse=True)
    of_step, flat_states = group_advantages(returns, anchors, divide_by_std=divide_by_std)
    return of_episode[episode] + omega * of_step, flat_tasks, flat_states
