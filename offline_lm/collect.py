"""``python -m offline_lm.collect``: episodes played in a browser or a text environment, into the store."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from tqdm import tqdm

from offline_lm import _collect_policies as policies
from offline_lm import cli
from offline_lm._collect_commit import Committer
from offline_lm._collect_rollout import SOURCE, Batcher, Plan, Setting, collect
from offline_lm.envs import browser, browsergym, miniwob, scripted, sites, text
from offline_lm.envs.protocol import Environment, Lost
from offline_lm.errors import UserError
from offline_lm.store import Store
from offline_lm.store.redact import Redactor
from offline_lm.store.rows import episode_id
from offline_lm.types import Episode

TASKS = 20
"""Tasks of a text site where tasks= names none."""


def main(argv: Sequence[str] | None = None) -> int:
    """As every command; 143 or 130 if it was stopped by SIGTERM or SIGINT (what had ended is in the store)."""
    stopped: list[int] = []
    return cli.run("collect", lambda cfg: command(cfg, stopped), argv) or (128 + stopped[0] if stopped else 0)


def command(cfg: DictConfig, stopped: list[int]) -> dict[str, Any]:
    if cfg.fetch is not None:
        return _fetch(cfg)
    if cfg.env is None:
        raise UserError("env= must be given (or fetch=miniwob); see --help")
    for key, least in (("episodes", 1), ("pages", 1), ("seed", 0), ("first_seed", 0)):
        if type(cfg[key]) is not int or cfg[key] < least:
            raise UserError(f"{key}={cfg[key]}: a whole number from {least} is wanted")
    if cfg.max_steps is not None and (type(cfg.max_steps) is not int or cfg.max_steps < 1):
        raise UserError(f"max_steps={cfg.max_steps}: a whole number from 1, or null, is wanted")
    policy = policies.named(cfg.policy, **policies.Settings.of(cli.plain(cfg)))
    store = Store.create(cfg.store)
    setting = Setting(policy, cfg.max_steps, cfg.dataset)
    return asyncio.run(_run(cfg, store, setting, stopped))


async def _run(cfg: DictConfig, store: Store, setting: Setting, stopped: list[int]) -> dict[str, Any]:
    committer = Committer(store, Redactor(cli.plain(cfg.redact)["patterns"]))
    batcher = Batcher(setting.policy)
    told = _Told()
    async with _environments(cfg) as (envs, tasks, session):
        plans = _plans(cfg, setting.policy.policy_id, tasks)
        known = _known(store)
        todo = [plan for plan in plans if episode_id(SOURCE, cfg.dataset, plan.native_id) not in known]
        told.skipped = len(plans) - len(todo)
        todo.sort(key=lambda plan: plan.task)  # a task's pages in a row: the browser has their files at hand

        with tqdm(desc="collect", total=len(todo), unit="episode", file=sys.stderr, disable=None) as bar:

            async def keep(episode: Episode) -> None:
                await committer.add(episode)
                told.add(episode)
                bar.update()
                bar.set_postfix_str(f"success {told.success:.2f}")

            playing = asyncio.create_task(collect(envs, iter(todo), batcher.act, setting, keep))
            serving = [asyncio.create_task(batcher.run()), asyncio.create_task(committer.run())]
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, lambda number=number: (stopped.append(number), playing.cancel()))
            try:
                await asyncio.wait([playing, *serving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                playing.cancel()
                serving[0].cancel()
                await asyncio.wait([playing, serving[0]])
                committer.close()
                await serving[1]
        _raise(playing, serving[0], stopped)
        seconds = time.monotonic() - told.began
    return _report(cfg, store, committer, told, session, batcher, seconds, stopped)


def _raise(playing: asyncio.Task[None], batching: asyncio.Task[None], stopped: list[int]) -> None:
    """The failure that ended the playing, if it did not end by itself or by a signal."""
    for task in (batching, playing):
        if task.cancelled():
            continue
        error = task.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, Lost):
            raise UserError(f"the environment did not come back: {error}") from error
        if error is not None and not stopped:
            raise error


# -- what is played ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def _environments(cfg: DictConfig) -> AsyncIterator[tuple[list[Environment], list[str], browser.Session | None]]:
    """(as many environments as pages=, the tasks' names, the browser if there is one); all closed at the end."""
    session = None
    if cfg.env == "miniwob":
        gate, url, there = miniwob.served(cfg.miniwob_html)
        tasks = _tasks(cfg.tasks, there, [name for name in scripted.RULES if name in there] or list(scripted.RULES))
        session = browser.Session(browser.find_chromium(cfg.chromium), gate, sandbox=cfg.sandbox)
        envs: list[Environment] = [miniwob.MiniWob(session, url, tasks, fresh=cfg.fresh) for _ in range(cfg.pages)]
    elif cfg.env in sites.TASKS:
        tasks = _tasks(cfg.tasks, [], [f"{cfg.env}0/{n}" for n in range(cfg.tasks if _count(cfg.tasks) else TASKS)])
        try:
            envs = [text.TextSite(tasks) for _ in range(cfg.pages)]
        except ValueError as error:
            raise UserError(f"tasks={cfg.tasks}: {error}") from error
    elif cfg.env.startswith("gym:"):
        envs = [text.TextGym(cfg.env.removeprefix("gym:")) for _ in range(cfg.pages)]
        tasks = list(envs[0].tasks)
    elif cfg.env.startswith(browsergym.PREFIX):
        browsergym.find_pages(cfg.miniwob_html)
        envs = [_browsergym(cfg) for _ in range(cfg.pages)]
        tasks = list(envs[0].tasks)
    else:
        raise UserError(f"env={cfg.env}: there are miniwob, {', '.join(sites.TASKS)}, gym:ID and browsergym/TASK_ID")
    try:
        yield envs, tasks, session
    finally:
        for env in envs:
            await env.close()
        if session is not None:
            await session.close()


def _browsergym(cfg: DictConfig) -> browsergym.BrowserGym:
    """With Playwright's own Chromium, or the one that chromium= names."""
    own = {} if cfg.chromium is None else {"executable_path": browser.find_chromium(cfg.chromium)}
    sandbox = {"chromium_sandbox": bool(cfg.sandbox)}
    return browsergym.BrowserGym(cfg.env.removeprefix(browsergym.PREFIX), pw_chromium_kwargs=own | sandbox)


def _count(tasks: Any) -> bool:
    return type(tasks) is int and tasks > 0


def _tasks(given: Any, there: Sequence[str], default: list[str]) -> list[str]:
    """The names that tasks= means, of those that are `there` (empty: not known)."""
    if given is None:
        return default
    if _count(given):
        return default[:given]
    if not isinstance(given, ListConfig) or not given or not all(isinstance(name, str) for name in given):
        raise UserError(f"tasks={given}: a list of names, or how many, is wanted")
    if unknown := [name for name in given if there and name not in there]:
        raise UserError(f"tasks: there is no {', '.join(unknown)}")
    return list(given)


def _plans(cfg: DictConfig, policy_id: str, tasks: list[str]) -> list[Plan]:
    limit = cfg.max_steps or "all"
    return [
        Plan(
            task=(task := tasks[i % len(tasks)]),
            seed=(seed := cfg.first_seed + i // len(tasks)),
            run_seed=cfg.seed,
            native_id=f"{cfg.env}/{policy_id}/{cfg.seed}/{limit}/{task}/{seed}",
        )
        for i in range(cfg.episodes)
    ]


def _known(store: Store) -> set[str]:
    with store.connect() as db:
        found = db.execute("SELECT episode_id FROM episodes WHERE source = ?", [SOURCE]).fetchall()
    return {name for (name,) in found}


def _fetch(cfg: DictConfig) -> dict[str, Any]:
    if cfg.fetch != "miniwob":
        raise UserError(f"fetch={cfg.fetch}: there is miniwob")
    folder = Path(cfg.miniwob_html or miniwob.default_folder())
    tasks = miniwob.fetch(folder)
    print(f"{tasks} tasks in {folder}")
    return {"tasks": tasks, "folder": str(folder)}


# -- what is told ------------------------------------------------------------------------------------------------


class _Told:
    """Counts of the episodes that were kept."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.skipped = 0
        self.steps = 0
        self.errors = 0
        self.ends: Counter[str] = Counter()
        self.by_task: dict[str, list[bool]] = defaultdict(list)

    def add(self, episode: Episode) -> None:
        acted = [step for step in episode.steps if not step.is_final_observation]
        self.steps += len(acted)
        self.errors += sum(step.action_valid is False for step in acted)
        self.ends[episode.end_reason or "unknown"] += 1
        self.by_task[episode.task_id or ""].append(episode.success is True)

    @property
    def episodes(self) -> int:
        return self.ends.total()

    @property
    def success(self) -> float:
        return sum(map(sum, self.by_task.values())) / max(self.episodes, 1)


def _report(
    cfg: DictConfig,
    store: Store,
    committer: Committer,
    told: _Told,
    session: browser.Session | None,
    batcher: Batcher,
    seconds: float,
    stopped: list[int],
) -> dict[str, Any]:
    counts = committer.counts()
    result = {
        "episodes": counts["episodes"],
        "steps": counts["steps"],
        "skipped": told.skipped,
        "duplicates": counts["duplicates"],
        "quarantined": counts["quarantined"],
        "success": told.success,
        "by_task": {task: sum(won) / len(won) for task, won in sorted(told.by_task.items())},
        "end_reasons": dict(told.ends),
        "failed_actions": told.errors,
        "seconds": round(seconds, 3),
        "episodes_per_s": counts["episodes"] / seconds,
        "steps_per_s": counts["steps"] / seconds,
        "mean_batch": sum(batcher.sizes) / max(len(batcher.sizes), 1),
        "restarts": 0 if session is None else session.restarts,
        "refused_requests": [] if session is None else session.gate.refused[-10:],
        "stopped": signal.Signals(stopped[0]).name if stopped else None,
    }
    if stopped:
        print(f"stopped by {result['stopped']}: what was under way is dropped; the same command again goes on")
    again = f", {told.skipped} were there already" if told.skipped else ""
    again += "".join(f", {counts[key]} {key}" for key in ("duplicates", "quarantined") if counts[key])
    print(
        f"{counts['episodes']} episodes, {counts['steps']} steps added to {store.url}{again}; "
        f"success {told.success:.3f}, {result['episodes_per_s']:.2f} episodes/s, {result['steps_per_s']:.1f} steps/s"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
