"""Finite decision processes whose pages are text: values in float64 by dynamic programming, and logs.

A site (`shop`, `office`, `maze`, ...) gives the rules as a view: the page of a state, and what each action on it leads
to, by chance or not. Logs are emitted in the ordinary `jsonl` format (`record`), with every possible action as a
candidate.

Where the agent does not see the state (`maze`, `wordle`), the states are what it can know, beliefs, and the pages are
transcripts of what it did and was told. Many transcripts lead to one belief, which is all that value depends on: a
state's page is one of them, logs hold the real ones, and `play.play_texts` judges a policy that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array

State = tuple[Any, ...]
Array = np.ndarray


@dataclass(frozen=True)
class End:
    """The end of an episode: what it earns, and what it would earn for the goal that the careless policy pursues."""

    reward: float
    mistaken: float = 0.0


@dataclass(frozen=True)
class Go:
    """A step on to `state` that earns something, or tells something.

    `told` is the line that it adds to a transcript, below the action; None: the page of `state` is shown afresh.
    """

    state: State
    reward: float = 0.0
    told: str | None = None


Outcome = State | Go | End
Move = tuple[str, Outcome | list[tuple[float, Outcome]]]
"""An action's text, and what it leads to; a list: one of several, each with its chance."""

View = Callable[[State], tuple[str, list[Move]]]
"""The page of a state and the actions there. It is asked once for each state."""

