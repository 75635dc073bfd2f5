"""A policy of a language model that writes its actions: one sample of it, or of n the one that a critic values most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from offline_lm.envs.chat import command
from offline_lm.envs.policies import Array, Choice, State
from offline_lm.types import Candidate


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer; `logprob`: of drawing it, None if not known; `logged`: the fields of a step that are its own."""

    text: str
    logprob: float | None
    logged: dict[str, Any] = field(default_factory=dict)


class Proposal(NamedTuple):
    """Answers to one state; `logged` are the fields that hold whichever is taken; `tokens` were read and written."""

    samples: list[Sample]
    logged: dict[str, Any]
    tokens: tuple[int, int] | None


class Proposer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str | None: ...

    @property
    def sampling(self) -> dict[str, Any]: ...

    def propose(self, states: Sequence[State], n: int) -> list[Proposal]: ...


@dataclass(frozen=True)
class Judge:
    """A critic: `values` gives Q, float64 [N], of the N `candidates` of each state, all in one batch."""

    name: str
    model: str
    context: str
    values: Callable[[Iterable[dict[str, Any]]], list[Array]]


@dataclass(frozen=True)
class Written:
    """Answers of `proposer`, and of n > 1 the action of the greatest Q (Best-of-Q, 2601.22701).

    A critic is asked about the different actions that can be read, all pages in one batch. Where none can, the first
    answer is the action: an error of the agent, which belongs in the log. Logged as candidates are all different
    answers, and the page's actions that none of them meant. The probability of what a critic chose is not known: null.
    """

    proposer: Proposer
    n: int = 1
    judge: Judge | None = None

    @property
    def policy_id(self) -> str:
        best = f"-best{self.n}-{self.judge.name}" if self.judge else ""
        return self.proposer.name + best

    @property
    def kind(self) -> str:
        return "search" if self.judge else "llm"

    @property
    def model(self) -> str | None:
        return self.proposer.model

    @property
    def sampling(self) -> dict[str, Any]:
        critic = {"critic": self.judge.model} if self.judge else {}
        return {"over": "tokens", "n": self.n, **self.proposer.sampling, **critic}

    def act(self, states: Sequence[State]) -> list[Choice]:
        proposals = self.proposer.propose(states, self.n)
        read = [[command(x.text, s) for x in p.samples] for s, p in zip(states, proposals, strict=True)]
        options = [list(dict.fromkeys(action for action, readable in each if readable)) for each in read]
        q: list[dict[str, float]] = [{} for _ in states]
        if self.judge and (asked := [i for i, each in enumerate(options) if each]):
            found = self.judge.values([states[i].asked(self.judge.context, options[i]) for i in asked])
            for i, values in zip(asked, found, strict=True):
                q[i] = dict(zip(options[i], values.tolist(), strict=True))
        return [self._choice(*each) for each in zip(states, proposals, read, options, q, strict=True)]

    def _choice(
        self, state: State, proposal: Proposal, read: list[tuple[str, bool]], options: list[str], q: dict[str, float]
    ) -> Choice:
        actions = [action for action, _ in read]
        best = options[int(np.argmax([q[action] for action in options]))] if q else None
        chosen = 0 if best is None else actions.index(best)
        first: dict[str, int] = {}
        for i, sample in enumerate(proposal.samples):
            first.setdefault(sample.text, i)
        samples = [
            Candidate(
                action=actions[i],
                response=text,
                logprob=proposal.samples[i].logprob,
                score=q.get(actions[i]),
                source="sampled",
                executed=i == chosen,
            )
            for text, i in first.items()
        ]
        others = [Candidate(action=a, source="enumerated", executed=False) for a in state.actions if a not in actions]
        taken = proposal.samples[chosen]
        return Choice(
            action=actions[chosen],
            candidates=(*samples, *others),
            logprob=taken.logprob if self.n == 1 else None,
            logged={"response": taken.text, **proposal.logged, **taken.logged},
            tokens=proposal.tokens,
        )
