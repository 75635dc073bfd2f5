"""The representation stage: teach a backbone, from the user's own logs, what a critic must read.

Four questions about each logged step, none of which needs a reward (DESIGN section 5): what comes next in the text;
did the action change the page; which of two actions of this page led to the next one; does this goal belong to this
step of this episode, or was it swapped with another task's? A critic that cannot answer the last orders actions by
habit. Digi-Q (Bai et al. 2025) is the source of the first two of the classifications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from offline_lm.batches.pack import Layout
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.models.backbone import hidden_states

Array = np.ndarray


@dataclass(frozen=True)
class Weights:
    """What each part of the loss counts; 0 switches it off."""

    next_token: float
    effect: float
    action_swap: float
    goal_swap: float


class Questions(nn.Module):
    """The classifiers of the stage; thrown away after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.effect = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.swap = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))
        self.goal = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))


@dataclass(frozen=True)
class Drawn:
    """One batch of the stage: a packed row, and where its questions are.

    Attributes:
        ids: int64 [L]; layout: of S sequences, each with at most two responses.
        targets: int64 [L]: the next token, -100 at the ends.
        action: int64 [S]: readout (row of the branch readouts) of the executed action, -1 where there is none.
        other: int64 [S]: the same for a swapped one, -1 where there is none.
        after: int64 [S]: the sequence that shows the state after this one, -1 where there is none.
        changed: float32 [S]: 1 where the page after differs.
        fits: float32 [S]: 1 with the episode's own goal, 0 with another task's, NaN where nothing is asked.
    """

    ids: Tensor
    layout: Layout
    targets: Tensor
    action: Tensor
    other: Tensor
    after: Tensor
    changed: Tensor
    fits: Tensor


def loss(model: Any, questions: Questions, batch: Drawn, weights: Weights) -> dict[str, Tensor]:
    """The weighted parts of the stage's loss; a part without a question in the batch is left out."""
    hidden = hidden_states(model, batch.ids, batch.layout)
    at_v, at_q = batch.layout.readouts()
    states, actions = hidden[at_v], hidden[at_q]
    parts: dict[str, Tensor] = {}
    if weights.next_token:
        parts["next_token"] = weights.next_token * cross_entropy(model.lm_head(hidden), batch.targets)
    paired = (batch.action >= 0) & (batch.after >= 0)
    if weights.effect and paired.any():
        logit = questions.effect(actions[batch.action[paired]])[:, 0]
        parts["effect"] = weights.effect * binary_cross_entropy_with_logits(logit, batch.changed[paired])
    swapped = paired & (batch.other >= 0)
    if weights.action_swap and swapped.any():
        after = states[batch.after[swapped]]
        logits = torch.cat([
            questions.swap(torch.cat([actions[which[swapped]], after], dim=1))[:, 0] for which in (batch.action, batch.other)
        ])  # fmt: skip
        truth = torch.arange(2).repeat_interleave(len(after)).eq(0).float()
        parts["action_swap"] = weights.action_swap * binary_cross_entropy_with_logits(logits, truth)
    asked = (batch.action >= 0) & ~batch.fits.isnan()
    if weights.goal_swap and asked.any():
        # asked twice: of the state alone, and of state and action
        for name, readout in (("goal_state", states[asked]), ("goal_action", actions[batch.action[asked]])):
            logit = questions.goal(readout)[:, 0]
            parts[name] = 0.5 * weights.goal_swap * binary_cross_entropy_with_logits(logit, batch.fits[asked])
    return parts


def draw(tokens: Tokens, replay: Replay, weights: Weights, *, token_budget: int, seed: int) -> Iterator[Drawn]:
    """Endless batches of about `token_budget` tokens from the training episodes.

    Half of the tokens are pairs of consecutive states (effect and action swap), half are steps shown twice, with
    their own goal and with another task's (goal swap).
    """
    rng = np.random.default_rng(seed)
    train = ~replay.held_out_rows & tokens.usable
    acted = np.flatnonzero(train & tokens.acted)
    followed = acted[(replay.steps_to_end[acted] > 0) & train[np.minimum(acted + 1, len(tokens) - 1)]]
    goals = _Goals(tokens, replay)
    askable = goals.askable(acted)
    while True:
        row = _Row(tokens)
        use_goals = bool(weights.goal_swap) and len(askable) > 0
        use_pairs = bool(weights.effect or weights.action_swap or weights.next_token) and len(followed) > 0
        while use_pairs and row.length < token_budget / (2 if use_goals else 1):
            n = int(rng.choice(followed))
            first, stop = tokens.branch_ptr[n], tokens.branch_ptr[n + 1]
            others = [int(rng.integers(first + 1, stop))] if stop - first > 1 else []
            row.add(tokens.prompt(n), [int(first), *others], after=True, changed=tokens.page[n] != tokens.page[n + 1])
            row.add(tokens.prompt(n + 1), [])
        while use_goals and row.length < token_budget:
            n = int(rng.choice(askable))
            response = [int(tokens.branch_ptr[n])]
            row.add(tokens.prompt(n), response, fits=1.0)
            row.add(goals.swapped(n, rng), response, fits=0.0)
        if not row.length:
            return
        yield row.drawn()


