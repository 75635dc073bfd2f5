"""Linear probes: is the answer to a question about a page linearly there, where a critic reads its value?

A probe is a logistic regression on frozen features (Alain & Bengio 2016): the hidden state at the end of the prompt for
questions about a state, at the end of each action for questions about actions. It is trained on pages whose words do
not occur in the pages that it is tested on (`probe_words`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline_lm.batches.grounding import notes
from offline_lm.batches.tokens import tokenize
from offline_lm.models import features
from offline_lm.ope.probe_pages import Question, Split

Array = np.ndarray

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""L2 strengths to choose from, per mean loss over standardised features."""

_MAX_TOKENS = 4096

_UNLOGGED = (
    "start_url", "url", "messages", "observation_error", "action", "response", "tokenizer_id", "prompt_token_ids",
    "response_token_ids",
)  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """A trained probe: the log-odds of "right" of features [n, d] are `score(x)` float64 [n]."""

    mean: Array
    scale: Array
    weight: Array
    bias: float

    def score(self, x: Array) -> Array:
        return ((x - self.mean) / self.scale) @ self.weight + self.bias


@dataclass(frozen=True)
class Outcome:
    """How a probe did on its Q test questions.

    Attributes:
        pairwise: [Q] share of the wrong candidates that the right one is above, a tie counting half; for a question
            without candidates whether the answer is right.
        hit: [Q] whether the right candidate is first; 1/n where it ties with n - 1 others.
        styles: [Q] the style of each question's page.
        sensitivity: variance of the score over the actions of a question (mean over questions), over the variance of
            the right action's score over questions. None without candidates. A critic that judges states alone has 0.
    """

    pairwise: Array
    hit: Array
    styles: Array
    sensitivity: float | None


