"""Returns and advantages over ragged episodes, all of them one linear recurrence scanned backwards.

The discount counts turns. ``continues`` is 1 - terminated: a truncated step continues (Pardo et al. 2018,
"Time limits in reinforcement learning"), and what it continues into is ``bootstrap``, ``final_values`` or
nothing. Results are targets: they carry no gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offline_lm.losses.td import td_target

# Steps scanned at once on a CPU, so that the working set stays in cache: about twice as fast as all at once.
_BLOCK = 1 << 17


@torch.no_grad()
def reverse_scan(
    a: Float[Tensor, " n"],
    b: Float[Tensor, " n"],
    offsets: Int[Tensor, " e+1"],
    last: Float[Tensor, " e"] | None = None,
) -> Float[Tensor, " n"]:
    """``x_t = b_t + a_t x_{t+1}`` within each episode; x after its last step is ``last``, or 0.

    Doubling (Hillis & Steele 1986): after round k, x_t has taken in the next 2^k steps, so that the longest
    episode of T steps costs log2(T) vector operations. Products of ``a`` only ever multiply: nothing is
    divided by a power of the discount, which is what turns cumulative products into NaN.

    A NaN or infinite input (a reward that was not logged) makes NaN of the results that depend on it and of
    no others. Half precision and integers are computed in float32; float64 stays float64.

    Raises:
        ValueError: shapes disagree, or ``offsets`` is not a rising sequence from 0 to n.
    """
    n = b.numel()
    if a.shape != (n,) or b.shape != (n,):
        raise ValueError(f"a and b must both have shape [n]; they have {tuple(a.shape)} and {tuple(b.shape)}")
    lengths = _lengths(offsets, n)
    if last is not None and last.shape != lengths.shape:
        raise ValueError(f"one last value an episode: {lengths.numel()} episodes, shape {tuple(last.shape)}")
    if n == 0:
        return b.to(torch.promote_types(b.dtype, torch.float32))

    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype, copy=True), b.to(dtype, copy=True)
    held = lengths > 0
    ends = offsets[1:][held] - 1
    if last is not None:
        # Where a is 0 nothing comes after: an unknown value there (NaN) must not reach the result.
        b[ends] += (a[ends] * last[held].to(dtype)).where(a[ends] != 0, 0.0)
    a[ends] = 0.0

    longest = int(lengths.max())
    if (a.sum() + b.sum()).isfinite():  # one unknown anywhere makes the sum unknown
        return _scan(a, b, longest)
    # 0 * NaN would carry NaN over the border into the episode before: scan without, then mark what needed it.
    unknown = ~(a.isfinite() & b.isfinite())
    x = _scan(a.where(~unknown, 0.0), b.where(~unknown, 0.0), longest)
    needed = _scan((a != 0).to(dtype), unknown.to(dtype), longest) > 0
    return x.masked_fill(needed, torch.nan)


def _lengths(offsets: Int[Tensor, " e+1"], n: int) -> Int[Tensor, " e"]:
    lengths = offsets.diff()
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets[0] != 0 or offsets[-1] != n or (lengths < 0).any():
        raise ValueError(f"offsets must rise from 0 to the number of steps, {n}")
    return lengths


def _scan(a: Float[Tensor, " n"], b: Float[Tensor, " n"], longest: int) -> Float[Tensor, " n"]:
    """The scan over the flat axis; ``a`` is 0 at every episode's end, and no episode exceeds ``longest``."""
    n = b.numel()
    block = _BLOCK if b.device.type == "cpu" else n
    out = torch.empty_like(b)
    for stop in range(n, 0, -block):
        start = max(stop - block, 0)
        x, product = b[start:stop], a[start:stop]
        if stop < n:
            x = x.clone()
            x[-1:].addcmul_(product[-1:], out[stop : stop + 1])
        size, span = stop - start, 1
        while True:
            # product[t] is a_t ... a_{t+span-1}. One pass, into new memory: x is read further on than it is written.
            done = 2 * span >= min(longest, size)
            y = out[start:stop] if done else torch.empty_like(x)
            torch.addcmul(x[: size - span], product[: size - span], x[span:], out=y[: size - span])
            y[size - span :].copy_(x[size - span :])
            if done:
                break
            x, product = y, product[:-span] * product[span:]
            span *= 2
    return out


def discounted_returns(
    rewards: Float[Tensor, " n"],
    continues: Float[Tensor, " n"],
    offsets: Int[Tensor, " e+1"],
    *,
    gamma: float,
    bootstrap: Float[Tensor, " e"] | None = None,
) -> Float[Tensor, " n"]:
    """``G_t = r_t + gamma continue_t G_{t+1}`` (Sutton & Barto 2018, eq. 3.9).

    ``bootstrap`` is the value after each episode's last step, counted only where that step continues. Without
    it G ends in the logged outcome, truncated or not.
    """
    return reverse_scan(gamma * continues, rewards, offsets, bootstrap)


