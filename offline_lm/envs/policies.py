"""Policies of a collector: from what several agents see at once to what each does, with exact probabilities.

A policy is anything with `policy_id`, `kind` and `act(states) -> choices`. `Chooser` makes one of a function that gives
probabilities over the actions on a page; the policy of a language model gives its own text, as another candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from offline_lm.types import Candidate

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class State:
    """What an agent sees before it acts.

    Attributes:
        actions: those that the environment offers, at least one.
        history: the actions so far, oldest first.
        task: the environment's name for it; a language model must not need it.
        rng: of this step alone, seeded by (run seed, task, page seed, step): what is drawn depends on no other agent.
    """

    goal: str
    observation: str
    actions: tuple[str, ...]
    rng: np.random.Generator
    url: str | None = None
    history: tuple[str, ...] = ()
    task: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """What an agent does.

    Attributes:
        action: the command, as the environment takes it.
        candidates: what it could have done, the executed one marked, each with the log of its probability under this
            policy; null where that is 0.
        logprob: of the executed action.
        complete: whether it could have done nothing else: the probabilities of the candidates sum to 1.
        logged: further fields of the step: response, token ids, their log-probabilities ...
    """

    action: str
    candidates: tuple[Candidate, ...]
    logprob: float | None
    complete: bool = False
    logged: dict[str, Any] = field(default_factory=dict)


class Policy(Protocol):
    @property
    def policy_id(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def act(self, states: Sequence[State]) -> list[Choice]:
        """A choice for each state, in their order. It may be called in a thread."""
        ...


Probabilities = Callable[[Sequence[State]], Sequence[tuple[Array, Sequence[float] | None]]]
"""For each state, float64 [N] over its actions, and their scores if there are any."""


@dataclass(frozen=True)
class Chooser:
    """Draws one of the page's actions: from `probabilities`, and with chance `epsilon` from all alike."""

    name: str
    probabilities: Probabilities
    epsilon: float = 0.0
    kind: str = "scripted"

    @property
    def policy_id(self) -> str:
        return f"{self.name}-eps{self.epsilon:g}" if self.epsilon else self.name

    def act(self, states: Sequence[State]) -> list[Choice]:
        given = self.probabilities(states)
        return [draw(s, mix(p, self.epsilon), scores) for s, (p, scores) in zip(states, given, strict=True)]


def uniform(states: Sequence[State]) -> list[tuple[Array, Sequence[float] | None]]:
    """Every action alike."""
    return [(np.full(len(s.actions), 1 / len(s.actions)), None) for s in states]


def mix(p: Array, epsilon: float) -> Array:
    """(1 - epsilon) p + epsilon / N."""
    return (1 - epsilon) * p + epsilon / len(p)


def greedy(scores: Sequence[float], temperature: float) -> Array:
    """softmax(scores / temperature); all on the first of the best for temperature 0."""
    q = np.asarray(scores, np.float64)
    if temperature == 0:
        return np.eye(len(q))[int(q.argmax())]
    e = np.exp((q - q.max()) / temperature)
    return e / e.sum()


def draw(state: State, p: Array, scores: Sequence[float] | None = None) -> Choice:
    """One of the state's actions by its probability, all of them logged."""
    chosen = int(state.rng.choice(len(p), p=p))
    candidates = tuple(
        Candidate(
            action=action,
            logprob=math.log(p[i]) if p[i] > 0 else None,
            score=None if scores is None else float(scores[i]),
            source="enumerated",
            executed=i == chosen,
        )
        for i, action in enumerate(state.actions)
    )
    return Choice(state.actions[chosen], candidates, math.log(p[chosen]), complete=True)
