"""What a policy that reads texts earns, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from offline_lm.envs.exact import TextMDP
from offline_lm.envs.policies import untried

Array = np.ndarray

Choose = Callable[[list[dict[str, Any]]], Sequence[int]]
"""A policy that reads: from states (goal, observation, history, candidates) the index of the action that each takes."""


def play_texts(task: TextMDP, choose: Choose, limit: int | None = None) -> float:
    """Expected undiscounted return within the step limit of a deterministic policy that reads, exactly.

    All that chance may bring is followed, with the pages and the past that a real episode would show. `TextMDP.play`
    knows one page and one past for each state.

    Args:
        choose: from states as `Critic.score` takes them (goal, observation, history, candidates) the index of the
            action that each takes. It is asked once a step, about all the episodes that are still possible.
        limit: steps, in place of the task's.
    """
    o, total = task.outcomes, 0.0
    live = [(float(task.start[s]), int(s), task.pages[s], []) for s in np.flatnonzero(task.start)]
    for _ in range(task.limit if limit is None else limit):
        if not live:
            break
        chosen = choose([
            {"goal": task.goal, "observation": page, "history": past, "candidates": task.actions[s]}
            for _, s, page, past in live
        ])  # fmt: skip
        after = []
        for (chance, s, page, past), a in zip(live, chosen, strict=True):
            rows = task.rows(s, int(a))
            for k in range(rows.start, rows.stop):
                here = chance * float(o.chance[k])
                total += here * float(o.reward[k])
                if o.next[k] >= 0:
                    after.append((here, int(o.next[k]), task.page_after(page, k), [*past, task.actions[s][int(a)]]))
        live = after
    return total


def play_once(task: TextMDP, q: Array, limit: int | None = None) -> float:
    """Expected undiscounted return of the greedy policy of Q that does nothing twice on a page, exactly.

    Of the actions that it has not yet done on a page that reads like this one it takes the best; of all, where none is
    left. So `collect policy=run:RUN` acts by a critic.

    Args:
        q: [S, A]; what is no action is not looked at.
    """
    o, total = task.outcomes, 0.0
    live = [(float(task.start[s]), int(s), frozenset[tuple[str, str]]()) for s in np.flatnonzero(task.start)]
    for _ in range(task.limit if limit is None else limit):
        after = []
        for chance, s, done in live:
            page, actions = task.pages[s], task.actions[s]
            tried = {action for there, action in done if there == page}
            a = int(untried(q[s, : len(actions)], actions, tried).argmax())
            rows = task.rows(s, a)
            for k in range(rows.start, rows.stop):
                here = chance * float(o.chance[k])
                total += here * float(o.reward[k])
                if o.next[k] >= 0:
                    after.append((here, int(o.next[k]), done | {(page, actions[a])}))
        live = after
    return total
