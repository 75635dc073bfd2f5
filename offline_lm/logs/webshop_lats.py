"""WebShop searches of Language Agent Tree Search (LATS; Zhou et al. 2024): the text of Python's ``logging``.

A search begins with ``Iteration 1...``. It asks the model for several actions at one state (``PROMPT``, ``SAMPLED
ACTION``), tries each in the shop (``NEW NODE``), and asks the model how good each new state is (``VALUES``). Children
with equal actions are one node of the tree, the last of them.

- A rollout is a path from the root to a node that the shop ended (``reward:`` before it): one episode each. The first
  of a search is the one that LATS returns, or continues with; the others have it as ``parent_episode_id`` and in
  ``branch_step`` the first step that is not its own. Several Buy Now sampled at one state are as many rollouts.
- A search in which nothing ended is one unlabelled episode, the deepest path. One without any node has no step and is
  rejected (``no_steps``): the run was stopped.
- A step's observation is the page of the parent node. Every action sampled there is a candidate (``source=search``),
  ``score`` the model's value of the state that it led to: null where none was logged (a terminal node, an equal
  action) or where LATS found no number in the answer (it writes -1). What the shop answered to the actions not taken
  stands in the first episode's ``extra``, under ``siblings``.
- The shop's rewards are logged for every node: 0 unless ``reward:`` says more. ``Invalid action!`` has -1, which is
  the search's own mark and no reward: an invalid action earns 0, with ``action_valid=False``.
- The prompts, and the texts in which the model judged a state, are not kept: they repeat the pages.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from offline_lm.logs import _files, _webshop
from offline_lm.logs._adapters import Sample, contents, numbered, rejected
from offline_lm.logs._files import TOTAL_BYTES
from offline_lm.logs._records import Bad
from offline_lm.store.rows import episode_id
from offline_lm.types import Candidate, Episode, Rejected

SOURCE = "webshop_lats"
SUFFIXES = (".log", ".log.gz", ".log.zst")
MAX_SAMPLES = 1 << 20
"""characters of one list of sampled actions"""
_STAMP = rb"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - [A-Z]+ - "
_SEARCH = re.compile(_STAMP + rb"Iteration 1\.\.\.\r?$", re.MULTILINE)
_MESSAGE = re.compile(_STAMP.decode(), re.MULTILINE)
_NODE = re.compile(
    r"NEW NODE: Node\(depth=(\d+), value=(-?[\d.]+|-?inf|nan), visits=\d+, action=([^\n]*?), observation=(.*)\)\s*\Z",
    re.DOTALL,
)
_TITLE = re.compile(r"^Web[Ss]hop\s*$", re.MULTILINE)
_ACTION = re.compile(r"^Action: *([^\n]*)", re.MULTILINE)
_SESSION = re.compile(r"'(fixed_\d+)': \{'session'")
_NUMBER = re.compile(r"-?\d+(\.\d+)?\Z")


@dataclass(slots=True)
class Tried:
    """One sampled action, tried in the shop."""

    action: str
    page: str
    ended: bool
    reward: float
    response: str | None = None


@dataclass(slots=True)
class State:
    """A node of the tree at which actions were sampled, named by the actions that lead to it."""

    path: tuple[str, ...]
    page: str
    tried: list[Tried] = field(default_factory=list)
    values: dict[str, float | None] = field(default_factory=dict)


@dataclass(slots=True)
class Tree:
    """Everything that one search logged."""

    states: dict[tuple[str, ...], State]
    rollouts: list[tuple[State, int]]
    """(state, index of the action that ended there)"""
    session: str | None
    iterations: int


def detect(sample: Sample) -> str | None:
    head = sample.head
    shop = b"WebShop" in head or b"Webshop" in head
    return "the log of a LATS search in WebShop" if shop and _SEARCH.search(head) and b"PROMPT: " in head else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, model: str | None = None) -> Iterator[Episode | Rejected]:
    """Every rollout of every search in a log, or in those of a folder. `model` names the model; the logs do not.

    Raises UserError for a folder without logs.
    """
    return chain.from_iterable(_read_file(file, model) for file in find(path))


def _read_file(path: Path, model: str | None) -> Iterator[Episode | Rejected]:
    try:
        data = contents(path, TOTAL_BYTES)
    except Bad as bad:
        yield rejected(SOURCE, path, bad)
        return
    starts = [match.start() for match in _SEARCH.finditer(data)]
    if not starts:
        empty = Bad("unknown_format", "the file holds no line `Iteration 1...`; is it the log of a LATS search?")
        yield rejected(SOURCE, path, empty, 0, data[:1024])
        return
    for number, (start, end) in enumerate(pairwise([*starts, len(data)])):
        block = data[start:end]
        try:
            tree = _tree(_webshop.decode(block).replace("\r\n", "\n"))
            yield from _episodes(tree, number, path, start, hashlib.sha256(block).hexdigest(), model)
        except Bad as bad:
            yield rejected(SOURCE, path, bad, start, block)


# --- from text to a tree -----------------------------------------------------------------------------------


def _tree(text: str) -> Tree:
    tree = Tree(states={}, rollouts=[], session=None, iterations=0)
    state: State | None = None
    samples: list[str | None] = []
    reward, judged = None, []
    for message in _MESSAGE.split(text):
        if message.startswith("Iteration "):
            tree.iterations += 1
        elif message.startswith("PROMPT: "):
            _give_values(state, judged)
            state, samples, judged = _state(message, tree), [], []
        elif message.startswith("SAMPLED ACTION: "):
            samples = _samples(message.removeprefix("SAMPLED ACTION: "))
        elif message.startswith("reward:"):
            reward = _number(message.removeprefix("reward:").strip())
        elif message.startswith("VALUES: "):
            judged.append(_number(message.removeprefix("VALUES: ").strip()))
        elif message.startswith("{") and (sessions := _SESSION.findall(message)):
            tree.session = sessions[-1]
        elif message.startswith("NEW NODE: "):
            found = _NODE.match(message)
            if state is None or found is None:
                raise Bad("bad_value", f"a NEW NODE without a PROMPT, or cut: {message[:60]!r}; was the log mixed?")
            if reward is not None:
                tree.rollouts.append((state, len(state.tried)))
            response = samples[len(state.tried)] if len(state.tried) < len(samples) else None
            state.tried.append(Tried(found[3], found[4].strip("\n"), reward is not None, reward or 0.0, response))
            reward = None
    _give_values(state, judged)
    return tree


def _state(prompt: str, tree: Tree) -> State:
    """The state that a prompt ends in: examples come first, then the shop's first page and what was done since."""
    titles = list(_TITLE.finditer(prompt))
    own = prompt[titles[-1].start() :] if titles else ""
    path = tuple(action.strip() for action in _ACTION.findall(own) if action.strip())
    if not own or (path and path[:-1] not in tree.states):
        raise Bad("bad_value", "a PROMPT does not continue what was searched before; was the log mixed?")
    if path in tree.states:
        return tree.states[path]
    if path:
        page = next((t.page for t in reversed(tree.states[path[:-1]].tried) if t.action == path[-1]), None)
        if page is None:
            raise Bad("bad_value", f"a PROMPT follows the action {path[-1][:60]!r}, which no NEW NODE has")
    else:
        page = own.split("\nAction:")[0].strip("\n")
    return tree.states.setdefault(path, State(path, page))


