"""The exact sites by the names that their logs bear."""

from __future__ import annotations

import re
from collections.abc import Callable

from offline_lm.envs import maze, office, shop, wordle
from offline_lm.envs.exact import TextMDP

TASKS: dict[str, Callable[..., TextMDP]] = {
    shop.BENCHMARK: lambda seed, number, **options: shop.Task(shop.Site.draw(seed), number, **options).mdp,
    office.BENCHMARK: lambda seed, number: office.Task(office.Site.draw(seed), number).mdp,
    maze.FULLY: maze.fully_observed,
    maze.PARTIALLY: maze.partially_observed,
    wordle.BENCHMARK: wordle.task,
}
"""By benchmark: the task that (seed, number) draws; the shop takes a `horizon`, too."""

_TASK_ID = re.compile(r"([a-z_]+)(\d+)(?:h(\d+))?/(\d+)")


def named(task_id: str) -> TextMDP:
    """The task that a log names: `shop0/17`, `shop0h20/17` (its horizon), `fo_maze0/3`.

    Raises:
        ValueError: no task of these sites is named so.
    """
    found = _TASK_ID.fullmatch(task_id)
    if found is None or found[1] not in TASKS:
        raise ValueError(f"{task_id}: not the name of a task of {', '.join(TASKS)}")
    kind, seed, horizon, number = found.groups()
    options = {} if horizon is None else {"horizon": int(horizon)}
    return TASKS[kind](int(seed), int(number), **options)
