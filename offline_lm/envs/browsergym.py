"""Any task that is registered with BrowserGym (Drouin et al. 2024), behind the same interface as our own browser.

BrowserGym is no dependency: it pins another playwright, and wants an environment of its own. What it shows is its
accessibility tree as text, as AgentLab's agents see it; rewards, ends and time are its own (half a second an action).
Pages reach whatever the network lets them. Its driver belongs to one thread, so that several environments take turns.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from offline_lm.envs.action_grammar import GRAMMAR, BadAction, call, parse
from offline_lm.envs.miniwob import candidates
from offline_lm.envs.protocol import Lost, Page, Transition
from offline_lm.errors import UserError

T = TypeVar("T")

PREFIX = "browsergym/"
LIMIT = 30
"""Steps, where the task's registration names no limit."""

_PACKAGES = {"openended": "core", "visualwebarena": "visualwebarena", "workarena": "workarena"}
_FIELDS = {"textbox", "searchbox", "spinbutton"}
_thread = ThreadPoolExecutor(1, "browsergym")


class BrowserGym:
    """One task of BrowserGym.

    Args:
        task: its id behind ``browsergym/``, such as ``miniwob.click-test``.
        options: of `gymnasium.make`, such as `pw_chromium_kwargs`.

    Raises:
        UserError: its package is not installed, or has no such task.
    """

    grammar = GRAMMAR

    def __init__(self, task: str, **options: Any) -> None:
        self.benchmark, _, self.name = task.partition(".")
        self.name = self.name or task
        package = f"browsergym.{_PACKAGES.get(self.benchmark, self.benchmark)}"
        import gymnasium

        try:
            importlib.import_module(package)
            self._flat: Callable[..., str] = importlib.import_module("browsergym.utils.obs").flatten_axtree_to_str
            self._error: type[Exception] = importlib.import_module("playwright.sync_api").Error
        except ModuleNotFoundError as error:
            raise UserError(
                f"env={PREFIX}{task} needs `pip install {package.replace('.', '-')}` (no module {error.name}), best in"
                " an environment of its own: it pins another playwright"
            ) from error
        try:
            self._env = gymnasium.make(PREFIX + task, disable_env_checker=True, **options)
        except gymnasium.error.Error as error:
            raise UserError(f"env={PREFIX}{task}: {error}") from error
        self.tasks: Sequence[str] = [self.name]
        spec = self._env.spec
        self.limit = LIMIT if spec is None or spec.max_episode_steps is None else spec.max_episode_steps
        self._page: Page | None = None

    async def reset(self, task: str, seed: int) -> Page:
        seen, _ = await self._do(lambda: self._env.reset(seed=seed))
        return self._shown(seen)

    async def step(self, action: str) -> Transition:
        """What our grammar cannot read is not sent: BrowserGym makes Python code of an action and runs it."""
        assert self._page is not None
        try:
            said = str(parse(action))
        except BadAction as why:
            return Transition(self._page, 0.0, False, False, str(why))
        seen, given, terminated, truncated, _ = await self._do(lambda: self._env.step(said))
        reward, done = float(given), bool(terminated)
        won = None if not done or 0 < reward < 1 else reward >= 1
        error = seen["last_action_error"] or None
        return Transition(self._shown(seen), reward, done, bool(truncated), error, success=won)

    def _shown(self, seen: dict[str, Any]) -> Page:
        tree, properties = seen["axtree_object"], seen["extra_element_properties"]
        text = self._flat(tree, extra_properties=properties, filter_visible_only=True)
        actions = candidates(elements(tree, properties), seen["goal"]) or (call("noop"),)
        titles, active = seen["open_pages_titles"], int(seen["active_page_index"][0])
        title = titles[active] if active < len(titles) else None
        self._page = Page(seen["goal"], text, "axtree", actions, seen["url"], title)
        return self._page

    async def _do(self, work: Callable[[], T]) -> T:
        """In the thread of BrowserGym's driver. Raises Lost where the browser fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(_thread, work)
        except self._error as error:
            raise Lost(str(error).splitlines()[0]) from error

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(_thread, self._close)

    def _close(self) -> None:
        try:
            self._env.close()
        except self._error:  # it died: nothing is left to close
            self._env.unwrapped.task = self._env.unwrapped.context = None  # type: ignore[attr-defined]


def elements(tree: dict[str, Any], properties: dict[str, Any]) -> list[dict[str, Any]]:
    """What can be acted on, as `offline_lm.envs.miniwob.candidates` takes it: the visible elements that are clickable,
    fields, or lists with their options."""
    nodes = {node["nodeId"]: node for node in tree["nodes"]}

    def told(node: dict[str, Any], key: str) -> str:
        return str(node.get(key, {}).get("value", ""))

    def options(node: dict[str, Any]) -> list[str]:
        under = [nodes[child] for child in node.get("childIds", ()) if child in nodes]
        own = [told(child, "name") for child in under if told(child, "role") == "option"]
        return own + [name for child in under for name in options(child)]

    out = []
    for node in tree["nodes"]:
        ref, role = node.get("browsergym_id"), told(node, "role")
        known = properties.get(ref, {})
        if ref is None or known.get("visibility", 0) < 0.5 or role == "option":
            continue
        listed = options(node) if role in ("combobox", "listbox") else []
        if not (known.get("clickable") or role in _FIELDS or listed):
            continue
        flags = {p["name"]: p.get("value", {}).get("value") for p in node.get("properties", ())}
        out.append({
            "ref": ref, "role": role, "options": listed or None, "opens": "hasPopup" in flags,
            "editable": role in _FIELDS and not flags.get("readonly"), "type": "",
        })  # fmt: skip
    return out


def find_pages(setting: str | None) -> None:
    """Tells BrowserGym where MiniWoB's pages are, if $MINIWOB_URL does not: the folder or URL that `setting` names."""
    if setting is not None:
        place = setting if "://" in setting else f"file://{os.path.abspath(setting)}"
        os.environ.setdefault("MINIWOB_URL", place.rstrip("/").removesuffix("/miniwob") + "/miniwob/")