_SWEEPS = 100_000


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What the actions lead to: K rows in the order of states and actions, one for each action where chance has no say.

    Attributes:
        state, action: int arrays [K].
        next: int array [K], the next state's index; -1 ends the episode.
        chance: float64 array [K]; the rows of an action sum to 1.
        reward: float64 array [K].
        told: [K], the line added to a transcript (`Go.told`).
    """

    state: Array
    action: Array
    next: Array
    chance: Array
    reward: Array
    told: list[str | None]


@dataclass(frozen=True, eq=False)
class TextMDP:
    """One goal on one site, as tables.

    Attributes:
        benchmark: the kind of site; `seed` is the site's, `number` the task's.
        limit: steps after which an episode is cut off.
        states: all that can be reached, breadth first.
        pages: per state, its text; where pages are transcripts, that of `paths`.
        actions: per state, the texts of its actions.
        paths: per state, the actions of a shortest way to it.
        next: int array [S, A], the next state's index; -1 ends the episode (terminated), -2 is no action, -3 leaves it
            to chance (`outcomes`).
        reward: float64 array [S, A], expected where chance has a say.
        mistaken: float64 array [S, A], the reward for another goal, which the careless policy takes for this one.
        start: float64 array [S], the chance of each state to be the first.
        outcomes: all that the actions may lead to.
        success: the reward of an end that counts as success; None where nothing does.
        lines: lines that a transcript shows, the newest; None: all.
        variant: what the site's name goes on with, where it is not the ordinary one.
        policies: the site's own behaviour policies [S, A] by name, in place of the four of `behaviours`.
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
    start: Array
    outcomes: Outcomes
    success: float | None = 1.0
    lines: int | None = None
    variant: str = ""
    policies: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def explore(
        cls,
        start: State | list[tuple[float, State]],
        view: View,
        *,
        benchmark: str,
        seed: int,
        number: int,
        goal: str,
        limit: int,
        success: float | None = 1.0,
        lines: int | None = None,
    ) -> TextMDP:
        """Walk over all that `view` leads to from `start`, one state or several with their chances.

        Raises:
            ValueError: if the chances of an action, or of the starts, do not sum to 1.
        """
        starts = start if isinstance(start, list) else [(1.0, start)]
        states = [state for _, state in starts]
        index = {state: s for s, state in enumerate(states)}
        pages: list[str | None] = [None] * len(states)
        paths: list[list[str]] = [[] for _ in states]
        actions: list[list[str]] = []
        rows: list[tuple[int, int, int, float, float, float, str | None]] = []
        for s, state in enumerate(states):  # grows while it is walked: breadth first
            page, moves = view(state)
            page = pages[s] = pages[s] or page
            actions.append([action for action, _ in moves])
            for a, (action, after) in enumerate(moves):
                for chance, outcome in after if isinstance(after, list) else [(1.0, after)]:
                    if isinstance(outcome, End):
                        rows.append((s, a, -1, chance, outcome.reward, outcome.mistaken, None))
                        continue
                    go = outcome if isinstance(outcome, Go) else Go(outcome)
                    if go.state not in index:
                        index[go.state] = len(states)
                        states.append(go.state)
                        paths.append([*paths[s], action])
                        pages.append(None if go.told is None else transcript(page, action, go.told, lines))
                    rows.append((s, a, index[go.state], chance, go.reward, 0.0, go.told))
        at, act, to, chance, reward, mistaken, told = zip(*rows, strict=True)
        outcomes = Outcomes(*map(np.array, (at, act, to, chance, reward)), told=list(told))
        shape = (len(states), max(map(len, actions)))
        following, expected, expected_mistaken = np.full(shape, -2), np.zeros(shape), np.zeros(shape)
        where = outcomes.state, outcomes.action
        following[where] = outcomes.next
        several = np.zeros(shape)
        np.add.at(several, where, 1)
        following[several > 1] = -3
        np.add.at(expected, where, outcomes.chance * outcomes.reward)
        np.add.at(expected_mistaken, where, outcomes.chance * np.array(mistaken))
        first = np.zeros(len(states))
        first[: len(starts)] = [chance for chance, _ in starts]
        sums = np.zeros(shape)
        np.add.at(sums, where, outcomes.chance)
        if not np.allclose([first.sum(), *sums[several > 0]], 1.0):
            raise ValueError("the chances of what an action leads to, or of the starts, do not sum to 1")
        shown = [page for page in pages if page is not None]
        return cls(
            benchmark, seed, number, goal, limit, states, shown, actions, paths, following, expected,
            expected_mistaken, first, outcomes, success, lines,
        )  # fmt: skip

    @property
    def site(self) -> str:
        return f"{self.benchmark}{self.seed}{self.variant}"

    @property
    def task_id(self) -> str:
        return f"{self.site}/{self.number}"

    @property
    def transcripts(self) -> bool:
        """Whether pages are transcripts, so that one state is seen as many texts."""
        return any(told is not None for told in self.outcomes.told)

    @property
    def valid(self) -> Array:
        """bool [S, A]: which actions exist."""
        return self.next != -2

    @cached_property
    def transitions(self) -> csr_array:
        """P(s' | s, a) as a sparse matrix [S * A, S]; the chance to end is what a row lacks of 1."""
        o, on = self.outcomes, self.outcomes.next >= 0
        states, actions = self.next.shape
        rows = o.state * actions + o.action
        return csr_array((o.chance[on], (rows[on], o.next[on])), shape=(states * actions, states))

    def rows(self, s: int, a: int) -> slice:
        """The rows of `outcomes` that belong to an action."""
        first = self._first[s * self.next.shape[1] + a :]
        return slice(int(first[0]), int(first[1]))

    @cached_property
    def _first(self) -> Array:
        """int [S * A + 1]: the first row of each action."""
        pairs = self.outcomes.state * self.next.shape[1] + self.outcomes.action
        return np.searchsorted(pairs, np.arange(self.next.size + 1))

    def page_after(self, page: str, k: int) -> str:
        """What is seen after row `k` of `outcomes` happened on `page`; nothing after an end."""
        o = self.outcomes
        if o.next[k] < 0:
            return ""
        told, action = o.told[k], self.actions[o.state[k]][o.action[k]]
        return self.pages[o.next[k]] if told is None else transcript(page, action, told, self.lines)

    # -- exact values ------------------------------------------------------------------------------------------

    def backup(self, v: Array, gamma: float) -> Array:
        """Q [S, A] from V [S]: r + gamma * E V(s'), NaN where there is no action."""
        q = self.reward + gamma * (self.transitions @ v).reshape(self.next.shape)
        return np.where(self.valid, q, np.nan)

    def optimal(self, gamma: float) -> tuple[Array, Array]:
        """V* [S] and Q* [S, A] by value iteration to a fixed point (float64)."""
        return self._fixed_point(lambda q: np.nanmax(q, axis=1), gamma)

    def evaluate(self, policy: Array, gamma: float) -> tuple[Array, Array]:
        """V [S] and Q [S, A] of a policy [S, A] without a step limit.

        Raises:
            ValueError: with gamma = 1, if the policy goes on for ever and is rewarded for it.
        """
        return self._fixed_point(lambda q: (policy * np.nan_to_num(q)).sum(axis=1), gamma)

    def expectile(self, policy: Array, gamma: float, tau: float) -> tuple[Array, Array]:
        """The fixed point of IQL (Kostrikov 2021, eq. 5-6): V(s) is the tau-expectile of Q(s, a), a ~ policy."""
        return self._fixed_point(lambda q: expectile(np.nan_to_num(q), policy, tau), gamma)

    def _fixed_point(self, reduce: Callable[[Array], Array], gamma: float) -> tuple[Array, Array]:
        v = np.zeros(len(self.states))
        for _ in range(_SWEEPS):
            q = self.backup(v, gamma)
            new = reduce(q)
            if np.abs(new - v).max() < 1e-13 * max(1.0, np.abs(new).max()):
                return new, q
            v = new
        raise ValueError(f"no value with gamma={gamma}: episodes of this policy go on, and earn, for ever")

    def play(self, policy: Array, limit: int | None = None) -> float:
        """Expected undiscounted return of a policy [S, A] within the step limit, exactly."""
        at, total = self.start, 0.0
        for _ in range(self.limit if limit is None else limit):
            flow = at[:, None] * policy
            total += float((flow * self.reward).sum())
            at = self._move(flow)
        return total

    def success_rate(self, policy: Array, limit: int | None = None) -> float:
        """Chance that an episode ends in a reward of `success`, or more, within the step limit, exactly."""
        if self.success is None:
            raise ValueError(f"{self.task_id}: nothing counts as success")
        o, won = self.outcomes, np.zeros(self.next.shape)
        ends = (o.next == -1) & (o.reward >= self.success)
        np.add.at(won, (o.state[ends], o.action[ends]), o.chance[ends])
        return replace(self, reward=won).play(policy, limit)

    def visitation(self, policy: Array, limit: int | None = None) -> Array:
        """Expected visits of each state [S] in one episode within the step limit."""
        at = self.start
        visits = np.zeros_like(at)
        for _ in range(self.limit if limit is None else limit):
            visits += at
            at = self._move(at[:, None] * policy)
        return visits

    def _move(self, flow: Array) -> Array:
        return self.transitions.T @ flow.ravel()

    # -- policies ----------------------------------------------------------------------------------------------

    def greedy(self, q: Array, epsilon: float = 0.0) -> Array:
        """Epsilon-greedy policy [S, A] for Q [S, A]; ties go to the first action."""
        uniform = self.valid / self.valid.sum(axis=1, keepdims=True)
        best = np.zeros_like(uniform)
        best[np.arange(len(q)), np.nanargmax(np.where(self.valid, q, -np.inf), axis=1)] = 1.0
        return (1 - epsilon) * best + epsilon * uniform

    def behaviours(self, gamma: float = 0.95) -> dict[str, Array]:
        """The policies that the logs are a mixture of: the site's own, or else two skilled, one careless, one random.

        The careless one pursues another goal on the same pages: it fails on purpose-like paths, so that a path's
        shape does not tell success.
        """
        if self.policies:
            return self.policies
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
    """The tau-expectile of each row of x [S, A] under weights [S, A].

    It is the greatest weighted mean (the least, for tau below 1/2) with weights tau above a border and 1 - tau below
    it, the border between any two of the values (Bellini et al. 2014, proposition 6).
    """
    order = np.argsort(-x, axis=1)
    x, weight = (np.take_along_axis(y, order, axis=1) for y in (x, weight))
    above, mass = np.cumsum(weight * x, axis=1), np.cumsum(weight, axis=1)
    share = 1 - tau
    means = ((tau - share) * above + share * above[:, -1:]) / ((tau - share) * mass + share * mass[:, -1:])
    return means.max(axis=1) if tau >= 0.5 else means.min(axis=1)


