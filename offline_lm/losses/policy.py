"""Losses of the policy over packed responses, and what is measured of it; the clipped ones are in `clipping`.

The tokens of n responses lie end to end in one flat axis ``t``: no prompt, no padding, each response's end-of-turn
token included. ``owner`` says which response a token belongs to (ascending), ``logprobs`` is
``log pi(token | before)``, and an advantage belongs to a response and so to each of its tokens.

Every loss is a sum over tokens with the weights of `token_weights`, which are computed once for a whole update.
So the losses of micro-batches add up to that of one batch, and so do their gradients. What weighs 0 is left out: it
may be NaN, and reaches neither the loss nor a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Aggregate = Literal["sequence", "token", "constant", "sum"]


def token_weights(
    lengths: Int[Tensor, " n"],
    aggregate: Aggregate,
    *,
    constant: int | None = None,
    counted: Bool[Tensor, " n"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " t"]:
    """The weight of every token of an update of n responses, T tokens together.

    ``aggregate`` has no default, because each is another objective:

    - "sequence": ``1 / (n len_i)``, the mean over tokens, then over responses (GRPO: Shao et al. 2024, eq. 3);
    - "token": ``1 / T``, the mean over all tokens, so that long responses weigh more (DAPO: Yu et al. 2025, eq. 8);
    - "constant": ``1 / (n constant)``, a fixed number of tokens in place of the length (Dr. GRPO: Liu et al. 2025,
      section 3.2);
    - "sum": ``1 / n``, the log-probability of the whole response (REINFORCE: Williams 1992).

    Args:
        lengths: tokens of each response, the end-of-turn token among them; their sum is t.
        constant: the number of tokens of "constant", and of no other.
        counted: responses that count (all, if not given). The others weigh 0, and neither n nor T counts them.

    Raises:
        ValueError: ``aggregate`` is none of these, ``constant`` is missing, superfluous or below 1, shapes disagree, or
            a length is negative.
    """
    if counted is None:
        counted = torch.ones_like(lengths, dtype=torch.bool)
    if lengths.dim() != 1 or counted.shape != lengths.shape:
        raise ValueError(f"one length a response: lengths {tuple(lengths.shape)}, counted {tuple(counted.shape)}")
    if (lengths < 0).any():
        raise ValueError("a response has a negative length")
    if (aggregate == "constant") != (constant is not None) or (constant is not None and constant < 1):
        raise ValueError(f"'constant' is 1 or more with aggregate='constant', else None: {constant} with {aggregate!r}")
    n = counted.sum().to(dtype).expand(lengths.shape)
    if aggregate == "sequence":
        total = n * lengths
    elif aggregate == "token":
        total = lengths.where(counted, 0).sum().to(dtype).expand(lengths.shape)
    elif constant is not None:
        total = n * constant
    elif aggregate == "sum":
        total = n
    else:
        raise ValueError(f"aggregate must be 'sequence', 'token', 'constant' or 'sum', not {aggregate!r}")
    return total.reciprocal().where(counted, 0.0).repeat_interleave(lengths)


def sequence_logprob(
    logprobs: Float[Tensor, " t"], owner: Int[Tensor, " t"], n: int, *, reduce: Literal["sum", "mean"]
) -> Float[Tensor, " n"]:
    """``log pi(a|s)`` of each of n responses from ``log pi(token | before)`` of their tokens.

    ``reduce`` has no default, because the two are different quantities: "sum" is the log-probability, what
    importance ratios need; "mean" is per token, so that long responses do not outweigh short ones. A response
    without a token gives 0. Half precision is added up in float32.

    Raises:
        ValueError: ``reduce`` is neither, or shapes disagree.
    """
    check_tokens(logprobs, owner=owner)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    total = logprobs.new_zeros(n, dtype=dtype).index_add(0, owner, logprobs.to(dtype))
    if reduce == "sum":
        return total
    if reduce == "mean":
        return total / torch.bincount(owner, minlength=n).clamp(min=1)
    raise ValueError(f"reduce must be 'sum' or 'mean', not {reduce!r}")


def policy_gradient(
    logprobs: Float[Tensor, " t"],
    advantages: Float[Tensor, " n"],
    owner: Int[Tensor, " t"],
    weight: Float[Tensor, " t"],
) -> Float[Tensor, ""]:
    """``-sum_t w_t A_{o(t)} log pi(token_t)``, without gradient into the advantages (Williams 1992, section 5).

    With ``G - b`` for the advantages it is REINFORCE, with 1 behaviour cloning, with `awr_weights` AWR.

    Raises:
        ValueError: shapes disagree.
    """
    check_tokens(logprobs, owner=owner, weight=weight)
    logprobs, advantage = without_uncounted(weight, logprobs, of_tokens(advantages, owner))
    return -(weight.detach() * advantage * logprobs).sum()


@torch.no_grad()
def awr_weights(advantages: Float[Tensor, " n"], *, beta: float, w_max: float) -> tuple[Float[Tensor, " n"], float]:
    """``min(exp(A / beta), w_max)`` (Peng et al. 2019, algorithm 1; Nair et al. 2020, with the weights clipped).

    Returns:
        The weights, and the share that was clipped, of the advantages that are known. A NaN gives NaN.

    Raises:
        ValueError: ``beta`` or ``w_max`` is not positive.
    """
    if not (beta > 0 and w_max > 0):
        raise ValueError(f"beta and w_max must be positive: {beta}, {w_max}")
    scaled = advantages.to(torch.promote_types(advantages.dtype, torch.float32)) / beta
    clipped = scaled > math.log(w_max)  # before exp, which overflows
    weights = scaled.masked_fill(clipped, 0.0).exp().masked_fill(clipped, w_max)
    return weights, int(clipped.sum()) / max(int((~scaled.isnan()).sum()), 1)


def k3(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``exp(d) - d - 1`` for ``d = log p(x)/q(x)``: never negative, and with x drawn from q its mean is KL(q || p).

    Schulman 2020, "Approximating KL divergence". By expm1: in float32 the plain form is all rounding below d = 1e-3.
    """
    return log_ratio.expm1() - log_ratio


