"""Finite deterministic decision processes whose pages are text: values in float64 by dynamic programming, and logs.

A site (`shop`, `office`) gives the rules as a view: the page of a state, and what each action on it leads to. Logs are
emitted in the ordinary `jsonl` format (`record`), with every possible action as a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

State = tuple[Any, ...]
Array = np.ndarray


@dataclass(frozen=True)
class End:
    """The end of an episode: what it earns, and what it would earn for the goal that the careless policy pursues."""

    reward: float
    mistaken: float


Move = tuple[str, State | End]
"""An action's text, and what it leads to."""

View = Callable[[State], tuple[str, list[Move]]]
"""The page of a state and the actions there. It is asked once for each state."""


@dataclass(frozen=True, eq=False)
class TextMDP:
    """One goal on one site, as tables. `states[0]` is the start.

    Attributes:
        benchmark: the kind of site; `seed` is the site's, `number` the task's.
        limit: steps after which an episode is cut off.
        states: all that can be reached, breadth first.
        pages: per state, its text.
        actions: per state, the texts of its actions.
        paths: per state, the actions of a shortest way to it.
        next: int array [S, A], the next state's index; -1 ends the episode (terminated), -2 is no action.
        reward: float64 array [S, A]; only what ends an episode earns any.
        mistaken: float64 array [S, A], the reward for another goal, which the careless policy takes for this one.
    """

    benchmark: str
    seed: int
    number: int
    goal: str
    limit: int
    states: list[State]
    pages: list[str]
    actions: list[list[str]]
    paths: list[list[str]]
    next: Array
    reward: Array
    mistaken: Array

    @classmethod
    def explore(
        cls, start: State, view: View, *, benchmark: str, seed: int, number: int, goal: str, limit: int
    ) -> TextMDP:
        """Walk from `start` over all that `view` leads to."""
        states, paths, index = [start], [[]], {start: 0}
        pages, moves = [], []
        for state in states:  # grows while it is walked: breadth first
            page, here = view(state)
            pages.append(page)
            moves.append(here)
            for action, after in here:
                if not isinstance(after, End) and after not in index:
                    index[after] = len(states)
                    states.append(after)
                    paths.append([*paths[index[state]], action])
        shape = (len(states), max(map(len, moves)))
        following, reward, mistaken = np.full(shape, -2), np.zeros(shape), np.zeros(shape)
        for s, here in enumerate(moves):
            for a, (_, after) in enumerate(here):
                if isinstance(after, End):
                    following[s, a], reward[s, a], mistaken[s, a] = -1, after.reward, after.mistaken
                else:
                    following[s, a] = index[after]
        actions = [[action for action, _ in here] for here in moves]
        return cls(
            benchmark, seed, number, goal, limit, states, pages, actions, paths, following, reward, mistaken
        )  # fmt: skip

    @property
    def site(self) -> str:
        return f"{self.benchmark}{self.seed}"

    @property
    def task_id(self) -> str:
        return f"{self.site}/{self.number}"

    @property
    def valid(self) -> Array:
        """bool [S, A]: which actions exist."""
        return self.next != -2

    # -- exact values ------------------------------------------------------------------------------------------

    def backup(self, v: Array, gamma: float) -> Array:
        """Q [S, A] from V [S]: r + gamma * V(s'), NaN where there is no action."""
        q = self.reward + gamma * np.where(self.next >= 0, v[self.next], 0.0)
        return np.where(self.valid, q, np.nan)

    def optimal(self, gamma: float) -> tuple[Array, Array]:
        """V* [S] and Q* [S, A] by value iteration to a fixed point (float64)."""
        return self._fixed_point(lambda q: np.nanmax(q, axis=1), gamma)

    def evaluate(self, policy: Array, gamma: float) -> tuple[Array, Array]:
        """V [S] and Q [S, A] of a policy [S, A] without a step limit."""
        return self._fixed_point(lambda q: (policy * np.nan_to_num(q)).sum(axis=1), gamma)

    def expectile(self, policy: Array, gamma: float, tau: float) -> tuple[Array, Array]:
        """The fixed point of IQL (Kostrikov 2021, eq. 5-6): V(s) is the tau-expectile of Q(s, a), a ~ policy."""
        return self._fixed_point(lambda q: expectile(np.nan_to_num(q), policy, tau), gamma)

    def _fixed_point(self, reduce: Callable[[Array], Array], gamma: float) -> tuple[Array, Array]:
        v = np.zeros(len(self.states))
        while True:
            q = self.backup(v, gamma)
            new = reduce(q)
            if np.abs(new - v).max() < 1e-13:
                return new, q
            v = new

    def play(self, policy: Array, limit: int | None = None) -> float:
        """Expected undiscounted return of a policy [S, A] within the step limit, exactly."""
        at, total = np.zeros(len(self.states)), 0.0
        at[0] = 1.0
        for _ in range(self.limit if limit is None else limit):
            flow = at[:, None] * policy
            total += float((flow * self.reward).sum())
            at = self._move(flow)
        return total

    def visitation(self, policy: Array, limit: int | None = None) -> Array:
        """Expected visits of each state [S] in one episode within the step limit."""
        at = np.zeros(len(self.states))
        at[0] = 1.0
        visits = np.zeros_like(at)
        for _ in range(self.limit if limit is None else limit):
            visits += at
            at = self._move(at[:, None] * policy)
        return visits

    def _move(self, flow: Array) -> Array:
        at = np.zeros(len(self.states))
        stays = self.next >= 0
        np.add.at(at, self.next[stays], flow[stays])
        return at

    # -- policies ----------------------------------------------------------------------------------------------

    def greedy(self, q: Array, epsilon: float = 0.0) -> Array:
        """Epsilon-greedy policy [S, A] for Q [S, A]; ties go to the first action."""
        uniform = self.valid / self.valid.sum(axis=1, keepdims=True)
        best = np.zeros_like(uniform)
        best[np.arange(len(q)), np.nanargmax(np.where(self.valid, q, -np.inf), axis=1)] = 1.0
        return (1 - epsilon) * best + epsilon * uniform

    def behaviours(self, gamma: float = 0.95) -> dict[str, Array]:
        """The policies that the logs are a mixture of: two skilled, one careless, one random.

        The careless one pursues another goal on the same pages: it fails on purpose-like paths, so that a path's
        shape does not tell success.
        """
        _, q = self.optimal(gamma)
        _, q_mistaken = replace(self, reward=self.mistaken).optimal(gamma)
        return {
            "skilled-0.1": self.greedy(q, 0.1),
            "skilled-0.4": self.greedy(q, 0.4),
            "careless-0.3": self.greedy(q_mistaken, 0.3),
            "random": self.greedy(q, 1.0),
        }

    def mixture(self, gamma: float = 0.95) -> Array:
        """The behaviour policy [S, A] of equal parts of `behaviours`, as logs show it: weighted by visits."""
        flows = [self.visitation(p)[:, None] * p for p in self.behaviours(gamma).values()]
        flow = np.sum(flows, axis=0)
        uniform = self.valid / self.valid.sum(axis=1, keepdims=True)
        total = flow.sum(axis=1, keepdims=True)
        return np.where(total > 0, flow / np.where(total > 0, total, 1.0), uniform)


