"""What the representation stage asks of logged steps, drawn as packed rows (DESIGN section 5).

A page with its own goal and with others'; and stretches of episodes, whose every step is asked whether its action
changed the page, which of two actions led to the next page, what the text goes on with, and what return followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import torch
from torch import Tensor

from offline_lm.batches.pack import Layout
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError

Array = np.ndarray


@dataclass(frozen=True)
class Questions:
    """One batch: a packed row, and where its questions are.

    Readouts are numbered as `Layout.readouts` gives them: prompts by sequence, branches in order.

    Attributes:
        ids: int64 [L].
        targets: int64 [L]: the next token, -100 where none is asked for.
        layout: of the row.
        goals: int64 [G, K], or [0]: branches that differ in their goal alone; the first has the episode's own.
        goal_returns: float32 [G]: the return that followed there, standardised; NaN where unknown.
        goal_acted: bool [G]: whether these branches end behind the action, or before it.
        state, action: int64 [T]: prompt and branch of every logged action in the stretches.
        returns: float32 [T]: the return that followed, standardised; NaN where unknown.
        other: int64 [T]: the branch of another action of the same page, -1 where there is none.
        after: int64 [T]: the prompt of the state after it, -1 where there is none.
        changed: float32 [T]: 1 where that shows another page.
        said: int64 [M, 2]: pairs of a logged action's branch and one of its tokens.
    """

    ids: Tensor
    targets: Tensor
    layout: Layout
    goals: Tensor
    goal_returns: Tensor
    goal_acted: Tensor
    state: Tensor
    action: Tensor
    returns: Tensor
    other: Tensor
    after: Tensor
    changed: Tensor
    said: Tensor


def draw(
    tokens: Tokens, replay: Replay, *, token_budget: int, goals_per_page: int, goals_first: int, seed: int
) -> Iterator[Questions]:
    """Endless batches of about `token_budget` tokens from the training episodes.

    At first pages with `goals_per_page` goals each, each page encoded once for all of them: half of these are read
    before the action, where V is read, half behind it, where Q is. After `goals_first` tokens three quarters of a batch
    are stretches of episodes. Asked from the start, the other questions are learnt first, by shortcuts, and matching
    goals takes more than twice as long. Logs in which fewer than two goals occur have no goal questions.

    Raises:
        UserError: no training step has a known return.
    """
    rng = np.random.default_rng(seed)
    train = ~replay.held_out_rows & tokens.usable
    goals = _Goals(tokens, replay, np.flatnonzero(train & tokens.acted))
    episodes = np.flatnonzero(~replay.held_out)
    known = replay.returns[train & ~np.isnan(replay.returns)]
    if not len(known):
        raise UserError("no training step has both a known return and a prompt that fits: raise data.max_tokens")
    returns = (replay.returns - known.mean()) / (known.std() or 1.0)
    seen = 0
    while True:
        row = _Row(tokens)
        if seen >= goals_first or not goals.rows.size:
            limit = 3 * token_budget // 4 if goals.rows.size else token_budget
            while row.length < limit:
                e = int(rng.choice(episodes))
                stretch = np.arange(int(replay.offsets[e]), int(replay.offsets[e + 1]))
                row.stretch(stretch[train[stretch]], returns, limit, rng)
        while goals.rows.size and row.length < token_budget:
            n, page, endings, acted = goals.ask(goals_per_page, rng)
            row.goals(page, endings, returns[n], acted)
        seen += row.length
        yield row.drawn()


class _Goals:
    """Pages asked about goals: their own, that with a word of another, and those of other training episodes, half of
    them much like it."""

    def __init__(self, tokens: Tokens, replay: Replay, rows: Array) -> None:
        self.tokens, self.episode = tokens, replay.episode_of
        # by text, not by task: tasks may share a goal, and the runs of one task may each have their own
        self.unique: dict[bytes, int] = {}
        self.texts: list[Array] = []
        self.own = np.full(len(replay.tasks), -1)
        for e, n in enumerate(replay.offsets[:-1]):
            if not replay.held_out[e] and tokens.goal_ptr[n, 1] > 0:
                text = tokens.prompt(n)[slice(*tokens.goal_ptr[n])]
                self.own[e] = self.unique.setdefault(text.tobytes(), len(self.unique))
                if len(self.unique) > len(self.texts):
                    self.texts.append(text)
        self.sets = [set(text.tolist()) for text in self.texts]
        self.alike: dict[int, Array] = {}
        asked = (self.own[self.episode[rows]] >= 0) & (tokens.goal_ptr[rows, 1] > 0) & (len(self.texts) > 1)
        self.rows = rows[asked]
        # a failed run may have lost its goal: it is drawn a quarter as often
        weight = np.where(replay.success >= 1, 1.0, 0.25)[self.episode[self.rows]]
        self.cumulative = np.cumsum(weight)

    def ask(self, k: int, rng: np.random.Generator) -> tuple[int, Array, list[Array], bool]:
        """A row; its page without the goal; endings of its prompt with k goals, the own first; is the action there?"""
        n = int(self.rows[np.searchsorted(self.cumulative, rng.random() * self.cumulative[-1], side="right")])
        start, stop = self.tokens.goal_ptr[n]
        prompt = self.tokens.prompt(n)
        tail = [prompt[stop:]]
        acted = bool(rng.random() < 0.5)
        if acted:
            tail.append(self.tokens.response(self.tokens.branch_ptr[n]))
        page = prompt[:start]
        return n, page, [np.concatenate([goal, *tail]) for goal in self.around(n, page, k, rng)], acted

    def around(self, n: int, page: Array, k: int, rng: np.random.Generator) -> list[Array]:
        """k goals: that of row n first, then others, none twice (fewer in a small set)."""
        own = int(self.own[self.episode[n]])
        if own not in self.alike:
            self.alike[own] = self._alike(own)
        alike = rng.permutation(self.alike[own]).tolist()
        n_others = min(k, len(self.texts)) - 1
        edits = (edited(self.texts[own], self.texts[i], page) for i in alike if n_others > 1)
        edit = next((goal for goal in edits if goal is not None), None)
        n_others -= edit is not None
        taken = {own} if edit is None else {own, self.unique.get(edit.tobytes())}
        others = dict.fromkeys([i for i in alike if i not in taken][: min(k // 2, n_others)])
        while len(others) < n_others:
            i = int(rng.integers(len(self.texts)))
            if i not in taken:
                others.setdefault(i, None)
        return [self.texts[own], *([] if edit is None else [edit]), *(self.texts[i] for i in others)]

    def _alike(self, i: int, k: int = 8, sample: int = 256) -> Array:
        """The k goals that share most tokens with goal i, among at most `sample`."""
        pool = np.random.default_rng(i).permutation(len(self.texts))[:sample]
        pool = pool[pool != i]
        shared = [len(self.sets[i] & self.sets[j]) / len(self.sets[i] | self.sets[j]) for j in pool]
        return pool[np.argsort(shared)[::-1][:k]]


def edited(goal: Array, other: Array, page: Array) -> Array | None:
    """`goal` with one stretch of its tokens as in `other`, so that it names what the page does not show; or None.

    What is replaced stands on the page and what replaces it does not, all of it: two wordings of one wish ("buy",
    "order") are left alone where the page shows neither. The last such stretch: what is wanted stands behind the verb.
    """
    shown = set(page.tolist())
    a, b = goal.tolist(), other.tolist()
    for tag, i, j, k, m in reversed(SequenceMatcher(None, a, b, autojunk=False).get_opcodes()):
        if tag == "replace" and shown.issuperset(a[i:j]) and not shown.intersection(b[k:m]):
            return np.array([*a[:i], *b[k:m], *a[j:]], goal.dtype)
    return None


class _Row:
    """A packed row under construction."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.length = self.n_branches = 0
        self.parts: list[Array] = []
        self.prompts: list[int] = []
        self.branches: list[list[int]] = []
        self.foretold: list[bool] = []
        self.choices: list[tuple[list[int], float, bool]] = []
        self.said: list[tuple[int, int]] = []
        self.columns: dict[str, list[float]] = {
            name: [] for name in ("state", "action", "returns", "other", "after", "changed")
        }

    def _add(self, prompt: Array, branches: Sequence[Array], foretold: bool) -> list[int]:
        self.parts += [prompt, *branches]
        self.prompts.append(len(prompt))
        self.branches.append([len(b) for b in branches])
        self.foretold.append(foretold)
        self.length += len(prompt) + sum(self.branches[-1])
        self.n_branches += len(branches)
        return list(range(self.n_branches - len(branches), self.n_branches))

    def goals(self, page: Array, endings: list[Array], returned: float, acted: bool) -> None:
        """A page with several goals; the first is its own."""
        self.choices.append((self._add(page, endings, foretold=False), returned, acted))

    def stretch(self, rows: Array, returns: Array, limit: int, rng: np.random.Generator) -> None:
        """Steps of one episode in order, each with its logged action and perhaps another one, up to `limit` tokens."""
        t = self.tokens
        start = int(rng.integers(max(1, len(rows) - 1)))
        for n in rows[start:]:
            first, stop = int(t.branch_ptr[n]), int(t.branch_ptr[n + 1])
            shown = [first] if t.acted[n] else []
            if t.acted[n] and stop - first > 1:
                shown.append(int(rng.integers(first + 1, stop)))
            branches = self._add(t.prompt(n), [t.response(a) for a in shown], foretold=True)
            if branches:
                followed = n + 1 in rows
                asked = {
                    "state": len(self.prompts) - 1,
                    "action": branches[0],
                    "returns": returns[n],
                    "other": branches[1] if len(branches) > 1 else -1,
                    "after": len(self.prompts) if followed else -1,
                    "changed": followed and t.page[n] != t.page[n + 1],
                }
                for name, value in asked.items():
                    self.columns[name].append(value)
                self.said += [(branches[0], token) for token in t.response(first).tolist()]
            if self.length >= limit:
                # the last step's successor was not shown
                if branches:
                    self.columns["after"][-1] = -1
                return

    def drawn(self) -> Questions:
        ids = torch.from_numpy(np.concatenate(self.parts).astype(np.int64))
        # text is foretold in stretches alone; what follows a prompt is its first branch, others begin unforeseen
        targets = torch.cat([ids[1:], ids.new_full((1,), -100)])
        at = 0
        for p, b, foretold in zip(self.prompts, self.branches, self.foretold, strict=True):
            for length in [p + b[0] if b else p, *b[1:]]:
                at += length
                targets[at - 1 if foretold else at - length : at] = -100
        integers = ("state", "action", "other", "after")
        whole = {name: torch.tensor(self.columns[name], dtype=torch.long) for name in integers}
        part = {name: torch.tensor(self.columns[name], dtype=torch.float32) for name in ("returns", "changed")}
        goals, returned, acted = zip(*self.choices, strict=True) if self.choices else ((), (), ())
        return Questions(
            ids,
            targets,
            Layout.of(self.prompts, self.branches),
            goals=torch.tensor(goals, dtype=torch.long),
            goal_returns=torch.tensor(returned, dtype=torch.float32),
            goal_acted=torch.tensor(acted, dtype=torch.bool),
            said=torch.tensor(self.said, dtype=torch.long).reshape(-1, 2),
            **whole,
            **part,
        )