class _Goals:
    """Swaps the goal of a prompt with another task's; half of the time with one of those most like it."""

    def __init__(self, tokens: Tokens, replay: Replay, alike: int = 5) -> None:
        self.tokens, self.episode = tokens, replay.episode_of
        self.tasks = replay.tasks
        first = {}
        for e, task in enumerate(replay.tasks):
            n = int(replay.offsets[e])
            if not replay.held_out[e] and tokens.goal_ptr[n, 1] > 0:
                first.setdefault(task, n)
        self.names = list(first)
        self.texts = [self._goal(n) for n in first.values()]
        sets = [set(t.tolist()) for t in self.texts]
        index = {task: i for i, task in enumerate(self.names)}
        self.index = np.array([index.get(task, -1) for task in replay.tasks])
        self.alike = [self._nearest(i, sets, alike) for i in range(len(sets))] if len(sets) > 1 else []
        self.weight = np.where(replay.success == 1, 1.0, 0.25)  # a failed run may have left its goal

    def _goal(self, n: int) -> Array:
        start, stop = self.tokens.goal_ptr[n]
        return self.tokens.prompt(n)[start:stop]

    @staticmethod
    def _nearest(i: int, sets: list[set[int]], k: int) -> Array:
        # tokens that most goals share say nothing: overlap is counted over sampled goals only, to stay linear
        pool = np.random.default_rng(i).permutation(len(sets))[:256]
        overlap = [-1.0 if j == i else len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for j in pool]
        return pool[np.argsort(overlap)[::-1][:k]][: max(1, min(k, len(pool) - 1))]

    def askable(self, rows: Array) -> Array:
        """Those of `rows` with a goal to swap, drawn with replacement once so that successes weigh more."""
        if len(self.names) < 2 or not len(rows):
            return rows[:0]
        rows = rows[(self.tokens.goal_ptr[rows, 1] > 0) & (self.index[self.episode[rows]] >= 0)]
        if not len(rows):
            return rows
        weight = self.weight[self.episode[rows]]
        return np.random.default_rng(0).choice(rows, size=4 * len(rows), p=weight / weight.sum())

    def swapped(self, n: int, rng: np.random.Generator) -> Array:
        own = self.index[self.episode[n]]
        if rng.random() < 0.5:
            other = int(rng.choice(self.alike[own]))
        else:
            other = int(rng.integers(len(self.names) - 1))
            other += other >= own
        start, stop = self.tokens.goal_ptr[n]
        prompt = self.tokens.prompt(n)
        return np.concatenate([prompt[:start], self.texts[other], prompt[stop:]])


class _Row:
    """A packed row under construction."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens, self.length = tokens, 0
        self.parts: list[Array] = []
        self.prompts: list[int] = []
        self.branches: list[list[int]] = []
        self.columns: dict[str, list[float]] = {k: [] for k in ("action", "other", "after", "changed", "fits")}
        self.readouts = 0

    def add(self, prompt: Array, responses: list[int], *, after: bool = False, changed: bool = False, fits: float = float("nan")) -> None:
        texts = [self.tokens.response(a) for a in responses]
        self.parts += [prompt, *texts]
        self.prompts.append(len(prompt))
        self.branches.append([len(t) for t in texts])
        self.length += len(prompt) + sum(map(len, texts))
        asked = {
            "action": self.readouts if responses else -1,
            "other": self.readouts + 1 if len(responses) > 1 else -1,
            "after": len(self.prompts) if after else -1,
            "changed": changed,
            "fits": fits,
        }
        for name, value in asked.items():
            self.columns[name].append(value)
        self.readouts += len(responses)

    def drawn(self) -> Drawn:
        ids = torch.from_numpy(np.concatenate(self.parts).astype(np.int64))
        layout = Layout(self.prompts, self.branches)
        # the token after a prompt is the executed response's first; other branches begin and end without one
        targets = torch.full_like(ids, -100)
        targets[:-1] = ids[1:]
        at = 0
        for p, b in zip(self.prompts, self.branches, strict=True):
            for length in [p + b[0] if b else p, *b[1:]]:
                at += length
                targets[at - 1] = -100
        whole = {k: torch.tensor(self.columns[k]) for k in ("action", "other", "after")}
        part = {k: torch.tensor(self.columns[k], dtype=torch.float32) for k in ("changed", "fits")}
        return Drawn(ids, layout, targets, **whole, **part)


def train(
    model: Any,
    batches: Iterator[Drawn],
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
        questions = Questions(model.config.hidden_size)
    parameters = [*model.parameters(), *questions.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    seen = 0
    for batch in batches:
        if seen >= tokens:
            return
        done = seen / tokens
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 20 * done + 0.01, 1.0 - 0.9 * done)
        parts = loss(model, questions, batch, weights)
        total = torch.stack(list(parts.values())).sum()
        if not total.isfinite():
            raise FloatingPointError(f"the representation loss is {total.item()} after {seen} tokens: lower model.stage.lr")
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        seen += len(batch.ids)
        on_step(len(batch.ids), {name: part.item() for name, part in parts.items()})
