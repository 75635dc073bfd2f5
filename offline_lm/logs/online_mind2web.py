"""Online-Mind2Web submissions: a folder per task with ``result.json`` and the pictures in ``trajectory/``.

``result.json`` is ``{task_id, task, final_result_response, action_history[], thoughts[]}``, from some writers with
``result_status`` (how the agent's loop ended) or ``judge {score, reasoning}``. The folder's name is the episode's id,
the folder above it the dataset.

Actions are sentences; those of the writers known here are taken apart: ``Click at (600, 475)``, ``Type "mug"``,
``Press ENTER``, ``Scroll (delta_x=0, delta_y=400)``, ``Navigate to URL``, ``Navigate back``, ``Hover at (1, 2)``,
``Drag from (1, 2) to (3, 4)``, ``Select picker sp_1 -> ...``, ``Slider (horizontal) set to 30 [range 18-85]``, and
Mind2Web's ``<a> Sort -> CLICK``. Any other sentence is kept as the action alone.

No page is logged but its picture, often a Git LFS pointer: ``observation`` is empty, with the flag
``no_observations``. Pictures numbered from 0 show the page before the action of that number; numbered from 1, as the
recorder of agent-browser-protocol does, the page after it, so they move to the next step and the last is the final
observation. That recorder gives all actions of one call the picture after the last of them; under one thought the
same picture is taken to be one call, and none of its actions is shown the outcome.

No label is in the folder: ``result_status`` says that the agent stopped by itself, or ran out of turns
(``error_max_turns``), not that it succeeded. A judge's score is a label, never a reward. A record with an answer or a
score and no action is Rejected as ``outcome_only``. Thoughts that are not one for each action stay in ``extra``, with
the flag ``length_mismatch``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from offline_lm.errors import UserError
from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import Sample, contents, each, need, numbered, take
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Label, Rejected

SOURCE = "online_mind2web"
RESULT = "result.json"
_PICTURES = re.compile(r"(\d{1,6})_(?:full_)?screenshot\.(?:png|jpe?g|webp)", re.IGNORECASE)
_KNOWN = ("task_id", "task", "final_result_response", "action_history", "thoughts", "judge")

# status -> (terminated, truncated, end_reason); the rest of the agent SDK's statuses are errors
_ENDS: dict[str | None, tuple[bool | None, bool | None, str]] = {
    "success": (True, False, "agent_stop"),
    "error_max_turns": (False, True, "step_limit"),
    "error_during_execution": (None, None, "agent_error"),
}

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_POINT = rf"\({_NUMBER}, {_NUMBER}\)"
_GRAMMAR: tuple[tuple[str, re.Pattern[str], tuple[str, ...]], ...] = (
    ("click", re.compile(rf"Click at {_POINT}"), ("x", "y")),
    ("type", re.compile(r'Type "(.*)"', re.DOTALL), ("text",)),
    ("press", re.compile(r"Press (\S+)"), ("key",)),
    ("scroll", re.compile(rf"Scroll \(delta_x={_NUMBER}, delta_y={_NUMBER}\)"), ("delta_x", "delta_y")),
    ("navigate", re.compile(r"Navigate to (\S+)"), ("url",)),
    ("navigate", re.compile(r"Navigate (back|forward|reload)"), ("to",)),
    ("hover", re.compile(rf"Hover at {_POINT}"), ("x", "y")),
    ("drag", re.compile(rf"Drag from {_POINT} to {_POINT}"), ("x1", "y1", "x2", "y2")),
    ("select", re.compile(r"Select picker (\S+) -> (.+)"), ("ref", "option")),
    ("slider", re.compile(rf"Slider \((\w+)\) set to {_NUMBER} \[range (.+)\]"), ("orientation", "value", "range")),
)
_MIND2WEB = re.compile(r"(.+) -> (CLICK|TYPE|SELECT|HOVER|ENTER)(?:: ?(.*))?", re.DOTALL)


def detect(sample: Sample) -> str | None:
    if sample.name != RESULT or not {"task_id", "task"} <= sample.keys:
        return None
    told = {"action_history", "final_result_response"} & sample.keys
    return "result.json with a task and an action_history or a final_result_response" if told else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, (RESULT,))


def read(
    path: Path,
    *,
    dataset: str | None = None,
    model: str | None = None,
    agent: str | None = None,
    tasks: str | None = None,
) -> Iterator[Episode | Rejected]:
    """Every result.json at or below `path`. The folders name no model and no agent: `model` and `agent` may.

    `tasks` is the benchmark's own list, ``Online_Mind2Web.json``: the site of each task, its level and its length.

    Raises:
        UserError: a folder without any result.json, a file that cannot be opened, or `tasks` that are no such list.
    """
    given = {"dataset": dataset, "model": model, "agent": agent}
    known = {} if tasks is None else _tasks(Path(tasks))
    to_episode = partial(_episode, given=given, tasks=known)
    return chain.from_iterable(each(SOURCE, file, partial(to_episode, path=file)) for file in find(path))


def _tasks(path: Path) -> dict[str, dict[str, Any]]:
    try:
        listed = parse(contents(path))
        if type(listed) is not list:
            raise Bad("wrong_type", "it is not a list of tasks")
        for task in listed:
            urlsplit(need(task, "website", str))
        return {need(task, "task_id", str): task for task in listed}
    except (Bad, ValueError) as error:
        raise UserError(f"tasks={path}: {error}; give the benchmark's Online_Mind2Web.json") from None


def _episode(
    value: Any, record: Record, path: Path, given: dict[str, str | None], tasks: dict[str, dict[str, Any]]
) -> Episode:
    task_id, goal = need(value, "task_id", str), need(value, "task", str)
    answer = take(value, "final_result_response", str) or None
    labels = _labels(value)
    actions = take(value, "action_history", list)
    if not actions:
        if answer is None and not labels:
            raise Bad("no_steps", "action_history is empty and there is no answer; leave the record out")
        score = f" (judge's score {labels[0].value:g})" if labels and labels[0].value is not None else ""
        message = f"the record holds an outcome{score} and no action; give it to the steps of another log with labels="
        raise Bad("outcome_only", message)

    flags = ["unlabelled", "no_observations"]
    extra = {key: item for key, item in value.items() if key not in _KNOWN}
    thoughts = take(value, "thoughts", list) or []
    if thoughts and len(thoughts) != len(actions):
        flags.append("length_mismatch")
        extra["thoughts"], thoughts = thoughts, []
    task = tasks.get(task_id, {})
    website = task.get("website")
    extra |= {key: task[key] for key in ("level", "reference_length") if key in task}
    steps = [_action(item, i) for i, item in enumerate(actions)]
    for i, thought in enumerate(thoughts):
        if thought is not None and type(thought) is not str:
            raise Bad("wrong_type", f"thoughts[{i}] must be a string")
        steps[i]["thought"] = thought or None
    final = _see(steps, _pictures(path.parent / "trajectory"))

    status = take(value, "result_status", str)
    end = _ENDS.get(status, (None, None, "unknown"))
    if status is None and answer is not None:
        end = (True, False, "agent_stop")
    steps[-1] |= {"terminated": end[0], "truncated": end[1]}
    if final is not None:
        steps.append({"is_final_observation": True, "screenshot": final})
    return Episode(
        source=SOURCE,
        native_id=path.parent.name or task_id,
        dataset=given["dataset"] or path.parent.parent.name or None,
        steps=numbered(steps),
        benchmark=SOURCE,
        task_id=task_id,
        site=urlsplit(website).hostname if website else None,
        start_url=website,
        goal=goal,
        policy_kind="llm",
        model=given["model"],
        agent=given["agent"],
        terminated=end[0],
        truncated=end[1],
        end_reason=end[2],
        final_answer=answer,
        labels=labels,
        uri=str(path),
        sha256=record.sha256,
        quality_flags=tuple(flags),
        extra=extra,
    )


def _labels(value: Any) -> tuple[Label, ...]:
    judge = take(value, "judge", dict)
    if judge is None:
        return ()
    score, reason = take(judge, "score", float, "judge"), take(judge, "reasoning", str, "judge")
    return (Label(kind="judge", name="score", value=score, reason=reason),)


def _action(text: Any, index: int) -> dict[str, Any]:
    step: dict[str, Any] = {"observation": "", "observation_kind": "text", "action_grammar": SOURCE}
    if text is None:  # the writer had no words for it
        return step | {"action": "", "action_valid": False}
    if type(text) is not str:
        raise Bad("wrong_type", f"action_history[{index}] must be a string")
    step["action"] = text
    for name, pattern, keys in _GRAMMAR:
        if match := pattern.fullmatch(text):
            args = {key: _value(item) if key not in ("text", "key") else item
                    for key, item in zip(keys, match.groups(), strict=True)}  # fmt: skip
            return step | {"action_name": name, "action_args": args}
    if match := _MIND2WEB.fullmatch(text):
        step |= {"action_name": match[2].lower(), "action_args": {"text": match[3]} if match[3] else {}}
        step["target"] = {"text": match[1]}
    return step


def _value(text: str) -> str | float:
    return float(text) if re.fullmatch(_NUMBER, text) and len(text) < 20 else text


def _pictures(folder: Path) -> dict[int, dict[str, Any]]:
    if not folder.is_dir():
        return {}
    named = {int(match[1]): file for file in folder.iterdir() if (match := _PICTURES.fullmatch(file.name))}
    return {number: _media.of_file(named[number]) for number in sorted(named)}


def _see(steps: list[dict[str, Any]], pictures: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """Gives each step the picture of the page before it; returns the one after the last step."""
    if not pictures:
        return None
    if 0 in pictures:
        for i, step in enumerate(steps):
            step["screenshot"] = pictures.get(i) or _media.missing()
        return pictures.get(len(steps))
    after = [pictures.get(i + 1) or _media.missing() for i in range(len(steps))]
    for i in range(1, len(steps)):
        seen = i - 1
        while seen >= 0 and _one_call(steps, after, seen, i):
            seen -= 1
        if seen >= 0:
            steps[i]["screenshot"] = after[seen]
    return after[-1]


def _one_call(steps: list[dict[str, Any]], after: list[dict[str, Any]], one: int, two: int) -> bool:
    thought, sha256 = steps[one].get("thought"), after[one]["sha256"]
    if thought is None or sha256 is None:
        return False
    return thought == steps[two].get("thought") and sha256 == after[two]["sha256"]