def _samples(text: str) -> list[str | None]:
    """The responses that name an action, as LATS finds it; nothing where the list cannot be read."""
    try:
        given = ast.literal_eval(text.strip()) if len(text) <= MAX_SAMPLES else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        given = None
    if type(given) is not list:
        return []
    return [s for s in given if type(s) is str and re.search(r"^Action[^\n:]*:[ \t]*[^\s:]", s, re.MULTILINE)]


def _give_values(state: State | None, judged: list[float | None]) -> None:
    """LATS judges the distinct children that did not end, in the order in which their actions first came."""
    if state is None or not judged:
        return
    ended = {t.action: t.ended for t in state.tried}
    open_actions = [action for action in ended if not ended[action]]
    if len(judged) > len(open_actions):  # it asked again
        judged = judged[-len(open_actions) :] if open_actions else []
    for action, value in zip(open_actions, judged, strict=False):
        state.values[action] = None if value is None or value < 0 else value


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.match(text) and len(text) < 32 else None


# --- from a tree to episodes -------------------------------------------------------------------------------


def _episodes(tree: Tree, number: int, path: Path, offset: int, sha256: str, model: str | None) -> Iterator[Episode]:
    tried = [state for state in tree.states.values() if state.tried]
    if not tried:
        raise Bad("no_steps", "the search was stopped before it tried an action; leave it out")
    deepest = max(tried, key=lambda state: len(state.path))
    ends = tree.rollouts or [(deepest, len(deepest.tried) - 1)]
    dataset = path.name.split(".")[0]
    first = f"{number}"
    trunk = _trail(*ends[0])
    for i, (state, taken) in enumerate(ends):
        trail = _trail(state, taken)
        branch = next((k for k, (a, b) in enumerate(zip(trail, trunk, strict=False)) if a != b), len(trunk))
        end = state.tried[taken]
        ended = True if end.ended else None  # unknown where nothing ended
        steps = [_step(tree.states[at], index, siblings=i == 0, labelled=end.ended) for at, index in trail]
        steps = [step | {"source_offset": offset} for step in steps]
        steps[-1] |= {"terminated": ended, "truncated": None if ended is None else False}
        steps.append({"observation": end.page, "observation_kind": "text", "is_final_observation": True})
        yield Episode(
            source=SOURCE,
            native_id=first if i == 0 else f"{first}/{i}",
            dataset=dataset,
            steps=numbered(steps),
            benchmark="webshop",
            task_id=f"webshop/{tree.session}" if tree.session else None,
            site="webshop",
            goal=_webshop.goal(tree.states[()].page) if () in tree.states else None,
            policy_kind="search",
            agent="LATS",
            model=model,
            outcome_reward=end.reward if end.ended else None,
            raw_reward=end.reward if end.ended else None,
            success=end.reward == 1 if end.ended else None,
            terminated=ended,
            truncated=None if ended is None else False,
            end_reason="env_done" if end.ended else "unknown",
            parent_episode_id=episode_id(SOURCE, dataset, first) if i else None,
            branch_step=branch if i else None,
            uri=str(path),
            sha256=sha256,
            quality_flags=() if end.ended else ("unlabelled",),
            extra={"iterations": tree.iterations},
        )