# -- what sites share ------------------------------------------------------------------------------------------


def pick(rng: np.random.Generator, words: Sequence[str], n: int) -> tuple[str, ...]:
    """`n` different words."""
    return tuple(str(w) for w in rng.permutation(words)[:n])


def transcript(page: str, action: str, told: str, lines: int | None) -> str:
    """The next page of a transcript, cut to the newest `lines`."""
    text = [*page.split("\n"), action, told]
    return "\n".join(text if lines is None else text[-lines:])


def record(tasks: Iterable[TextMDP], episodes: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Episodes in the `jsonl` format: `episodes` for each task, policies in turn, every action a candidate."""
    for task in tasks:
        behaviours = list(task.behaviours().items())
        for trial in range(episodes):
            name, policy = behaviours[trial % len(behaviours)]
            rng = np.random.default_rng([seed, task.seed, task.number, trial])
            yield _rollout(task, name, policy, trial, rng)


def _rollout(task: TextMDP, name: str, policy: Array, trial: int, rng: np.random.Generator) -> dict[str, Any]:
    o, steps = task.outcomes, []
    s = _draw(rng, task.start)
    page = task.pages[s]
    while s >= 0 and len(steps) < task.limit:
        a = int(rng.choice(policy.shape[1], p=policy[s]))
        rows = task.rows(s, a)
        k = rows.start + _draw(rng, o.chance[rows])
        steps.append({
            "observation": page,
            "action": task.actions[s][a],
            "candidates": [{"action": x, "source": "enumerated"} for x in task.actions[s]],
            "candidates_complete": True,
            "behavior_logprob": float(np.log(policy[s, a])),
            "reward": float(o.reward[k]),
        })  # fmt: skip
        page = task.page_after(page, k)
        s = int(o.next[k])
    done = s < 0
    episode = {
        "episode_id": f"{task.task_id}/{trial}", "benchmark": task.benchmark, "task_id": task.task_id,
        "site": task.site, "goal": task.goal, "trial": trial,
        "policy_id": name, "policy_kind": "scripted",
        "outcome_reward": float(sum(step["reward"] for step in steps)),
        "success": None if task.success is None else done and steps[-1]["reward"] == task.success,
        "terminated": done, "truncated": not done,
        "end_reason": "env_done" if done else "step_limit", "steps": steps,
    }  # fmt: skip
    if not done:
        episode["final_observation"] = page
    return episode


def _draw(rng: np.random.Generator, chance: Array) -> int:
    """An index; what is certain takes no random number."""
    return int(rng.choice(len(chance), p=chance)) if chance.max() < 1.0 else int(chance.argmax())
