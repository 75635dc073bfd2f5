"""Episodes played: several environments at a time, one policy that is asked about all the pages that wait."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from offline_lm.envs.action_grammar import GRAMMAR, BadAction, parse
from offline_lm.envs.policies import Choice, Policy, State, Turn
from offline_lm.envs.protocol import Environment, Lost, Page, Transition
from offline_lm.types import Episode, Step

SOURCE = "collect"
RESETS = 3
"""How often an environment may fail to begin an episode before the collector gives up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One episode to play.

    Attributes:
        seed: of the page.
        run_seed: of the policy's randomness; step t draws from a generator seeded by (run_seed, crc32 of the task's id,
            seed, t): what an episode draws depends on no other of its run.
        native_id: what the episode is called in the store.
    """

    task: str
    seed: int
    run_seed: int
    native_id: str


@dataclass(frozen=True, slots=True)
class Setting:
    """What the episodes of a run share."""

    policy: Policy
    max_steps: int | None
    dataset: str | None = None


Act = Callable[[State], Awaitable[Choice]]


class Batcher:
    """Asks a policy about all that wait, at once; while it thinks, the next batch gathers."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.sizes: list[int] = []
        """Of the newest batches, at most 1,000."""
        self._waiting: list[tuple[State, asyncio.Future[Choice]]] = []
        self._wake = asyncio.Event()

    async def act(self, state: State) -> Choice:
        future: asyncio.Future[Choice] = asyncio.get_running_loop().create_future()
        self._waiting.append((state, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Serves until it is cancelled, or the policy fails."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            self.sizes = [*self.sizes[-999:], len(batch)]
            choices = await asyncio.to_thread(self.policy.act, [state for state, _ in batch])
            for (_, future), choice in zip(batch, choices, strict=True):
                if not future.done():  # its episode may have been dropped meanwhile
                    future.set_result(choice)


async def play(env: Environment, plan: Plan, act: Act, setting: Setting) -> Episode:
    """One episode, from reset to its end: the task's own, the step limit, or the loss of the environment.

    A later page without an action ends it too: truncated, and `end_reason` is "unknown".

    Raises:
        Lost: it could not even begin.
    """
    began, clock = datetime.now(UTC), time.monotonic()
    page = await _reset(env, plan)
    task_id = plan.task if plan.task.startswith(env.benchmark) else f"{env.benchmark}/{plan.task}"
    limit = min(env.limit, setting.max_steps or env.limit)
    first, steps, history, turns, tokens = page, [], (), (), [0, 0]
    transition: Transition | None = None
    end = "step_limit"
    while len(steps) < limit:
        started, t0 = datetime.now(UTC), time.monotonic()
        seeds = [plan.run_seed, zlib.crc32(task_id.encode()), plan.seed, len(steps)]
        rng = np.random.default_rng(seeds)
        seen = State(page.goal, page.observation, page.actions, rng, page.url, history, plan.task, turns, env.grammar)
        choice = await act(seen)
        t1 = time.monotonic()
        why = None
        try:
            transition = await env.step(choice.action)
        except Lost as error:
            transition, why = None, str(error)
        took = {"policy_s": round(t1 - t0, 4), "env_s": round(time.monotonic() - t1, 4)}
        extra = {"seeds": seeds, **took}
        steps.append(
            _step(env, page, choice, transition, why, len(steps))
            | {"ts_start": started, "ts_end": datetime.now(UTC), "extra": extra}
        )
        history = (*history, choice.action)
        failed = None if transition is None else transition.error
        turns = (*turns, Turn(page.observation, choice.action, page.url, failed))
        tokens = [total + n for total, n in zip(tokens, choice.tokens or (0, 0), strict=True)]
        if transition is None:
            end = "env_error"
            await env.close()
            break
        page = transition.page
        if transition.terminated or transition.truncated:
            end = "env_done" if transition.terminated else "time_limit"
            break
        if not page.actions:
            end = "unknown"
            break
    terminated = transition is not None and transition.terminated
    steps[-1] |= {"terminated": terminated, "truncated": not terminated}
    rewards = [step["reward"] for step in steps]
    if transition is not None and page.observation:
        steps.append({**_seen(page), "is_final_observation": True})
    success = None if transition is None else transition.success if terminated else False
    return Episode(
        source=SOURCE,
        native_id=plan.native_id,
        dataset=setting.dataset,
        steps=tuple(Step(step=i, **step) for i, step in enumerate(steps)),
        benchmark=env.benchmark,
        task_id=task_id,
        task_family=plan.task.partition("/")[0],
        site=env.benchmark,
        start_url=first.url,
        goal=first.goal,
        seed=plan.seed,
        trial=plan.run_seed,
        policy_id=setting.policy.policy_id,
        policy_kind=setting.policy.kind,
        model=setting.policy.model,
        sampling={**setting.policy.sampling, "seed": plan.run_seed},
        outcome_reward=None if None in rewards else float(sum(rewards)),
        raw_reward=None if transition is None else transition.raw_reward,
        success=success,
        terminated=terminated,
        truncated=not terminated,
        end_reason=end,
        started_at=began,
        duration_s=time.monotonic() - clock,
        tokens_in=tokens[0] or None,
        tokens_out=tokens[1] or None,
        quality_flags=("missing_rewards",) if None in rewards else (),
        extra={"run_seed": plan.run_seed},
    )


async def _reset(env: Environment, plan: Plan) -> Page:
    for left in reversed(range(RESETS)):
        try:
            page = await env.reset(plan.task, plan.seed)
            if page.actions:
                return page
            raise Lost(f"{plan.task} offers no action on its first page")
        except Lost:
            await env.close()
            if not left:
                raise
    raise AssertionError("unreachable")


def _seen(page: Page) -> dict[str, Any]:
    return {
        "url": page.url,
        "title": page.title,
        "observation": page.observation,
        "observation_kind": page.kind,
    }


def _step(
    env: Environment, page: Page, choice: Choice, transition: Transition | None, lost: str | None, number: int
) -> dict[str, Any]:
    """Fields of a Step; the reward of an action that the environment did not survive is unknown."""
    error = lost if transition is None else transition.error
    fields: dict[str, Any] = {
        **_seen(page),
        "action": choice.action,
        "action_grammar": env.grammar,
        "action_valid": None if transition is None else error is None,
        "action_error": error,
        "candidates": choice.candidates,
        "candidates_complete": choice.complete,
        "behavior_logprob": choice.logprob,
        "reward": None if transition is None else transition.reward,
        "reward_source": "env",
        "terminated": False,
        "truncated": False,
    }
    if env.grammar == GRAMMAR:
        try:
            action = parse(choice.action)
            fields |= {"action_name": action.name, "action_args": action.args}
        except BadAction:
            pass  # the environment said so: action_error
    return fields | choice.logged


async def collect(
    envs: Sequence[Environment],
    plans: Iterator[Plan],
    act: Act,
    setting: Setting,
    keep: Callable[[Episode], Awaitable[None]],
) -> None:
    """Plays all the plans, an environment after another taking the next; each episode is kept before the next begins.

    When it is cancelled, the episodes under way are dropped.
    """

    async def slot(env: Environment) -> None:
        for plan in plans:
            await keep(await play(env, plan, act, setting))

    async with asyncio.TaskGroup() as group:
        for env in envs:
            group.create_task(slot(env))
