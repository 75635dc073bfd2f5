"""Tapes of TapeAgents: ``{metadata, context, steps}``, one tape a file (or a line), its steps of many kinds.

What the agent thought, did and saw follows in one list; ``kind`` says which:

- ``*_action`` (and a few older names): an action, one Step each. Its text is a call of the kind without that ending:
  ``click(bid="a251")``. ``llm_output_parsing_failure_action`` is a response without an action.
- ``*_thought``, ``plan``: the thought of the action after it; thoughts after the last action are in ``extra.thoughts``.
- ``set_next_node`` and other marks of the agent's own course: left out of what it saw, kept in ``extra.control``.
- everything else (``question``, ``task``, ``*_observation``, ``*_result``, ``action_execution_failure``): what the
  agent saw before its next action. The text of ``page_observation`` is an accessibility tree (or HTML, where its first
  line says so); others stand as their one text, or as JSON. What comes after the last action is the final observation.

``error`` of an observation (or an ``action_execution_failure``) is the ``action_error`` of the action before it.
Screenshots are named by a path that is beside the tape, or missing. Where a tape says nothing of a page before an
action (several actions in one turn), the step has an empty observation.

Reward and success are those of ``metadata.result`` of WorkArena runs (``success``, ``reward``: the last action's);
both were lost in some, which are unlabelled.
GAIA tapes hold the agent's answer and the expected one, and no judgement: they are unlabelled (``extra`` has both),
and the ``success`` of a ``gaia_answer_action`` is what the agent says of itself. The reward 0 that a browser reports
with each page there is of no task, and stays in ``extra``. ``env_finished`` of a page is ``terminated`` of the action
before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import Sample, call_text, each, give_outcome, need, numbered, take, to_json
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad
from offline_lm.types import Episode, Rejected

SOURCE = "tapeagents"
SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
_WORKARENA = re.compile(r"task(\d+)_seed(\d{1,18})_(workarena\.[\w.-]+)\Z")
_GOALS = {"question": "content", "task": "task", "user": "content"}
_PAGES = {"=== HTML ===": "html", "=== MARKDOWN ===": "text"}
_CONTROL = frozenset({"set_next_node", "call", "respond", "pass", "broken_node"})
_ACTIONS = frozenset(
    "assistant assistant_answer execute_code tool_call final_step search_and_extract run_terminal_command".split()
)
_UNPARSED = "llm_output_parsing_failure_action"
_ANSWERS = ("answer", "text", "long_answer")


def detect(sample: Sample) -> str | None:
    if not {"metadata", "steps"} <= sample.keys or type(sample.value["steps"]) is not list:
        return None
    kinds = [step.get("kind") for step in sample.value["steps"] if type(step) is dict]
    tape = kinds and len(kinds) == len(sample.value["steps"]) and all(type(kind) is str for kind in kinds)
    return "metadata and steps, each with a kind" if tape else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, dataset: str | None = None) -> Iterator[Episode | Rejected]:
    """Every tape of a file or folder: one Episode or one Rejected for each.

    Args:
        dataset: Name of the collection; by default the folder's that holds the file.

    Raises:
        UserError: a folder without .json or .jsonl files.
    """

    def tapes(file: Path) -> Iterator[Episode | Rejected]:
        return each(SOURCE, file, lambda value, record: _episode(value, record, file, dataset))

    return chain.from_iterable(map(tapes, find(path)))


def _episode(tape: Any, record: Record, path: Path, dataset: str | None) -> Episode:
    entries = need(tape, "steps", list)
    metadata = take(tape, "metadata", dict) or {}
    turns = _Turns(path.parent)
    for i, entry in enumerate(entries):
        turns.add(entry, f"steps[{i}]")
    steps = turns.finish()
    if all(step.get("is_final_observation") for step in steps):
        raise Bad("no_steps", f"the {len(entries)} entries of the tape hold no action; leave it out")
    outcome = _outcome(metadata, steps)
    flags = [] if outcome["outcome_reward"] is not None else ["unlabelled"]
    if all(step["observation"] == "" for step in steps):
        flags.append("no_observations")
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    kept = {key: value for key, value in metadata.items() if key not in ("id", "author")}
    extra = {key: value for key, value in kept.items() if value not in (None, {}, [], "")}
    if tape.get("context"):
        extra["context"] = tape["context"]
    extra |= {key: value for key, value in tape.items() if key not in ("metadata", "context", "steps")}
    if turns.thoughts:
        extra["thoughts"] = turns.thoughts
    return Episode(
        source=SOURCE,
        native_id=_id(metadata, stem, record),
        dataset=dataset or path.parent.name,
        goal=turns.goal,
        steps=numbered(steps),
        policy_kind="llm",
        policy_id=turns.agent or take(metadata, "author", str, "metadata"),
        agent=turns.agent or take(metadata, "author", str, "metadata"),
        uri=str(path),
        sha256=record.sha256,
        quality_flags=tuple(flags),
        extra=extra,
        **_task(metadata, stem),
        **_cost(metadata),
        **outcome,
    )


def _id(metadata: dict[str, Any], stem: str, record: Record) -> str:
    """The tape's own id, else its place in its file."""
    return take(metadata, "id", str, "metadata") or f"{stem}:{record.offset}"


