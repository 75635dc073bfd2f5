"""Tasks of MiniWoB++ (Shi et al. 2017, Liu et al. 2018) in a real browser, without its Python package.

The package's wheel holds the HTML of 130 tasks (MIT licence); `fetch` unpacks it. A task is a page that draws a problem
from `Math.random` and says when it is solved. Rewards are those of BrowserGym: 1 where the page's own is positive, else
0; the page's own is `Transition.raw_reward`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from offline_lm.envs.action_grammar import GRAMMAR, BadAction, call, parse
from offline_lm.envs.browser import Failed, Session, Tab
from offline_lm.envs.gate import Gate
from offline_lm.envs.protocol import Page, Transition
from offline_lm.errors import UserError

BENCHMARK = "miniwob"
VERSION = "1.1.0"
ENVIRONMENT_VARIABLE = "MINIWOB_HTML"
ORIGIN = "http://miniwob.test"
"""Where a folder is served; `.test` is never a real host (RFC 2606)."""
LIMIT = 15
"""Steps: the most that a task needs here is 13."""
VIEWPORT = (500, 320)
HIDDEN = ("#query", "#reward-display", "#click-canvas", "#sync-task-cover")
"""The goal, which is told apart, and the display for people."""

_START = """seed => {
  if (document.activeElement) document.activeElement.blur();
  Math.seedrandom(seed);
  core.EPISODE_MAX_TIME = 1e9;
  core.startEpisodeReal();
}"""
_STATE = """typeof core === "undefined" || typeof WOB_DONE_GLOBAL === "undefined"
  ? null : [core.getUtterance(), WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL]"""
"""Null on a page that is none of MiniWoB's: an action may lead away."""
_DATE = r"\d{1,2}/\d{1,2}/\d{2,4}"
_TIME = r"\d{1,2}:\d{2} ?[AP]M"


class MiniWob:
    """One tab of MiniWoB (`offline_lm.envs.protocol.Environment`).

    Args:
        url: of the folder that holds the tasks' pages, as `served` gives it.
        tasks: their names.
        fresh: loads the page anew for each episode; else a task's next episode begins in the page of its last one, as
            MiniWoB's own package has it. That is several times faster, and where a page remembers, not the same.
    """

    benchmark = BENCHMARK
    grammar = GRAMMAR

    def __init__(
        self, session: Session, url: str, tasks: Sequence[str], *, limit: int = LIMIT, fresh: bool = True
    ) -> None:
        self.tasks, self.limit, self._url = tasks, limit, url
        self._tab = Tab(session, viewport=VIEWPORT, hidden=HIDDEN)
        self._fresh, self._shown = fresh, ""
        self._goal = ""

    async def reset(self, task: str, seed: int) -> Page:
        if self._fresh or task != self._shown:
            self._shown = ""
            await self._tab.open(f"{self._url}{task}.html")
            self._shown = task
        else:
            await self._tab.rewind()
        await self._tab.evaluate(_START, seed)
        self._goal = ""
        page, *_ = await self._look()
        return page

    async def step(self, action: str) -> Transition:
        error = None
        try:
            await self._tab.act(parse(action))
        except (BadAction, Failed) as why:
            error = str(why)
        page, done, raw = await self._look()
        reward = float(done and raw > 0)
        return Transition(page, reward, done, False, error, raw if done else None, reward > 0 if done else None)

    async def _look(self) -> tuple[Page, bool, float]:
        await self._tab.settle()
        text, state = await self._tab.look(_STATE)
        if state is None:
            self._shown = ""
        goal, done, raw = state or (self._goal, False, 0)
        self._goal = self._goal or goal if isinstance(goal, str) else goal["utterance"]
        actions = (() if done else candidates(self._tab.elements.values(), self._goal)) or (call("noop"),)
        page = Page(self._goal, text, "axtree", actions, self._tab.url, self._tab.title)
        return page, bool(done), float(raw)

    async def close(self) -> None:
        self._shown = ""
        await self._tab.close()


