"""Policies of a collector: from what several agents see at once to what each does, with exact probabilities.

A policy is anything with the attributes and the `act(states) -> choices` of `Policy`. `Chooser` makes one of a function
that gives probabilities over the actions on a page; `offline_lm.envs.written` one of a language model that writes its
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from offline_lm.types import Candidate

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Turn:
    """What an agent saw and did before, and why that failed, if it did."""

    observation: str
    action: str
    url: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What an agent sees before it acts.

    Attributes:
        actions: those that the environment offers, at least one.
        history: the actions so far, oldest first.
        task: the environment's name for it; a language model must not need it.
        rng: of this step alone, seeded by (run seed, task, page seed, step): what is drawn depends on no other agent.
        turns: the same past, with the pages.
        grammar: of actions, as the store's `action_grammar`.
    """

    goal: str
    observation: str
    actions: tuple[str, ...]
    rng: np.random.Generator
    url: str | None = None
    history: tuple[str, ...] = ()
    task: str = ""
    turns: tuple[Turn, ...] = ()
    grammar: str = ""

    def tried(self) -> set[str]:
        """What was done before on a page that read as this one does: it led back here."""
        return {turn.action for turn in self.turns if (turn.observation, turn.url) == (self.observation, self.url)}

    def asked(self, context: str, candidates: Sequence[str]) -> dict[str, Any]:
        """As a critic or an actor takes it that reads past actions (`context` is "actions") or whole turns."""
        past = self.history if context == "actions" else [
            # a turn without an action cannot be told: an empty one is a space
            {"url": t.url, "observation": t.observation, "action": t.action or " "} for t in self.turns
        ]  # fmt: skip
        return {
            "goal": self.goal, "observation": self.observation, "url": self.url, "history": past,
            "candidates": candidates,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """What an agent does.

    Attributes:
        action: the command, as the environment takes it.
        candidates: what it could have done, the executed one marked, each with the log of its probability under this
            policy (of a sample: under the model that wrote it); null where that is 0, or not known.
        logprob: of the executed action under the whole policy; None where it is not known.
        complete: whether it could have done nothing else: the probabilities of the candidates sum to 1.
        logged: further fields of the step: response, token ids, their log-probabilities ...
        tokens: read and written for it, where a language model was asked.
    """

    action: str
    candidates: tuple[Candidate, ...]
    logprob: float | None
    complete: bool = False
    logged: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None


class Policy(Protocol):
    @property
    def policy_id(self) -> str:
        """Its name, other where it would act otherwise."""
        ...

    @property
    def kind(self) -> str:
        """As the store's `policy_kind`."""
        ...

    @property
    def model(self) -> str | None:
        """What it asks: NAME@HASH, the first 12 hex digits of the sha256 of all weights, adapters included."""
        ...

    @property
    def sampling(self) -> dict[str, Any]:
        """How it draws, beside its seed."""
        ...

    def act(self, states: Sequence[State]) -> list[Choice]:
        """A choice for each state, in their order. It may be called in a thread."""
        ...


Probabilities = Callable[[Sequence[State]], Sequence[tuple[Array, Sequence[float] | None]]]
"""For each state, float64 [N] over its actions, and their scores if there are any."""


@dataclass(frozen=True)
class Chooser:
    """Draws one of the page's actions: from `probabilities`, and with chance `epsilon` from all alike.

    `temperature` is that of `probabilities`, for the log.
    """

    name: str
    probabilities: Probabilities
    epsilon: float = 0.0
    kind: str = "scripted"
    model: str | None = None
    temperature: float | None = None

    @property
    def policy_id(self) -> str:
        return f"{self.name}-eps{self.epsilon:g}" if self.epsilon else self.name

    @property
    def sampling(self) -> dict[str, Any]:
        return {"over": "candidates", "epsilon": self.epsilon, "temperature": self.temperature}

    def act(self, states: Sequence[State]) -> list[Choice]:
        given = self.probabilities(states)
        return [draw(s, mix(p, self.epsilon), scores) for s, (p, scores) in zip(states, given, strict=True)]


def uniform(states: Sequence[State]) -> list[tuple[Array, Sequence[float] | None]]:
    """Every action alike."""
    return [(np.full(len(s.actions), 1 / len(s.actions)), None) for s in states]


def mix(p: Array, epsilon: float) -> Array:
    """(1 - epsilon) p + epsilon / N."""
    return (1 - epsilon) * p + epsilon / len(p)


def greedy(scores: Sequence[float] | Array, temperature: float) -> Array:
    """softmax(scores / temperature); all on the first of the best for temperature 0."""
    q = np.asarray(scores, np.float64)
    if temperature == 0:
        return np.eye(len(q))[int(q.argmax())]
    e = np.exp((q - q.max()) / temperature)
    return e / e.sum()


def untried(q: Array, actions: Sequence[str], tried: Collection[str]) -> Array:
    """Q [N], -inf for what was tried on this very page; as it is where all was.

    Where Q errs by more than going round in a circle costs, its greatest action does so for ever.
    """
    new = np.array([action not in tried for action in actions])
    return np.where(new, q, -np.inf) if new.any() else q


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