class _Turns:
    """Gathers the entries of a tape into steps: what was seen and thought since the last action, then the action."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        self.goal: str | None = None
        self.agent: str | None = None
        self.seen: list[tuple[str, str]] = []
        self.thoughts: list[str] = []
        self.fields: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}

    def add(self, entry: Any, place: str) -> None:
        kind = need(entry, "kind", str, place)
        metadata = take(entry, "metadata", dict, place) or {}
        other = take(metadata, "other", dict, f"{place}.metadata") or {}
        content = {key: value for key, value in entry.items() if key not in ("kind", "metadata")}
        if kind.endswith("_action") or kind in _ACTIONS:
            self.agent = self.agent or take(metadata, "agent", str, f"{place}.metadata") or None
            self.act(kind, content, metadata)
        elif kind.endswith("_thought") or kind == "plan":
            self.thoughts.append(_said(content))
        elif kind in _CONTROL:
            self.extra.setdefault("control", []).append({"kind": kind} | content)
        else:
            self.see(kind, content, other, place)

    def act(self, kind: str, content: dict[str, Any], metadata: dict[str, Any]) -> None:
        name = kind.removesuffix("_action")
        args = {key: value for key, value in content.items() if value is not None}
        step = self.page() | {
            "action": call_text(name, args),
            "action_name": name,
            "action_args": args,
            "action_grammar": SOURCE,
            "thought": "\n\n".join(self.thoughts) or None,
        }
        if kind == _UNPARSED:
            step |= {"action": None, "action_name": None, "action_args": None, "action_valid": False}
            step |= {"response": _said({"": args.get("llm_output", "")}), "action_error": to_json(args.get("error"))}
        if type(ref := args.get("bid")) is str:
            told = args.get("element_description")
            step["target"] = {"ref": ref} | ({"text": told} if type(told) is str else {})
        step["extra"] = step.get("extra", {}) | {
            key: metadata[key] for key in ("prompt_id", "node", "llm") if metadata.get(key)
        }
        self.steps.append(step)
        self.thoughts = []

    def see(self, kind: str, content: dict[str, Any], other: dict[str, Any], place: str) -> None:
        self.judge_last(kind, content, other, place)
        if kind in _GOALS:
            goal = take(content, _GOALS[kind], str, place)
            self.goal = self.goal or goal
        if kind == "page_observation":
            text = take(content, "text", str, place) or ""
            self.fields["title"] = _title(text)
        else:
            text = _said({key: value for key, value in content.items() if value not in (None, "", [])})
        self.seen.append((kind, text))
        if type(name := other.get("screenshot_path") or content.get("image_path")) is str and name:
            self.fields["screenshot"] = self.picture(name)
        if pages := {key: content[key] for key in ("current_page", "total_pages") if content.get(key) is not None}:
            self.extra["pages"] = pages
        if kept := {key: value for key, value in other.items() if value not in (None, "", {})}:
            self.extra.setdefault("observed", []).append({"kind": kind} | kept)

    def judge_last(self, kind: str, content: dict[str, Any], other: dict[str, Any], place: str) -> None:
        """What an observation says of the action before it."""
        if not self.steps or kind in _GOALS:
            return
        last = self.steps[-1]
        if "error" in content or kind == "action_execution_failure":
            error = take(content, "error", str, place)
            if error:
                last["action_error"], last["action_valid"] = error, False
            else:
                last.setdefault("action_valid", True)
        finished = take(other, "env_finished", bool, f"{place}.metadata.other")
        truncated = take(other, "truncated", bool, f"{place}.metadata.other")
        if finished is not None:
            last["terminated"] = finished
        if truncated is not None:
            last["truncated"] = truncated

    def picture(self, name: str) -> dict[str, Any]:
        """A picture beside the tape; a path that leads out of its folder is not followed."""
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or "\0" in name or len(name) > 1024:
            return _media.missing()
        for folder in (self.folder, self.folder / "screenshots", self.folder / "attachments" / "images"):
            shot = _media.of_file(folder.joinpath(*parts))
            if shot["status"] != "missing":
                return shot
        return _media.missing()

    def page(self) -> dict[str, Any]:
        """What was seen since the last action, as fields of a step."""
        pages = [text for kind, text in self.seen if kind == "page_observation"]
        if pages and all(kind == "page_observation" or kind in _GOALS for kind, _ in self.seen):
            told = "\n\n".join(pages)
            kind = next((kind for mark, kind in _PAGES.items() if told.startswith(mark)), "axtree")
        else:
            told, kind = "\n\n".join(text for _, text in self.seen), "text"
        step = {"observation": told, "observation_kind": kind} | self.fields
        if self.extra:
            step["extra"] = self.extra
        self.seen, self.fields, self.extra = [], {}, {}
        return step

    def finish(self) -> list[dict[str, Any]]:
        if self.seen:
            self.steps.append(self.page() | {"is_final_observation": True})
        for i, step in enumerate(self.steps[:-1]):
            ended = step.get("terminated") or step.get("truncated")
            if ended and not self.steps[i + 1].get("is_final_observation"):
                raise Bad("steps_after_end", f"action {i} ended the task, and another action follows it")
        return self.steps


def _said(content: dict[str, Any]) -> str:
    """The one text of an entry, else its fields as JSON."""
    values = list(content.values())
    return values[0] if len(values) == 1 and type(values[0]) is str else to_json(content)


def _title(tree: str) -> str | None:
    """The page's name, from the root of its accessibility tree."""
    found = re.search(r"^RootWebArea (.*?)(?:, focused)?$", tree[:4096], re.MULTILINE)
    return found[1].strip() or None if found else None