def fit(x: Array, y: Array, l2: float) -> Linear:
    """Minimise mean log loss + l2 / 2 * |w|^2 by L-BFGS in float64, the bias unpenalised.

    Args:
        x: [n, d] features; standardised here, a constant one to 0.
        y: [n] of 0 and 1.
    """
    x = np.asarray(x, np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12 * np.maximum(np.abs(mean), 1)] = np.inf
    rows, labels = torch.from_numpy((x - mean) / scale), torch.from_numpy(np.asarray(y, np.float64))
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        odds = rows @ weight + bias
        value = torch.nn.functional.binary_cross_entropy_with_logits(odds, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return Linear(mean, scale, weight.detach().numpy(), bias.item())


def train(x: Sequence[Array], y: Sequence[Array]) -> Linear:
    """The probe whose L2 strength, fitted on part 0, has the least log loss on part 1; then fitted on both."""

    def held_out_loss(l2: float) -> float:
        odds = fit(x[0], y[0], l2).score(x[1])
        return float(np.logaddexp(0, np.where(y[1] > 0, -odds, odds)).mean())

    best = min(STRENGTHS, key=held_out_loss)
    return fit(np.concatenate(x[:2]), np.concatenate(y[:2]), best)


def measure(questions: Split, x: Sequence[Array]) -> Outcome:
    """Train a probe and test it.

    Args:
        x: features of each of the three parts, a row for every candidate in the order of the questions, or for the
            question where it has none.
    """
    probe = train(x, [labels(part) for part in questions.parts()])
    return judge(questions.test, probe.score(x[2]))


def labels(questions: Iterable[Question]) -> Array:
    """float64: what a probe is to say of each row of features: 1 for right (or yes), 0 for wrong."""
    return np.concatenate([np.eye(len(q.candidates))[q.right] if q.candidates else [q.right] for q in questions])


def judge(questions: Sequence[Question], scores: Array) -> Outcome:
    """Scores, one for every row of features, against the right answers."""
    pairs, hits, within, right_scores = [], [], [], []
    stops = np.cumsum([0, *(len(q.candidates) or 1 for q in questions)]).tolist()
    for question, (start, stop) in zip(questions, pairwise(stops), strict=True):
        own = scores[start:stop]
        if question.candidates:
            right, wrong = own[question.right], np.delete(own, question.right)
            pairs.append(np.mean((right > wrong) + 0.5 * (right == wrong)))
            hits.append((right >= wrong).all() / (1 + (wrong == right).sum()))
            within.append(own.var())
            right_scores.append(right)
        else:
            pairs.append(0.5 if own[0] == 0 else float((own[0] > 0) == question.right))
            hits.append(pairs[-1])
    over = float(np.var(right_scores)) if right_scores else 0.0
    sensitivity = (float(np.mean(within)) / over if over > 0 else float("nan")) if right_scores else None
    return Outcome(np.array(pairs), np.array(hits), np.array([q.style for q in questions]), sensitivity)


# -- features ----------------------------------------------------------------------------------------------------------

Features = dict[str, list[Array]]
"""For every probe the features of its three parts."""


def encode(
    model: Any,
    tokenizer: Any,
    splits: Mapping[str, Split],
    scratch: Path,
    progress: Callable[[list[range]], Iterable[range]] = iter,
) -> Features:
    """Hidden states where critics read: prompts and actions rendered, tokenised and packed as for a critic.

    An action that names an element by number stands with its line, as it does there (`data.grounding`).

    Args:
        scratch: an empty folder; it can go when this returns.
        progress: wraps the forward passes, as in `features.compute`.
    """
    parts = [part for split in splits.values() for part in split.parts()]
    tokens = tokenize(_steps(q for part in parts for q in part), tokenizer, max_tokens=_MAX_TOKENS, grounding=True)
    found = features.compute(model, tokens, scratch, progress=progress)
    rows, first = [], 0
    for part in parts:
        last = first + len(part)
        if part and part[0].candidates:
            rows.append(found.q[tokens.candidate_branch[tokens.candidate_ptr[first] : tokens.candidate_ptr[last]]])
        else:
            rows.append(found.v[first:last])
        first = last
    return {name: rows[3 * i : 3 * i + 3] for i, name in enumerate(splits)}


def bag_of_words(splits: Mapping[str, Split]) -> Features:
    """What counting words tells: how many words, and pairs of neighbours, action, goal and page share; lengths.

    The control: a question that a probe answers from these asks for no reading.
    """
    return {name: [_counts(part) for part in split.parts()] for name, split in splits.items()}


def texts(splits: Mapping[str, Split]) -> Iterable[str]:
    """What a tokenizer for these pages may be trained on: all but the test's."""
    for split in splits.values():
        for question in (*split.fit, *split.validation):
            yield from (question.observation, question.goal, *question.candidates)


def _steps(questions: Iterable[Question]) -> Iterable[dict[str, Any]]:
    """The questions as logged steps, each an episode of its own."""
    unlogged = dict.fromkeys(_UNLOGGED)
    for number, question in enumerate(questions):
        candidates = [{"action": text, "response": None, "executed": None} for text in question.candidates]
        seen = {"goal": question.goal, "observation": question.observation, "candidates": candidates}
        yield {**unlogged, **seen, "episode_id": str(number)}


def _counts(questions: Iterable[Question]) -> Array:
    rows = []
    for question in questions:
        goal, page = _grams(question.goal), _grams(question.observation)
        actions = question.candidates or ("",)
        for action in map(_grams, map(str.__add__, actions, notes(actions, question.observation))):
            row: list[int] = []
            for here, there in ((action, goal), (action, page), (goal, page)):
                for own, other in zip(here, there, strict=True):
                    row += [len(own.keys() & other.keys()), sum(other[gram] for gram in own)]
            rows.append(row + [grams[0].total() for grams in (action, goal, page)])
    return np.array(rows, np.float64)


def _grams(text: str) -> tuple[Counter[Any], Counter[Any]]:
    """The words of a text, and its pairs of neighbouring words."""
    words = re.findall(r"\w+", text.lower())
    return Counter(words), Counter(pairwise(words))
