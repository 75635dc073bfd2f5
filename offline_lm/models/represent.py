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
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from offline_lm.batches.pack import Layout
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.models.backbone import hidden_states

Array = np.ndarray


@dataclass(frozen=True)
class Weights:
    """What each part of the loss counts; 0 switches it off."""

    goal_swap: float
    returns: float
    next_token: float
    effect: float
    action_swap: float


class Questions(nn.Module):
    """The classifiers of the stage; thrown away after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.effect = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.swap = _mlp(2 * width, width, 1)
        self.goal = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.returns = _mlp(width, width, 2)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


@dataclass(frozen=True)
class Drawn:
    """One batch of the stage: a packed row, and where its questions are.

    Readouts are numbered as `Layout.readouts` gives them: prompts by sequence, branches in order.

    Attributes:
        ids: int64 [L]; targets: int64 [L]: the next token, -100 where none follows.
        layout: of the row.
        action, after, changed: [P]: the branch of an executed action, the prompt of the state after it, and float32
            whether the page changed.
        other: int64 [P]: the branch of another action of the same page, -1 where there is none.
        goals: int64 [G, K]: branches that differ in their goal alone; the first has the episode's own.
        returns: float32 [G]: the logged return there, NaN where unknown.
        acted: int64 [G]: 1 where the branches end behind the action, 0 where before it.
    """

    ids: Tensor
    targets: Tensor
    layout: Layout
    action: Tensor
    after: Tensor
    changed: Tensor
    other: Tensor
    goals: Tensor
    returns: Tensor
    acted: Tensor


def loss(model: Any, questions: Questions, batch: Drawn, weights: Weights) -> dict[str, Tensor]:
    """The weighted parts of the stage's loss; a part without a question in the batch is left out."""
    hidden = hidden_states(model, batch.ids.to(model.device), batch.layout)
    states, actions = (hidden[at] for at in batch.layout.readouts())
    parts: dict[str, Tensor] = {}
    if weights.goal_swap and len(batch.goals):
        # K ways at once, which compares them, and each by itself, which makes the answer absolute
        logits = questions.goal(actions[batch.goals])[..., 0]
        truth = torch.zeros_like(logits)
        truth[:, 0] = 1.0
        parts["goal_swap"] = weights.goal_swap * (_first_of(logits) + binary_cross_entropy_with_logits(logits, truth))
    known = ~batch.returns.isnan()
    if weights.returns and known.any():
        read = questions.returns(actions[batch.goals[known, 0]]).gather(1, batch.acted[known, None].to(model.device))[
            :, 0
        ]
        parts["returns"] = weights.returns * mse_loss(read, batch.returns[known].to(model.device))
    if not len(batch.action):
        return parts
    if weights.next_token:
        foreseen = batch.targets >= 0
        parts["next_token"] = weights.next_token * cross_entropy(
            model.lm_head(hidden[foreseen]), batch.targets[foreseen].to(model.device)
        )
    if weights.effect:
        logit = questions.effect(actions[batch.action])[:, 0]
        parts["effect"] = weights.effect * binary_cross_entropy_with_logits(logit, batch.changed.to(model.device))
    swapped = batch.other >= 0
    if weights.action_swap and swapped.any():
        # which of the two led to the page after?
        after = states[batch.after[swapped]]
        pair = [questions.swap(torch.cat([actions[x[swapped]], after], dim=1)) for x in (batch.action, batch.other)]
        parts["action_swap"] = weights.action_swap * _first_of(torch.cat(pair, dim=1))
    return parts


def _first_of(logits: Tensor) -> Tensor:
    """Cross-entropy of choosing the first of K: logits [n, K]."""
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def draw(
    tokens: Tokens,
    replay: Replay,
    weights: Weights,
    *,
    token_budget: int,
    goals_per_page: int,
    pairs_after: int,
    seed: int,
) -> Iterator[Drawn]:
    """Endless batches of about `token_budget` tokens from the training episodes.

    A batch is pages with their own goal and others', each page encoded once for all of them; half of these are read
    before the action, where V is read, half behind it, where Q is. After `pairs_after` tokens a quarter of each batch
    is pairs of consecutive states, for the other questions: asked from the start, they are learnt first and by
    shortcuts, and goal matching took more than twice as long.
    """
    rng = np.random.default_rng(seed)
    train = ~replay.held_out_rows & tokens.usable
    acted = np.flatnonzero(train & tokens.acted)
    followed = acted[(replay.steps_to_end[acted] > 0) & train[np.minimum(acted + 1, len(tokens) - 1)]]
    goals = _Goals(tokens, replay)
    askable, likely = goals.askable(acted)
    use_goals = bool(weights.goal_swap) and len(askable) > 0
    use_pairs = bool(weights.effect or weights.action_swap or weights.next_token) and len(followed) > 0
    seen = 0
    while use_goals or use_pairs:
        row = _Row()
        share = 0.25 if use_goals else 1.0
        while use_pairs and (seen >= pairs_after or not use_goals) and row.length < share * token_budget:
            n = int(rng.choice(followed))
            first, stop = tokens.branch_ptr[n], tokens.branch_ptr[n + 1]
            shown = [int(first)] + ([int(rng.integers(first + 1, stop))] if stop - first > 1 else [])
            changed = tokens.page[n] != tokens.page[n + 1]
            row.pair(tokens.prompt(n), [tokens.response(a) for a in shown], tokens.prompt(n + 1), changed)
        while use_goals and row.length < token_budget:
            n = int(rng.choice(askable, p=likely))
            start, stop = tokens.goal_ptr[n]
            prompt, response = tokens.prompt(n), tokens.response(tokens.branch_ptr[n])
            acted = rng.random() < 0.5
            tail = [prompt[stop:], response] if acted else [prompt[stop:]]
            endings = [np.concatenate([goal, *tail]) for goal in goals.around(n, goals_per_page, rng)]
            row.goals(prompt[:start], endings, replay.returns[n], acted)
        seen += row.length
        yield row.drawn()


