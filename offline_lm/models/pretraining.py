"""Pretraining of the reader: a small language model judges actions on generated pages (`offline_lm.reading`).

Each page is encoded once for all goals asked of it, each goal once for all actions judged under it. At the end of a
goal, where V is read, the model says whether the page fits it; at the end of an action, where Q is read, whether the
action is right; and it writes the right action token by token. Halfway up it says of every token of a goal whether it
stands so on the page, and of an action whether it stands so in the goal: what is to be compared is found early then.
An action that names an element by number is read with that element's line, as critics read it (`batches.grounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from offline_lm.batches import render
from offline_lm.batches.grounding import notes
from offline_lm.batches.pack import Layout
from offline_lm.batches.tokens import encode
from offline_lm.models.backbone import halfway_and_last
from offline_lm.models.descent import descend
from offline_lm.reading.scenes import Question, Scene, scenes

WEIGHTS = {"grade": 0.3, "said": 0.1}
"""Of the parts of the loss; the others count 1."""


@dataclass(frozen=True)
class Sheet:
    """One packed row of scenes; the Q goals are the layout's prompts, the A actions its branches.

    Attributes:
        ids: int64 [L].
        layout: a page's trunk, its goals' segments, and theirs of actions.
        met: float32 [Q]: whether the page fits the goal; NaN where that is not asked.
        question: int64 [A]: the goal that an action is judged under.
        right, grade: float32 [A]: whether it is right, and what share of the goal it meets; NaN where undefined.
        seen: int64 [N, 2]: a place in the row, and whether its token and the one before it stand so on the page (in a
            goal) or in the goal (in an action).
        said: int64 [M, 2]: a place in the row, and the token of a right action that follows it.
        scene: int64 [Q]: the page that a goal is asked on.
        skill: of each goal, its `Question.skill`.
    """

    ids: Tensor
    layout: Layout
    met: Tensor
    question: Tensor
    right: Tensor
    grade: Tensor
    seen: Tensor
    said: Tensor
    scene: Tensor
    skill: list[str]


def sheet(tokenizer: Any, seed: int, number: int, *, easy: float, grounded: bool, tokens: int) -> Sheet:
    """Row `number` of at least `tokens` tokens, its last scene whole; a function of its arguments alone.

    Args:
        easy: share of simple pages.
        grounded: whether actions are read with the line that they name.
    """
    frame = render.frame(tokenizer)
    marks = encode(tokenizer, (frame.before, frame.after, frame.end), special=True)
    row = _Row([marks[text] for text in (frame.before, frame.after, frame.end)], grounded)
    drawn = scenes(f"{seed} {number}", easy=easy)
    while row.length < tokens:
        some = list(islice(drawn, 8))
        ids = encode(tokenizer, chain.from_iterable(_texts(scene, grounded) for scene in some))
        for scene in some:
            if row.length < tokens:
                row.add(scene, ids)
    return row.sheet()


def _texts(scene: Scene, grounded: bool) -> Iterator[str]:
    yield from map(render.past_text, scene.past)
    yield _page(scene)
    for asked in scene.questions:
        yield render.goal_text(asked.goal)
        yield from _acts(asked, scene, grounded)


def _acts(asked: Question, scene: Scene, grounded: bool) -> list[str]:
    """The actions judged under a goal, as they are read."""
    acts = [act.text for act in asked.acts]
    return [text + line for text, line in zip(acts, notes(acts, scene.page), strict=True)] if grounded else acts


def _page(scene: Scene) -> str:
    return render.page_text({"url": scene.url, "observation": scene.page})


class _Row:
    """A `Sheet` under construction."""

    def __init__(self, frame: Sequence[list[int]], grounded: bool) -> None:
        self.frame, self.grounded = frame, grounded
        self.length = 0
        self.ids: list[int] = []
        self.trunks: list[int] = []
        self.segments: list[tuple[int, int, int, int]] = []  # owner, tokens of the trunk seen, parent, size
        self.prompt_ends: list[int] = []
        self.branch_ends: list[int] = []
        self.met: list[float] = []
        self.acts: list[tuple[int, float, float]] = []
        self.seen: list[tuple[int, int]] = []
        self.said: list[tuple[int, int]] = []
        self.scene: list[int] = []
        self.skill: list[str] = []

    def add(self, scene: Scene, ids: dict[str, list[int]]) -> None:
        before, after, end = self.frame
        past = chain.from_iterable(ids[render.past_text(did)] for did in scene.past)
        trunk = [*before, *past, *ids[_page(scene)]]
        shown = set(pairwise(trunk))
        owner = len(self.trunks)
        self.trunks.append(len(trunk))
        self.ids += trunk
        for asked in scene.questions:
            goal = [*ids[render.goal_text(asked.goal)], *after]
            parent = len(self.segments)
            self.segments.append((owner, len(trunk), -1, len(goal)))
            named = set(pairwise(goal))
            self._compared(goal[: len(goal) - len(after)], shown)
            self.ids += goal
            goal_end = len(self.ids) - 1
            for act, read in zip(asked.acts, _acts(asked, scene, self.grounded), strict=True):
                text = [*ids[read], *end]
                self.segments.append((owner, len(trunk), parent, len(text)))
                self._compared(text, named)
                if act.right:
                    begin = len(self.ids)
                    self.said += zip([goal_end, *range(begin, begin + len(text) - 1)], text, strict=True)
                self.ids += text
                self.branch_ends.append(len(self.ids) - 1)
                self.acts.append((len(self.met), float(act.right), act.grade))
            self.prompt_ends.append(goal_end)
            self.met.append(asked.met)
            self.scene.append(owner)
            self.skill.append(asked.skill)
        self.length = len(self.ids)

    def _compared(self, text: list[int], there: set[tuple[int, int]]) -> None:
        begin = len(self.ids)
        self.seen += ((begin + i, pair in there) for i, pair in enumerate(pairwise(text), 1))

    def sheet(self) -> Sheet:
        owner, seen, parent, sizes = np.array(self.segments, np.int64).T
        layout = Layout(
            np.array(self.trunks), owner, seen, parent, sizes, np.array(self.prompt_ends), np.array(self.branch_ends)
        )
        question, right, grade = zip(*self.acts, strict=True)
        return Sheet(
            torch.tensor(self.ids),
            layout,
            torch.tensor(self.met),
            torch.tensor(question),
            torch.tensor(right),
            torch.tensor(grade),
            torch.tensor(self.seen, dtype=torch.long).reshape(-1, 2),
            torch.tensor(self.said, dtype=torch.long).reshape(-1, 2),
            torch.tensor(self.scene),
            self.skill,
        )


class Judge(nn.Module):
    """Reads the answers off the hidden states, linearly, so that they stand there for any head; thrown away later."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.met, self.right, self.grade, self.seen = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1)) for _ in range(4)
        )  # fmt: skip