def kl_k3(
    logprobs: Float[Tensor, " t"], reference: Float[Tensor, " t"], weight: Float[Tensor, " t"]
) -> Float[Tensor, ""]:
    """``sum_t w_t (exp(d) - d - 1)``, ``d = reference - logprobs``: the penalty of Shao et al. 2024, eq. 4.

    It estimates KL(pi || reference) where the tokens were drawn from pi. On tokens of another policy it still is 0
    where the two agree and grows where they part, but it is not the divergence.

    Raises:
        ValueError: shapes disagree.
    """
    check_tokens(logprobs, reference=reference, weight=weight)
    logprobs, reference = without_uncounted(weight, logprobs, reference.detach())
    return (weight.detach() * k3(reference - logprobs)).sum()


@torch.no_grad()
def approx_kl(logprobs: Float[Tensor, " t"], sampled_from: Float[Tensor, " t"]) -> Float[Tensor, ""]:
    """Mean over tokens of `k3` for KL(sampled_from || pi): how far pi has gone from the policy that drew the tokens.

    Raises:
        ValueError: shapes disagree.
    """
    check_tokens(logprobs, sampled_from=sampled_from)
    return k3(logprobs - sampled_from).mean()


def entropy(logits: Float[Tensor, "t vocab"]) -> Float[Tensor, " t"]:
    """``-sum_a p(a) log p(a)`` of each token's distribution, in nats, with gradient.

    A logit of -inf (a token that is not allowed) adds nothing. Half precision is computed in float32.
    """
    logp = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # where: 0 * -inf is NaN
    return -(logp.exp() * logp.where(logp > -torch.inf, 0.0)).sum(dim=-1)


def check_tokens(logprobs: Tensor, **others: Tensor) -> None:
    """Raises ValueError if the log-probabilities are not ``[t]``, or one of the others is of another shape."""
    if logprobs.dim() != 1:
        raise ValueError(f"log-probabilities lie end to end, [t]; these have shape {tuple(logprobs.shape)}")
    for name, x in others.items():
        if x.shape != logprobs.shape:
            raise ValueError(f"{name} of shape {tuple(x.shape)} for {logprobs.numel()} tokens")


def of_tokens(advantages: Float[Tensor, " n"], owner: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """The advantage of each token's response, without gradient. Raises ValueError if they are not ``[n]``."""
    if advantages.dim() != 1:
        raise ValueError(f"one advantage a response, [n]; these have shape {tuple(advantages.shape)}")
    return advantages.detach()[owner]


def without_uncounted(weight: Tensor, *xs: Tensor) -> list[Tensor]:
    """0 where the weight is 0. Before anything is computed: 0 * NaN is NaN, in the gradient too."""
    return [x.where(weight != 0, 0.0) for x in xs]