def _outcome(metadata: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    last = next(step for step in reversed(steps) if not step.get("is_final_observation"))
    result = metadata.get("result")
    judged = result if type(result) is dict else {}
    success = take(judged, "success", bool, "metadata.result")
    reward = take(judged, "reward", float, "metadata.result")
    if reward is None and success is not None:
        reward = float(success)
    give_outcome(steps, reward)
    args = last["action_args"] or {}
    answered = (last["action_name"] or "").endswith("answer")
    terminated, truncated = last.get("terminated"), last.get("truncated")
    if metadata.get("error"):
        reason = "agent_error"
    elif terminated or truncated:
        reason = "env_done" if terminated else "step_limit"
    else:
        reason = "agent_stop" if answered else "unknown"
    if answered and terminated is None and truncated is None:
        terminated, truncated = True, False  # the answer ends the task
        last |= {"terminated": True, "truncated": False}
    said = args.get("success") if answered else None
    return {
        "outcome_reward": reward,
        "success": success if success is not None or reward is None else reward > 0,
        "self_reported_success": said if type(said) is bool else None,
        "terminated": terminated,
        "truncated": truncated,
        "end_reason": reason,
        "final_answer": next((args[key] for key in _ANSWERS if type(args.get(key)) is str), None) if answered else None,
    }


def _task(metadata: dict[str, Any], stem: str) -> dict[str, Any]:
    """WorkArena's task and seed from its result or the file's name, GAIA's from the metadata."""
    result = metadata.get("result")
    result = result if type(result) is dict else {}
    gaia = metadata.get("task")
    if type(gaia) is dict:
        level = take(metadata, "level", int, "metadata")
        return {
            "benchmark": "gaia",
            "task_id": take(gaia, "task_id", str, "metadata.task") or stem,
            "task_family": None if level is None else f"level {level}",
            "trial": take(metadata, "attempt_number", int, "metadata"),
        }
    named = _WORKARENA.match(stem)
    seed = take(result, "seed", int, "metadata.result")
    if seed is None and named:
        seed = int(named[2])
    task = result.get("name") if type(result.get("name")) is str else None
    task = task or (named[3] if named else None)
    return {
        "benchmark": "workarena" if task and (named or "workarena" in task) else None,
        "task_id": task,
        "task_family": task.removeprefix("workarena.") if task else None,
        "seed": seed,
    }


def _cost(metadata: dict[str, Any]) -> dict[str, Any]:
    other = take(metadata, "other", dict, "metadata") or {}
    timers = take(other, "timers", dict, "metadata.other") or {}
    return {"duration_s": take(timers, "solve_task", float, "timers")}