def loss(model: Any, judge: Judge, sheet: Sheet) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of the loss, and for each action the logit [A] that it is right."""
    device = model.device
    halfway, hidden = halfway_and_last(model, sheet.ids.to(device), sheet.layout)
    prompts, branches = (hidden[at.to(device)] for at in sheet.layout.readouts())
    right, grade, question, said = (x.to(device) for x in (sheet.right, sheet.grade, sheet.question, sheet.said))
    seen = sheet.seen.to(device)
    asked = ~sheet.met.isnan()
    met, fits = sheet.met[asked].to(device), judge.met(prompts[asked.to(device)])[:, 0]
    logits, grades = judge.right(branches)[:, 0], judge.grade(branches)[:, 0]
    known = ~grade.isnan()
    parts = {
        "right": _cross_entropy(logits, right),
        "choice": choice_loss(logits, right, question, len(sheet.met)),
        "met": _cross_entropy(fits, met),
        "which": choice_loss(fits, met, sheet.scene[asked].to(device), len(sheet.layout.trunks)),
        "grade": WEIGHTS["grade"] * _cross_entropy(grades[known], grade[known]),
        # halfway up, so that the layers above can use it
        "seen": _cross_entropy(judge.seen(halfway[seen[:, 0]])[:, 0], seen[:, 1].float()),
        "said": WEIGHTS["said"] * cross_entropy(model.lm_head(hidden[said[:, 0]]), said[:, 1]),
    }
    return parts, logits.detach()


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over what is asked; 0 if a short row asks nothing of the kind."""
    return binary_cross_entropy_with_logits(logits, wanted) if len(wanted) else logits.sum()