def candidates(elements: Iterable[dict], goal: str) -> tuple[str, ...]:
    """Actions on a page: a click on each element, each option of a list, the way into each submenu, and in each field
    each text that the goal quotes (where it quotes none, its words)."""
    quoted = texts_of(goal)
    actions = []
    for element in elements:
        ref = element["ref"]
        if element["options"] is not None:
            actions += [call("select_option", ref, option) for option in element["options"]]
            continue
        actions.append(call("click", ref))
        if element["opens"] and element["role"] == "menuitem":
            actions.append(call("hover", ref))
        if element["editable"]:
            actions += [call("fill", ref, text) for text in map(_TYPED.get(element["type"], str), quoted) if text]
    return tuple(dict.fromkeys(actions))


def _typed_date(text: str) -> str | None:
    """05/20/2010 as a date field takes it: 2010-05-20."""
    found = re.fullmatch(r"(\d{1,2})/(\d{1,2})/(\d{4})", text)
    return None if found is None else f"{found[3]}-{int(found[1]):02}-{int(found[2]):02}"


def _typed_time(text: str) -> str | None:
    """9:37 PM as a time field takes it: 21:37."""
    found = re.fullmatch(r"(\d{1,2}):(\d{2}) ?([AP])M", text)
    return None if found is None else f"{int(found[1]) % 12 + 12 * (found[3] == 'P'):02}:{found[2]}"


_TYPED = {"date": _typed_date, "time": _typed_time}


def texts_of(goal: str) -> list[str]:
    """What a goal may ask to be typed."""
    found = re.findall(r'"([^"]*)"', goal) + re.findall(rf"\b(?:{_TIME}|{_DATE})", goal)
    if not found:
        found = re.findall(r"[\w@.'$-]*\w", goal)
    return list(dict.fromkeys(filter(None, found)))


# -- where the pages are -----------------------------------------------------------------------------------------


def served(setting: str | None) -> tuple[Gate, str, list[str]]:
    """(what lets the browser reach the tasks, the URL of their folder, their names).

    Args:
        setting: a folder that holds ``miniwob/*.html`` and ``core/``, or a URL that serves it; None: $MINIWOB_HTML,
            else where `fetch` put it.

    Raises:
        UserError: no tasks there.
    """
    place = setting or os.environ.get(ENVIRONMENT_VARIABLE) or str(default_folder())
    if "://" in place:
        base = place.rstrip("/").removesuffix("/miniwob")
        return Gate(base), f"{base}/miniwob/", []
    folder = Path(place)
    names = sorted(file.stem for file in (folder / "miniwob").glob("*.html"))
    if not names:
        raise UserError(f"{folder} holds no miniwob/*.html: get them with `python -m offline_lm.collect fetch=miniwob`")
    return Gate(ORIGIN, folder), f"{ORIGIN}/miniwob/", names


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "offline_lm", f"miniwob-{VERSION}")


def fetch(folder: Path) -> int:
    """Puts the tasks' pages into `folder`: those of the wheel `miniwob`, which is downloaded, not installed.

    Returns:
        how many tasks there are.

    Raises:
        UserError: it could not be downloaded.
    """
    with tempfile.TemporaryDirectory() as temporary:
        wanted = f"miniwob=={VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"pip could not download {wanted}: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = Path(temporary).glob("*.whl")
        return unpack(wheel, folder)


def unpack(wheel: Path, folder: Path) -> int:
    """The HTML of the wheel into `folder`; how many tasks there are."""
    inside = "miniwob/html/"
    with zipfile.ZipFile(wheel) as archive:
        for item in archive.infolist():
            if item.filename.startswith(inside) and not item.is_dir():
                file = folder / item.filename.removeprefix(inside)
                if not file.resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{wheel}: {item.filename} would be written outside of {folder}")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(item))
    return len(list((folder / "miniwob").glob("*.html")))
