"""Implicit language Q-learning: the tokens of responses are the actions, the vocabulary is the action set (Snell 2022).

A token is foretold at the position before it: the prompt's last one for the first token of a response, then each token
of the response but the last. There V is the value of what has been said so far, and Q that of saying a token next.

The discount counts turns (DESIGN section 3), and a response adds none of its own: it is 1 from token to token, no
reward falls there, and the reward and ``gamma`` stand between the last token of a_t and the first position of s_{t+1}.
So V at the end of a prompt is V(s_t), and Q of a last token is r_t + gamma V(s_{t+1}): the turn's Q(s_t, a_t).

The tokens of n turns lie end to end in one axis ``t``, end-of-turn tokens included; a turn without a logged response (a
final observation) has length 0, and its state value alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from offline_lm.losses.returns import next_values
from offline_lm.losses.td import td_target


@torch.no_grad()
def token_targets(
    token_values: Float[Tensor, " t"],
    state_values: Float[Tensor, " n"],
    lengths: Int[Tensor, " n"],
    rewards: Float[Tensor, " n"],
    continues: Float[Tensor, " n"],
    offsets: Int[Tensor, " e+1"],
    *,
    gamma: float,
) -> Float[Tensor, " t"]:
    """What Q of every token follows: V at the next position of its response, of the last one r + gamma continue V(s').

    Snell et al. 2022, section 4.2, the Bellman target at the level of tokens.

    Args:
        token_values: V at the position before each token.
        state_values: V at the end of each turn's prompt.
        lengths: tokens of each turn's response.
        rewards, continues: of each turn; the reward of a turn without tokens does not count.
        offsets: the turns of episode e are ``offsets[e]:offsets[e+1]``. After its last turn V is 0, which only a
            terminated one may use (`offline_lm.losses.returns.bootstrap_mask`).

    Raises:
        ValueError: the lengths do not sum to t, or shapes disagree.
    """
    if token_values.dim() != 1 or int(lengths.sum()) != token_values.numel() or lengths.shape != state_values.shape:
        raise ValueError(
            f"lengths {tuple(lengths.shape)} with sum {int(lengths.sum())} for {tuple(token_values.shape)} values of"
            f" tokens and {tuple(state_values.shape)} of states"
        )
    of_turns = td_target(rewards, continues, next_values(state_values, offsets), gamma=gamma)
    said = lengths > 0
    out = token_values.roll(-1)
    out[lengths.cumsum(0)[said] - 1] = of_turns[said].to(out.dtype)
    return out


def token_cql(q: Float[Tensor, "k t vocab"], taken: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """``log sum_a exp Q_i(s, a) - Q_i(s, a_t)`` over the vocabulary, summed over the ensemble.

    The conservative penalty of Kumar et al. 2020 (eq. 4), which is the cross-entropy of the logged token with Q for
    logits (Snell et al. 2022, section 4.2).

    Raises:
        ValueError: not one taken token a position.
    """
    if q.dim() != 3 or taken.shape != q.shape[1:2]:
        raise ValueError(f"Q [k, t, vocab] and one token a position: {tuple(q.shape)} and {tuple(taken.shape)}")
    # per member, [t, vocab] at a time: [k * t, vocab] would be a copy of it all
    return torch.stack([cross_entropy(member, taken, reduction="none") for member in q]).sum(dim=0)


def taken_q(q: Float[Tensor, "k t vocab"], taken: Int[Tensor, " t"]) -> Float[Tensor, "k t"]:
    """Q of the tokens that were taken."""
    return q.gather(2, taken[None, :, None].expand(len(q), -1, 1))[..., 0]


def perturbed_logprobs(
    logits: Float[Tensor, "t vocab"], q_min: Float[Tensor, "t vocab"], *, beta: float
) -> Float[Tensor, "t vocab"]:
    """``log pi(a|s)`` for ``pi ~ pi_beta exp(beta (min Q - V))`` (Snell et al. 2022, section 4.3).

    V(s) is the same for all tokens of a position: the softmax takes it away, and so it is not asked for.

    Args:
        logits: of the behaviour policy, up to a constant of each position.
        beta: 0 is the behaviour policy; the greater, the greedier.

    Raises:
        ValueError: shapes disagree: broadcast, one position's Q would perturb all of them.
    """
    if logits.shape != q_min.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)} and Q of shape {tuple(q_min.shape)}")
    return torch.add(logits, q_min, alpha=beta).log_softmax(dim=-1)
