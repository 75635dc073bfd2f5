"""The representation stage: teach a backbone, from the user's own logs, what a critic must read.

A critic that cannot tell whether a page fits a goal orders actions by habit, and one whose readout forgets the
action cannot order them at all. So before any value is bootstrapped the backbone answers questions about the logs
(`offline_lm.batches.questions`): does this goal belong here, or was it swapped with another task's; did the action
change the page; which of two actions led to the next one; how does the text go on; what was the action (asked at
its end, where Q is read); which return followed. Digi-Q (Bai et al. 2025) is the source of the idea.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from offline_lm.batches.questions import Questions
from offline_lm.losses.td import squared_loss
from offline_lm.models.backbone import hidden_states
from offline_lm.models.descent import descend


@dataclass(frozen=True)
class Weights:
    """What each part of the loss counts; 0 switches it off."""

    goal_swap: float
    returns: float
    next_token: float
    effect: float
    action_swap: float
    recall: float


class Answers(nn.Module):
    """What reads the answers off the hidden states; thrown away after the stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.goal = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.effect = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.swap = _mlp(2 * width)
        self.v, self.q = _mlp(width), _mlp(width)


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 1))


def loss(model: Any, answers: Answers, asked: Questions, weights: Weights) -> dict[str, Tensor]:
    """The weighted parts of the stage's loss; a part without a question in the batch is left out."""
    device = model.device
    hidden = hidden_states(model, asked.ids.to(device), asked.layout)
    prompts, branches = (hidden[at] for at in asked.layout.readouts())
    parts: dict[str, Tensor] = {}
    if weights.goal_swap and len(asked.goals):
        # K ways at once, which compares them, and each by itself, which makes the answer absolute
        logits = answers.goal(branches[asked.goals])[..., 0]
        truth = torch.zeros_like(logits)
        truth[:, 0] = 1.0
        parts["goal_swap"] = weights.goal_swap * (_first_of(logits) + binary_cross_entropy_with_logits(logits, truth))
    if weights.returns and len(asked.goals):
        own, acted = branches[asked.goals[:, 0]], asked.goal_acted.to(device)
        read = torch.where(acted, answers.q(own)[:, 0], answers.v(own)[:, 0])
        parts["goal_returns"] = weights.returns * _known_loss(read, asked.goal_returns.to(device))
    if not len(asked.action):
        return parts
    states, actions = prompts[asked.state], branches[asked.action]
    if weights.returns:
        both = torch.stack([answers.v(states)[:, 0], answers.q(actions)[:, 0]])
        parts["returns"] = weights.returns * _known_loss(both, asked.returns.to(device))
    if weights.recall:
        logits = model.lm_head(branches[asked.said[:, 0]])
        parts["recall"] = weights.recall * cross_entropy(logits, asked.said[:, 1].to(device))
    if weights.next_token:
        foretold = asked.targets >= 0
        logits = model.lm_head(hidden[foretold])
        parts["next_token"] = weights.next_token * cross_entropy(logits, asked.targets[foretold].to(device))
    followed = asked.after >= 0
    if weights.effect and followed.any():
        logits = answers.effect(actions[followed])[:, 0]
        changed = asked.changed[followed].to(device)
        parts["effect"] = weights.effect * binary_cross_entropy_with_logits(logits, changed)
    swapped = followed & (asked.other >= 0)
    if weights.action_swap and swapped.any():
        # which of the two led to the page after?
        after = prompts[asked.after[swapped]]
        pair = [answers.swap(torch.cat([branches[x[swapped]], after], dim=1)) for x in (asked.action, asked.other)]
        parts["action_swap"] = weights.action_swap * _first_of(torch.cat(pair, dim=1))
    return parts


def _known_loss(prediction: Tensor, returns: Tensor) -> Tensor:
    return squared_loss(prediction, returns, ~returns.isnan())


def _first_of(logits: Tensor) -> Tensor:
    """Cross-entropy of choosing the first of K: logits [n, K]."""
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def train(
    model: Any,
    batches: Iterator[Questions],
    weights: Weights,
    *,
    tokens: int,
    lr: float,
    seed: int,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Train `model` in place on about `tokens` tokens; the rate rises over 5 % of them and falls to a tenth.

    Args:
        on_step: called after every update with the tokens seen in it and the parts of the loss.

    Raises:
        FloatingPointError: the loss or a gradient is not finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = Answers(model.config.hidden_size).to(model.device)
    parameters = [*model.parameters(), *answers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    seen = 0
    for batch in batches:
        if seen >= tokens:
            return
        done = seen / tokens
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 20 * done + 0.01, 1.0 - 0.9 * done)
        parts = loss(model, answers, batch, weights)
        total = torch.stack(list(parts.values())).sum()
        descend(optimizer, parameters, total, after=f"{seen} tokens: lower model.stage.lr")
        seen += len(batch.ids)
        on_step(len(batch.ids), {name: part.item() for name, part in parts.items()})