def choice_loss(logits: Tensor, right: Tensor, question: Tensor, n: int) -> Tensor:
    """-log of the share that right actions have in the softmax over all of their question, mean over questions.

    Args:
        logits, right: [A]; question: int64 [A] in 0..n-1. A question without a right or without a wrong one does not
            count; 0 if none does.
    """
    top = logits.new_full((n,), -torch.inf).scatter_reduce(0, question, logits.detach(), "amax")
    mass = (logits - top[question]).exp()
    whole = torch.zeros_like(top).index_add(0, question, mass)
    good = torch.zeros_like(top).index_add(0, question, mass * right)
    asked = (torch.zeros_like(top).index_add(0, question, right) > 0) & (
        torch.zeros_like(top).index_add(0, question, 1 - right) > 0
    )
    return (whole[asked].log() - good[asked].clamp_min(1e-30).log()).sum() / asked.sum().clamp_min(1)


def chosen(logits: Tensor, sheet: Sheet) -> list[tuple[str, bool]]:
    """For each question its skill, and whether the action with the highest logit is a right one."""
    counts = torch.bincount(sheet.question, minlength=len(sheet.skill)).tolist()
    best = [int(part.argmax()) for part in logits.cpu().split(counts)]
    right = [bool(part[i]) for part, i in zip(sheet.right.split(counts), best, strict=True)]
    return list(zip(sheet.skill, right, strict=True))


def texts(seed: int, n: int) -> Iterator[str]:
    """What a tokenizer for such rows must cover: the texts of n scenes."""
    for scene in islice(scenes(f"{seed} texts"), n):
        yield from _texts(scene, grounded=False)


def train(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    batch_tokens: int,
    easy: float,
    grounding: float,
    lr: float,
    seed: int,
    at: Path,
    on_step: Callable[[int, int, dict[str, float], Iterable[tuple[str, bool]]], None],
) -> Judge:
    """Train in place, a row an update.

    Args:
        tokens: of all updates together, about.
        batch_tokens: of an update.
        easy: share of the updates in which the share of simple pages falls from all to a tenth.
        grounding: share of the updates in which actions are read with the line that they name.
        at: file in which the state is kept after every hundredth, and from which training goes on if it is there, to
            the same weights bit for bit.
        on_step: called after each update with how many are done, of how many, the loss's parts, and each question's
            skill and whether it was answered right.

    Raises:
        FloatingPointError: the loss or a gradient is not finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge(model.config.hidden_size).to(model.device)
    parameters = [*model.parameters(), *judge.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    begin, n = 0, max(1, tokens // batch_tokens)
    if at.exists():
        state = torch.load(at, map_location=model.device, weights_only=True)
        model.load_state_dict(state["model"])
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["updates"]
    model.train()

    for update in range(begin, n):
        done = update / n
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 50 * done + 0.01, 1.02 - done)
        grounded = Random(f"{seed} {update} grounding").random() < grounding
        simple = max(0.1, 1 - done / easy)
        row = sheet(tokenizer, seed, update, easy=simple, grounded=grounded, tokens=batch_tokens)
        parts, logits = loss(model, judge, row)
        total = torch.stack(list(parts.values())).sum()
        descend(optimizer, parameters, total, after=f"{update} updates: lower lr")
        on_step(update + 1, n, {name: part.item() for name, part in parts.items()}, chosen(logits, row))
        if 100 * (update + 1) // n > 100 * update // n:
            state = {"model": model.state_dict(), "judge": judge.state_dict(), "updates": update + 1}
            torch.save({**state, "optimizer": optimizer.state_dict()}, at.with_suffix(".new"))
            at.with_suffix(".new").replace(at)
    return judge
