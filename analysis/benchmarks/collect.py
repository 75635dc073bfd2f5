"""Episodes of MiniWoB a second, the collector's beside BrowserGym's own loop: same tasks, pages, policy and machine.

    BROWSERGYM_PYTHON=VENV/bin/python python analysis/benchmarks/collect.py [episodes=4] [repeats=3] [pages=2]

That Python has `browsergym-miniwob` (it pins an old playwright and so has an environment of its own: `python -m venv
VENV; VENV/bin/pip install browsergym-miniwob`). The policy presses a button of the page that the task's name and the
step choose, whatever it says: the same element in both, so that rewards must agree. Ours counts all that `collect`
does: a fresh page for every episode, candidates, and the episode in the store before the next one begins. Rows:

- ours, `pages` at a time; ours, one page; both from the start of the browser to its end, without Python's own start;
- BrowserGym as it is; BrowserGym without its pauses (`pre_observation_delay=0`, `slow_mo=0`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from _measure import arguments, medians, repeat, report, versions

from offline_lm._collect_commit import Committer
from offline_lm._collect_rollout import Plan, Setting, collect
from offline_lm.envs import browser, miniwob
from offline_lm.envs.policies import Choice, Chooser, State
from offline_lm.store import Store
from offline_lm.store.redact import Redactor
from offline_lm.types import Episode

TASKS = ("click-test", "click-test-2", "click-button", "click-button-sequence", "click-checkboxes", "enter-text",
         "click-option", "login-user")  # fmt: skip
STEPS = 3


def main() -> None:
    given = arguments(sys.argv[1:], episodes="4", repeats="3", pages="2")
    python = os.environ.get("BROWSERGYM_PYTHON")
    if not python:
        print("no peer, only our rows: $BROWSERGYM_PYTHON is wanted (see the head of this file)", file=sys.stderr)
    seeds = list(range(int(given["episodes"])))
    earned: dict[str, dict[str, list[float]]] = {}
    steps: dict[str, int] = {}

    def timed(name: str, played: Callable[[], tuple[float, int, dict[str, list[float]]]]) -> float:
        seconds, steps[name], earned[name] = played()
        return seconds

    rows = {
        f"ours, {given['pages']} pages": partial(ours, seeds, int(given["pages"])),
        "ours, one page": partial(ours, seeds, 1),
    }
    if python:
        rows |= {
            "BrowserGym": partial(peer, python, seeds, None),
            "BrowserGym without pauses": partial(peer, python, seeds, 0.0),
        }
    seconds = medians(repeat({name: partial(timed, name, row) for name, row in rows.items()}, int(given["repeats"])))
    first = next(iter(rows))
    differing = {name: [key for key, r in earned[first].items() if earned[name][key] != r] for name in rows}
    n, theirs = len(TASKS) * len(seeds), seconds.get("BrowserGym")
    table = [
        {
            "loop": name,
            "episodes/s": n / seconds[name],
            "steps/s": steps[name] / seconds[name],
            "times BrowserGym": theirs and theirs / seconds[name],
            "same rewards": f"{n - len(differing[name])} of {n}",
        }
        for name in rows
    ]
    result = {
        "ours": n / seconds[first], "peer": theirs and n / theirs, "ratio": theirs and theirs / seconds[first],
        "goal": 10, "unit": "MiniWoB episodes/s", "differing": differing.get("BrowserGym"),
        "versions": versions("playwright", tasks=len(TASKS), **given),
    }  # fmt: skip
    report(result, table, given, __file__)


def page_seed(seed: int) -> int:
    """What BrowserGym gives to Math.seedrandom for its own seed."""
    return int(np.random.RandomState(seed).randint(0, 1000000))


def pressed(states: Sequence[State]) -> list[tuple[np.ndarray, None]]:
    """All on a click on one button, as `_browsergym_loop.py` chooses it; where there is none, on the last action."""
    found = []
    for state in states:
        buttons = re.findall(r"- button .*?\[ref=(\w+)\]", state.observation)
        wanted = f"click('{buttons[(len(state.task) + len(state.history)) % len(buttons)]}')" if buttons else ""
        at = state.actions.index(wanted) if wanted in state.actions else len(state.actions) - 1
        found.append((np.eye(len(state.actions))[at], None))
    return found


def ours(seeds: Sequence[int], pages: int) -> tuple[float, int, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_ours(seeds, pages, Store.create(folder)))


async def _ours(seeds: Sequence[int], pages: int, store: Store) -> tuple[float, int, dict[str, list[float]]]:
    gate, url, _ = miniwob.served(None)
    rewards: dict[str, list[float]] = {}
    committer, setting = Committer(store, Redactor({})), Setting(Chooser("button", pressed), STEPS)
    committing = asyncio.create_task(committer.run())

    async def act(state: State) -> Choice:
        return setting.policy.act([state])[0]

    async def keep(episode: Episode) -> None:
        await committer.add(episode)
        rewards[episode.native_id] = [step.reward or 0.0 for step in episode.steps if not step.is_final_observation]

    plans = [Plan(task, page_seed(seed), 0, f"{task} {seed}") for task in TASKS for seed in seeds]
    began = time.perf_counter()
    session = browser.Session(browser.find_chromium(None), gate, sandbox=os.geteuid() != 0)
    envs = [miniwob.MiniWob(session, url, TASKS) for _ in range(pages)]
    try:
        await collect(envs, iter(plans), act, setting, keep)
        committer.close()
        await committing
    finally:
        for env in envs:
            await env.close()
        await session.close()
    return time.perf_counter() - began, sum(map(len, rewards.values())), rewards


def peer(python: str, seeds: Sequence[int], delay: float | None) -> tuple[float, int, dict[str, list[float]]]:
    asked = {
        "url": f"{(miniwob.default_folder() / 'miniwob').as_uri()}/", "chromium": str(browser.find_chromium(None)),
        "tasks": TASKS, "seeds": list(seeds), "steps": STEPS, "delay": delay, "slow_mo": 0,
    }  # fmt: skip
    script = Path(__file__).with_name("_browsergym_loop.py")
    done = subprocess.run([python, str(script), json.dumps(asked)], stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return told["seconds"], told["steps"], told["rewards"]


if __name__ == "__main__":
    main()