def expectile(x: Array, weight: Array, tau: float) -> Array:
    """The tau-expectile of each row of x [S, A] under weights [S, A], by bisection to 1e-14."""
    low, high = np.min(x, axis=1), np.max(x, axis=1)
    for _ in range(60):
        m = (low + high) / 2
        u = x - m[:, None]
        slope = (np.where(u < 0, 1 - tau, tau) * weight * u).sum(axis=1)
        low, high = np.where(slope > 0, m, low), np.where(slope > 0, high, m)
    return (low + high) / 2


# -- what sites share ------------------------------------------------------------------------------------------


def pick(rng: np.random.Generator, words: Sequence[str], n: int) -> tuple[str, ...]:
    """`n` different words."""
    return tuple(str(w) for w in rng.permutation(words)[:n])


def record(tasks: Iterable[TextMDP], episodes: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Episodes in the `jsonl` format: `episodes` for each task, policies in turn, every action a candidate."""
    for task in tasks:
        behaviours = list(task.behaviours().items())
        for trial in range(episodes):
            name, policy = behaviours[trial % len(behaviours)]
            rng = np.random.default_rng([seed, task.seed, task.number, trial])
            yield _rollout(task, name, policy, trial, rng)


def _rollout(task: TextMDP, name: str, policy: Array, trial: int, rng: np.random.Generator) -> dict[str, Any]:
    s, steps, reward = 0, [], 0.0
    while s >= 0 and len(steps) < task.limit:
        a = int(rng.choice(policy.shape[1], p=policy[s]))
        reward = float(task.reward[s, a])
        steps.append({
            "observation": task.pages[s],
            "action": task.actions[s][a],
            "candidates": [{"action": x, "source": "enumerated"} for x in task.actions[s]],
            "candidates_complete": True,
            "behavior_logprob": float(np.log(policy[s, a])),
            "reward": reward,
        })  # fmt: skip
        s = int(task.next[s, a])
    done = s < 0
    episode = {
        "episode_id": f"{task.task_id}/{trial}", "benchmark": task.benchmark, "task_id": task.task_id,
        "site": task.site, "goal": task.goal, "trial": trial,
        "policy_id": name, "policy_kind": "scripted",
        "outcome_reward": reward, "success": reward == 1.0, "terminated": done, "truncated": not done,
        "end_reason": "env_done" if done else "step_limit", "steps": steps,
    }  # fmt: skip
    if not done:
        episode["final_observation"] = task.pages[s]
    return episode