class _Goals:
    """The goals that a page is asked about: its own, and those of other training tasks, half of them much like it."""

    def __init__(self, tokens: Tokens, replay: Replay) -> None:
        self.tokens, self.episode = tokens, replay.episode_of
        # by text, not by task: tasks may share a goal, and the runs of one task may each have their own
        unique: dict[bytes, int] = {}
        self.texts: list[Array] = []
        self.own = np.full(len(replay.tasks), -1)
        for e, n in enumerate(replay.offsets[:-1]):
            if not replay.held_out[e] and tokens.goal_ptr[n, 1] > 0:
                text = tokens.prompt(n)[slice(*tokens.goal_ptr[n])]
                self.own[e] = unique.setdefault(text.tobytes(), len(unique))
                if len(unique) > len(self.texts):
                    self.texts.append(text)
        self.alike = [_alike(i, self.texts) for i in range(len(self.texts))]
        self.weight = np.where(replay.success >= 1, 1.0, 0.25)  # a failed run may have lost its goal

    def askable(self, rows: Array) -> tuple[Array, Array]:
        """Those of `rows` with a goal and others to confuse it with, and how often each is to be drawn."""
        episode = self.episode[rows]
        rows = rows[(self.own[episode] >= 0) & (self.tokens.goal_ptr[rows, 1] > 0) & (len(self.texts) > 1)]
        weight = self.weight[self.episode[rows]]
        return rows, weight / weight.sum() if len(rows) else weight

    def around(self, n: int, k: int, rng: np.random.Generator) -> list[Array]:
        """k goals: that of row n first, then others, none twice (fewer in a small set)."""
        own = int(self.own[self.episode[n]])
        others = [i for i in rng.choice(self.alike[own], min(k // 2, len(self.alike[own])), replace=False)]
        far = [i for i in rng.permutation(len(self.texts)) if i != own and i not in others]
        return [self.texts[i] for i in [own, *others, *far][:k]]


def _alike(i: int, texts: list[Array], k: int = 8, sample: int = 256) -> Array:
    """The k goals that share most tokens with goal i, among at most `sample` (so that the whole stays linear)."""
    pool = np.random.default_rng(i).permutation(len(texts))[:sample]
    pool = pool[pool != i]
    mine = set(texts[i].tolist())
    shared = [len(mine & set(texts[j].tolist())) / len(mine | set(texts[j].tolist())) for j in pool]
    return pool[np.argsort(shared)[::-1][:k]]


class _Row:
    """A packed row under construction."""

    def __init__(self) -> None:
        self.length = self.n_branches = 0
        self.parts: list[Array] = []
        self.prompts: list[int] = []
        self.branches: list[list[int]] = []
        self.pairs: list[tuple[int, int, float, int]] = []
        self.foreseen: list[bool] = []
        self.choices: list[tuple[list[int], float, int]] = []

    def _add(self, prompt: Array, branches: list[Array], foreseen: bool) -> list[int]:
        self.parts += [prompt, *branches]
        self.prompts.append(len(prompt))
        self.branches.append([len(b) for b in branches])
        self.foreseen.append(foreseen)
        self.length += len(prompt) + sum(self.branches[-1])
        self.n_branches += len(branches)
        return list(range(self.n_branches - len(branches), self.n_branches))

    def pair(self, prompt: Array, responses: list[Array], after: Array, changed: bool) -> None:
        """A state with its executed action, perhaps another one, and the state that followed."""
        branches = self._add(prompt, responses, True)
        self._add(after, [], True)
        other = branches[1] if len(branches) > 1 else -1
        self.pairs.append((branches[0], len(self.prompts) - 1, float(changed), other))

    def goals(self, page: Array, endings: list[Array], returned: float, acted: bool) -> None:
        """A page with several goals; the first is its own."""
        self.choices.append((self._add(page, endings, False), returned, int(acted)))

    def drawn(self) -> Drawn:
        ids = torch.from_numpy(np.concatenate(self.parts).astype(np.int64))
        # text is foretold in pairs alone; what follows a prompt is its first branch, the others begin unforeseen
        targets = torch.cat([ids[1:], ids.new_full((1,), -100)])
        at = 0
        for p, b, foreseen in zip(self.prompts, self.branches, self.foreseen, strict=True):
            for length in [p + b[0] if b else p, *b[1:]]:
                at += length
                targets[at - 1 if foreseen else at - length : at] = -100
        goals, returns, acted = zip(*self.choices, strict=True) if self.choices else ((), (), ())
        action, after, changed, other = zip(*self.pairs, strict=True) if self.pairs else ((), (), (), ())
        return Drawn(
            ids, targets, Layout(self.prompts, self.branches), torch.tensor(action, dtype=torch.long),
            torch.tensor(after, dtype=torch.long), torch.tensor(changed), torch.tensor(other, dtype=torch.long),
            torch.tensor(goals, dtype=torch.long), torch.tensor(returns, dtype=torch.float32),
            torch.tensor(acted, dtype=torch.long),
        )  # fmt: skip


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
        questions = Questions(model.config.hidden_size).to(model.device)
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
            raise FloatingPointError(f"the loss is {total.item()} after {seen} tokens: lower model.stage.lr")
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        seen += len(batch.ids)
        on_step(len(batch.ids), {name: part.item() for name, part in parts.items()})