def next_values(
    values: Float[Tensor, " n"],
    offsets: Int[Tensor, " e+1"],
    *,
    final_values: Float[Tensor, " e"] | None = None,
) -> Float[Tensor, " n"]:
    """``V(s_{t+1})`` of each step: the next row of the same episode, ``final_values`` after the last.

    Without ``final_values`` it is 0 there: never the last row's own value, and never the next episode's.
    Whether that 0 may be used is for `bootstrap_mask` to say.
    """
    held = _lengths(offsets, values.numel()) > 0
    shifted = values.roll(-1)
    ends = offsets[1:][held] - 1
    shifted[ends] = 0.0 if final_values is None else final_values[held].to(values.dtype)
    return shifted


def bootstrap_mask(
    continues: Float[Tensor, " n"],
    offsets: Int[Tensor, " e+1"],
    *,
    has_final: Bool[Tensor, " e"] | None = None,
) -> Bool[Tensor, " n"]:
    """Where a bootstrapped target exists: everywhere but at a last step that continues into nothing logged.

    ``has_final`` says for which episodes the final observation was logged (none, if not given).
    """
    held = _lengths(offsets, continues.numel()) > 0
    mask = torch.ones_like(continues, dtype=torch.bool)
    ends = offsets[1:][held] - 1
    known = continues[ends] == 0
    mask[ends] = known if has_final is None else known | has_final[held]
    return mask


def td_residuals(
    rewards: Float[Tensor, " n"],
    continues: Float[Tensor, " n"],
    values: Float[Tensor, " n"],
    next_values: Float[Tensor, " n"],
    *,
    gamma: float,
) -> Float[Tensor, " n"]:
    """``delta_t = r_t + gamma continue_t V(s_{t+1}) - V(s_t)`` (Sutton & Barto 2018, eq. 6.5)."""
    return td_target(rewards, continues, next_values, gamma=gamma) - values.detach()


def gae(
    rewards: Float[Tensor, " n"],
    continues: Float[Tensor, " n"],
    values: Float[Tensor, " n"],
    next_values: Float[Tensor, " n"],
    offsets: Int[Tensor, " e+1"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, " n"]:
    """``A_t = delta_t + gamma lam continue_t A_{t+1}`` (Schulman et al. 2016, eq. 16), per turn.

    ``lam`` = 0 is the TD residual, ``lam`` = 1 the return (bootstrapped where the episode was cut) less V.

    A last step that continues into nothing logged (`bootstrap_mask`) has no residual, but the trace would carry one to
    the steps before it: give it as r = V, continue = 0, and mask it.
    """
    delta = td_residuals(rewards, continues, values, next_values, gamma=gamma)
    return reverse_scan(gamma * lam * continues, delta, offsets)


def n_step_returns(
    rewards: Float[Tensor, " n"],
    continues: Float[Tensor, " n"],
    next_values: Float[Tensor, " n"],
    offsets: Int[Tensor, " e+1"],
    *,
    gamma: float,
    steps: int,
) -> Float[Tensor, " n"]:
    """``r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n V(s_{t+n})`` for n = ``steps`` (Sutton & Barto 2018, eq. 7.1).

    Near an episode's end n is what is left of it. ``steps`` = 1 is `offline_lm.losses.td.td_target`.

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"returns of {steps} steps: at least 1 is wanted")
    held = _lengths(offsets, rewards.numel()) > 0
    ends = offsets[1:][held] - 1
    target = td_target(rewards, continues, next_values, gamma=gamma)
    for _ in range(steps - 1):
        following = target.roll(-1)
        following[ends] = next_values[ends]
        target = td_target(rewards, continues, following, gamma=gamma)
    return target


def lambda_returns(
    rewards: Float[Tensor, " n"],
    continues: Float[Tensor, " n"],
    next_values: Float[Tensor, " n"],
    offsets: Int[Tensor, " e+1"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, " n"]:
    """``G_t = r_t + gamma continue_t ((1 - lam) V(s_{t+1}) + lam G_{t+1})`` (Sutton & Barto 2018, eq. 12.18).

    After the last step G is V(s_T), so ``lam`` = 0 is the one-step TD target and ``lam`` = 1 Monte Carlo.
    """
    # What lam leaves over: all of V at the last step, since no G follows it.
    share = torch.full_like(next_values, 1.0 - lam)
    held = _lengths(offsets, rewards.numel()) > 0
    share[offsets[1:][held] - 1] = 1.0
    target = td_target(rewards, continues, share * next_values, gamma=gamma)
    return reverse_scan(gamma * lam * continues, target, offsets)
