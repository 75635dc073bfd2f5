"""Text environments behind the same interface as a browser: the exact sites, and text games of gymnasium."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offline_lm.envs import sites
from offline_lm.envs.exact import TextMDP
from offline_lm.envs.protocol import Page, Transition
from offline_lm.errors import UserError


class TextSite:
    """One of the exact sites (`offline_lm.envs.sites`): shop, office, mazes, Wordle.

    Args:
        tasks: names such as ``shop0/17``.

    Raises:
        ValueError: a name that is none.
    """

    grammar = "exact"

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tasks
        self._mdps: dict[str, TextMDP] = {}
        self._mdp = self._task(tasks[0])
        self.benchmark = self._mdp.benchmark

    @property
    def limit(self) -> int:
        return self._mdp.limit

    def _task(self, name: str) -> TextMDP:
        if name not in self._mdps:
            self._mdps[name] = sites.named(name)
        return self._mdps[name]

    async def reset(self, task: str, seed: int) -> Page:
        self._mdp, self._rng = self._task(task), np.random.default_rng(seed)
        self._state = int(self._rng.choice(len(self._mdp.start), p=self._mdp.start))
        self._page = self._mdp.pages[self._state]
        return self._shown()

    async def step(self, action: str) -> Transition:
        mdp, s = self._mdp, self._state
        if action not in mdp.actions[s]:
            return Transition(self._shown(), 0.0, False, False, f"{action}: there is no such action here")
        rows = mdp.rows(s, mdp.actions[s].index(action))
        k = rows.start + int(self._rng.choice(rows.stop - rows.start, p=mdp.outcomes.chance[rows]))
        reward, after = float(mdp.outcomes.reward[k]), int(mdp.outcomes.next[k])
        if after < 0:
            won = None if mdp.success is None else reward == mdp.success
            return Transition(Page(mdp.goal, "", "text", ()), reward, True, False, None, reward, won)
        self._page, self._state = mdp.page_after(self._page, k), after
        return Transition(self._shown(), reward, False, False)

    def _shown(self) -> Page:
        return Page(self._mdp.goal, self._page, "text", tuple(dict.fromkeys(self._mdp.actions[self._state])))

    async def close(self) -> None:
        pass


class TextGym:
    """A gymnasium environment whose observations are texts, or that can draw itself as text (``render_mode="ansi"``).

    Its actions are those of ``info["admissible_commands"]`` where it gives them, else the numbers of a Discrete space
    (those that ``info["action_mask"]`` allows).

    Args:
        name: as `gymnasium.make` takes it.

    Raises:
        UserError: gymnasium does not know it, or it shows no text, or has other actions.
    """

    grammar = "gym"
    tasks: Sequence[str]

    def __init__(self, name: str, *, limit: int = 50) -> None:
        import gymnasium

        try:
            self._env = gymnasium.make(name)
            if "ansi" in self._env.metadata.get("render_modes", ()):
                self._env = gymnasium.make(name, render_mode="ansi")
        except gymnasium.error.Error as error:
            raise UserError(f"env=gym:{name}: {error}") from error
        self.benchmark, self.tasks = name, [name]
        spec = self._env.spec
        self.limit = limit if spec is None or spec.max_episode_steps is None else spec.max_episode_steps
        self._discrete = isinstance(self._env.action_space, gymnasium.spaces.Discrete)

    async def reset(self, task: str, seed: int) -> Page:
        return self._page(*self._env.reset(seed=seed))

    async def step(self, action: str) -> Transition:
        if self._discrete:
            valid = action in self._shown.actions
            if not valid:
                return Transition(self._shown, 0.0, False, False, f"{action}: there is no such action here")
            done = self._env.step(int(action))
        else:
            done = self._env.step(action)
        seen, reward, terminated, truncated, info = done
        return Transition(self._page(seen, info), float(reward), bool(terminated), bool(truncated))

    def _page(self, seen: Any, info: dict[str, Any]) -> Page:
        text = seen if isinstance(seen, str) or self._env.render_mode != "ansi" else self._env.render()
        if not isinstance(text, str):
            raise UserError(f"env=gym:{self.benchmark} shows no text")
        actions = info.get("admissible_commands")
        if actions is None:
            if not self._discrete:
                raise UserError(f"env=gym:{self.benchmark} has neither numbered actions nor admissible_commands")
            n = int(self._env.action_space.n)  # type: ignore[attr-defined]
            mask = info.get("action_mask", np.ones(n))
            actions = [str(a) for a in range(n) if mask[a]]
        goal = info.get("goal", info.get("objective"))
        self._shown = Page(
            goal if isinstance(goal, str) else self.benchmark, text, "text", tuple(dict.fromkeys(actions))
        )
        return self._shown

    async def close(self) -> None:
        self._env.close()
