"""What an environment is to a collector: pages out, actions in, one episode at a time.

An environment is one place where an episode can be played; several of them play at the same time. What goes wrong is of
two kinds. An action that cannot be parsed, or names nothing on the page, or takes too long, is a transition like any
other, with `Transition.error`. A browser that crashes or hangs raises `Lost`: the episode is cut, and no reward known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Lost(Exception):
    """The environment died under an episode (a crash, a hang): no fault of the action, and never a reward of 0."""


@dataclass(frozen=True, slots=True)
class Page:
    """What the agent sees.

    Attributes:
        observation: the page as text.
        kind: axtree, html, dom or text, as the store's `observation_kind`.
        actions: every action that the environment offers here, in a fixed order, none twice.
    """

    goal: str
    observation: str
    kind: str
    actions: tuple[str, ...]
    url: str | None = None
    title: str | None = None


class Transition(NamedTuple):
    """The outcome of one action.

    Attributes:
        reward: of this action.
        terminated: the task itself ended the episode; there is no future.
        truncated: the environment cut it short, by a limit of its own.
        error: why the action could not be done; it is a transition all the same.
        raw_reward: the environment's own number at the end, where `reward` is another.
        success: at the end; None where nothing says so.
    """

    page: Page
    reward: float
    terminated: bool
    truncated: bool
    error: str | None = None
    raw_reward: float | None = None
    success: bool | None = None


class Environment(Protocol):
    """One place to play. `tasks` are the names that `reset` takes; `limit` is the step limit of the last one reset."""

    benchmark: str
    grammar: str

    @property
    def tasks(self) -> Sequence[str]: ...

    @property
    def limit(self) -> int: ...

    async def reset(self, task: str, seed: int) -> Page:
        """The first page of an episode: the same task and seed give the same one.

        Raises:
            Lost: no page could be had.
        """
        ...

    async def step(self, action: str) -> Transition:
        """Does one action.

        Raises:
            Lost: the environment died under it.
        """
        ...

    async def close(self) -> None: ...
