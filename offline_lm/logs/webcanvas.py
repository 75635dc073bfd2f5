"""WebCanvas results (Pan et al. 2024, Mind2Web-Live): ``GROUP/out.json``, a list with one object for each task.

``{task_id, task_name, task_status, step_list[]}``, a step ``{action, selector, url, trace_description {thought,
action}, task_score "k / n", task_score_rate, current_reward_score_description, match_result}``.

- No page is logged. ``url`` is the page *after* the action, so a step saw the url of the step before: that line is
  its observation (empty at the first step), with the flag ``no_observations``. It is the last url known, not a
  certain one: pages redirect, and the harness may go back after an action that its judge disliked.
- ``action`` is ``click[10]``, ``fill_search[2,text]``, ``goto[URL]``, ``google_search[words]``, ``go_back[0]``. An
  output that could not be parsed is null, empty or "None": the step has the action "" and ``action_valid=False``.
- Progress is dense: ``task_score_rate``, how much of the task's key nodes was reached. WebCanvas takes it *before* it
  executes the step's action, on the page as it is and the selector about to be used. A gain while the url is another
  than at the last evaluation was therefore earned by the action before, as was any gain at a step without a selector;
  other gains are the step's own. Where ``match_result`` names what matched, that decides: url matches belong to the
  action before. Rewards (``progress_delta``) are the gains so placed, ``progress`` is their sum after the action, and
  what the log says stands in ``extra.task_score``.
- ``success`` is a final rate of 1 (status ``finished``), ``limit`` is a step limit, ``error`` is the harness giving up
  after four actions in a row that its judge disliked: both are truncated, the task had not ended.
- The judge's opinion of each step (``current_reward_score_description``) is no reward; it stays in ``extra``.
- Task numbers differ between groups for one task, so ``task_id`` is the task's words. A number that comes twice in
  one file is two runs: the second has ``trial`` 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, each, need, numbered, take
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad
from offline_lm.types import Episode, Rejected

SOURCE = "webcanvas"
SUFFIXES = ("out.json",)
_ENDS = {"finished": "env_done", "limit": "step_limit", "error": "agent_error"}
_ACTION = re.compile(r"(\w+)\[(.*)\]\Z", re.DOTALL)
_ARGS = {"goto": "url", "google_search": "query", "click": "id", "go_back": "id"}
_READ_KEYS = frozenset({"action", "url", "trace_description", "task_score_rate"})


def detect(sample: Sample) -> str | None:
    return "task_status and a step_list" if {"task_name", "task_status", "step_list"} <= sample.keys else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, dataset: str | None = None, model: str | None = None) -> Iterator[Episode | Rejected]:
    """Every task of an ``out.json``, or of those under a folder.

    `dataset` names the collection (default: the folder of the file, which is also ``policy_id``: the groups are
    configurations of the agent); `model` is the language model, which the files do not name.
    """
    return chain.from_iterable(_read_file(file, dataset, model) for file in find(path))


def _read_file(path: Path, dataset: str | None, model: str | None) -> Iterator[Episode | Rejected]:
    group = path.parent.name or None
    runs: Counter[int] = Counter()

    def episode(task: Any, record: Record) -> Episode:
        number = need(task, "task_id", int)
        made = _episode(task, number, runs[number])
        runs[number] += 1
        return Episode(
            source=SOURCE,
            dataset=dataset or group,
            policy_id=group,
            model=model,
            uri=str(path),
            sha256=record.sha256,
            **made,
        )

    return each(SOURCE, path, episode)


def _episode(task: Any, number: int, trial: int) -> dict[str, Any]:
    logged = need(task, "step_list", list)
    rates = [need(step, "task_score_rate", float, f"step_list[{i}]") for i, step in enumerate(logged)]
    for i, rate in enumerate(rates):
        if not 0 <= rate <= 1:
            raise Bad("out_of_range", f"step_list[{i}].task_score_rate is {rate}; it must lie between 0 and 1")
    steps = _steps(logged)
    for step, reward in zip(steps, _rewards(logged, rates), strict=True):
        step |= {"reward": reward, "reward_source": "progress_delta"}
    total = 0.0
    for step in steps:
        total += step["reward"]
        step["progress"] = round(total, 12)
    goal, status = need(task, "task_name", str), need(task, "task_status", str)
    if status not in _ENDS:
        raise Bad("bad_value", f"task_status is {status[:40]!r}; it must be one of: {', '.join(_ENDS)}")
    terminated, truncated = status == "finished", status != "finished"
    if steps:
        steps[-1] |= {"terminated": terminated, "truncated": truncated}
    extra: dict[str, Any] = {k: v for k, v in task.items() if k not in ("task_id", "task_name", "step_list")}
    made = {
        "native_id": f"{number}/{trial}" if trial else str(number),
        "steps": numbered(steps),
        "benchmark": "mind2web-live",
        "task_id": goal,
        "goal": goal,
        "trial": trial,
        "policy_kind": "llm",
        "agent": "webcanvas",
        "outcome_reward": rates[-1],
        "raw_reward": rates[-1],
        "success": rates[-1] == 1,
        "terminated": terminated,
        "truncated": truncated,
        "end_reason": _ENDS[status],
        "quality_flags": ("no_observations",),
        "extra": extra | {"task_number": number},
    }
    return made


def _steps(logged: list[Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    seen: str | None = None
    for i, entry in enumerate(logged):
        place = f"step_list[{i}]"
        after = take(entry, "url", str, place)
        trace = take(entry, "trace_description", dict, place) or {}
        step: dict[str, Any] = {
            "url": seen,
            "observation": f"url: {seen}" if seen else "",
            "observation_kind": "text",
            "thought": take(trace, "thought", str, f"{place}.trace_description"),
            "extra": {key: value for key, value in entry.items() if key not in _READ_KEYS}
            | {"url_after": after, "described": take(trace, "action", str, f"{place}.trace_description")},
        }
        steps.append(step | _action(entry, place))
        seen = after or seen
    return steps


def _action(entry: dict[str, Any], place: str) -> dict[str, Any]:
    text = take(entry, "action", str, place)
    if text in (None, "", "None"):
        return {"action": "", "action_valid": False, "action_grammar": "webcanvas"}
    fields: dict[str, Any] = {"action": text, "action_grammar": "webcanvas"}
    if command := _ACTION.match(text):
        name, inner = command.groups()
        args = {_ARGS.get(name, "argument"): inner}
        if name.startswith("fill") and "," in inner:
            args = dict(zip(("id", "text"), inner.split(",", 1), strict=True))
        fields |= {"action_name": name, "action_args": args}
        selector = take(entry, "selector", str, place)
        if selector and "id" in args:
            fields["target"] = {"ref": args["id"], "selector": selector}
    return fields


def _rewards(logged: list[Any], rates: list[float]) -> list[float]:
    """Gains of progress, each at the action that earned it (see the module)."""
    rewards = [0.0] * len(rates)
    for i, rate in enumerate(rates):
        before = rates[i - 1] if i else 0.0
        gain = rate - before
        if gain == 0:
            continue
        rewards[i - 1 if i and _earned_before(logged, i) else i] += gain
    return rewards


def _earned_before(logged: list[Any], i: int) -> bool:
    if not take(logged[i], "selector", str, f"step_list[{i}]"):
        return True
    new = _matched(logged[i]) - _matched(logged[i - 1])
    if new:  # of several new matches the url's are the more, and one gain is not split
        return any(name.startswith("url") for name, _ in new)
    url_now = logged[i - 1].get("url")
    url_then = logged[i - 2].get("url") if i > 1 else None
    return url_now != url_then


def _matched(entry: dict[str, Any]) -> set[tuple[str, str]]:
    """(function, reference) of every key node reached.

    The log writes them as a Python list; nothing is evaluated, pairs of quoted strings are picked out.
    """
    text = entry.get("match_result")
    if type(text) is not str:
        return set()
    return set(re.findall(r"\{'(\w+)': '([^']*)'\}", text[:10_000]))