def _trail(state: State, taken: int) -> list[tuple[tuple[str, ...], int | str]]:
    """(path of the state, action taken there) from the root; the last is the index among those tried, for equal
    actions that ended are rollouts of their own."""
    return [*((state.path[:k], action) for k, action in enumerate(state.path)), (state.path, taken)]


def _step(state: State, taken: int | str, *, siblings: bool, labelled: bool) -> dict[str, Any]:
    if isinstance(taken, str):  # of equal actions the last is the node
        taken = max(i for i, tried in enumerate(state.tried) if tried.action == taken)
    own = state.tried[taken]
    step = {
        "observation": state.page,
        "observation_kind": "text",
        "response": own.response,
        **_webshop.action_fields(own.action),
        "action_valid": own.page != _webshop.INVALID,
        "candidates": tuple(
            Candidate(
                action=tried.action,
                response=tried.response,
                score=None if tried.ended else state.values.get(tried.action),
                source="search",
                executed=i == taken,
            )
            for i, tried in enumerate(state.tried)
        ),
        "candidates_complete": False,
    }
    if not step["action_valid"]:
        step["action_error"] = own.page
    if labelled:
        step |= {"reward": own.reward, "reward_source": "env"}
    others = {tried.action: tried.page for i, tried in enumerate(state.tried) if i != taken}
    others.pop(own.action, None)
    if siblings and others:
        step["extra"] = {"siblings": others}
    return step
