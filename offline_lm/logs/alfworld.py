"""ALFWorld episodes as OpenManus-RL and verl-agent save them: one JSON file each, ``metadata`` and ``trajectory``.

A step holds the prompt, the admissible actions, the raw response, the action that was parsed from it, and the reward
and ``done`` that followed; ``metadata.info`` is what the environment said besides.

- The observation is the prompt as the model saw it, the admissible actions inside. ``info.observation_text`` is the
  environment's answer; that of the last step is the final observation.
- The admissible actions are ``candidates`` (``source=enumerated``), all of them. ``help`` is one, though the prompt
  leaves it out.
- ``action_valid`` says whether the action is admissible. The logged ``is_action_valid`` is 0 for every step, those
  that the environment carried out too: it stands in ``extra``.
- The prompt of a later step quotes the actions taken. Where it quotes another action than the step logged, the
  parser had cut it (``take hand|towel 1 ..``) and the environment never got the logged one: ``action_valid=False``, no
  candidate is marked as executed, the text that was sent is in ``extra.sent`` (flag ``action_not_sent``).
- Rewards are the environment's, 10 for a task done: they stand as logged, ``outcome_reward`` is their sum
  (``extra.reward_scale``). ``success`` is ``trajectory.success``.
- The episode is terminated if its last ``done`` is true and the task was won or steps were left; it is truncated
  (``step_limit``) if it has ``config.max_steps`` steps and was not won.
- The same task is saved again by later runs; the file name, with its time, tells them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, each, need, numbered, take
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad
from offline_lm.types import Candidate, Episode, Rejected

SOURCE = "alfworld"
SUFFIXES = (".json", ".json.gz", ".jsonl")
REWARD_SCALE = 10.0
_TASK = re.compile(r"Your task is to: ([^\n]+?)\.?\s*(?:\n|\Z)")
_QUOTED = re.compile(r"Action (\d{1,6}): '([^'\n]*)'\]")
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def detect(sample: Sample) -> str | None:
    value = sample.value if {"metadata", "trajectory"} <= sample.keys else {}
    about, run = value.get("metadata"), value.get("trajectory")
    if isinstance(about, dict) and isinstance(run, dict) and about.get("environment") == "alfworld" and "steps" in run:
        return "metadata of ALFWorld and a trajectory with steps"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every episode of a file or folder.

    Raises UserError for a folder without such files.
    """
    return chain.from_iterable(_read_file(file) for file in find(path))


def _read_file(path: Path) -> Iterator[Episode | Rejected]:
    return each(SOURCE, path, lambda value, record: _episode(value, record, path))


def _episode(value: Any, record: Record, path: Path) -> Episode:
    run, about = need(value, "trajectory", dict), take(value, "metadata", dict) or {}
    config = take(about, "config", dict, "metadata") or {}
    given = need(run, "steps", list, "trajectory")
    steps = [_step(item, f"steps[{i}]") for i, item in enumerate(given)]
    if not steps:
        raise Bad("no_steps", "trajectory.steps is empty; leave the file out")
    flags = ["action_not_sent"] if _mark_cut_actions(steps) else []
    rewards = [step.get("reward") for step in steps]
    outcome = take(run, "total_reward", float, "trajectory")
    known = [reward for reward in rewards if reward is not None]
    if len(known) == len(rewards):
        outcome = sum(known)
        if not math.isfinite(outcome):
            raise Bad("json_number", "the sum of the rewards is not finite; log rewards of a reasonable size")
    else:
        flags.append("missing_rewards" if known else "unlabelled")
    success = take(run, "success", bool, "trajectory")
    end = _end(steps, success, take(config, "max_steps", int, "metadata.config"))
    steps[-1] |= {"terminated": end["terminated"], "truncated": end["truncated"]}
    last = steps[-1].pop("answer")
    for step in steps[:-1]:
        step.pop("answer")
    if last is not None:
        steps.append({"observation": last, "observation_kind": "text", "is_final_observation": True})
    name = path.name.split(".")[0]
    task = _task_id(given[0], run)
    return Episode(
        source=SOURCE,
        native_id=name if record.offset == 0 else f"{name}:{record.offset}",
        dataset=path.parent.name or None,
        steps=numbered(steps),
        benchmark="alfworld",
        task_id=f"alfworld/{task}" if task else None,
        task_family=task.split("-")[0] if task else None,
        site="alfworld",
        goal=_goal(need(given[0], "state", dict, "steps[0]").get("observation")),
        seed=take(config, "seed", int, "metadata.config"),
        policy_kind="llm",
        outcome_reward=outcome,
        raw_reward=take(run, "total_reward", float, "trajectory"),
        success=success,
        uri=str(path),
        sha256=record.sha256,
        quality_flags=tuple(flags),
        extra={
            "config": config,
            "timestamp": about.get("timestamp"),
            "task_idx": run.get("task_idx"),
            "reward_scale": REWARD_SCALE,
        },
        **end,
    )


def _step(item: Any, place: str) -> dict[str, Any]:
    state, output = need(item, "state", dict, place), need(item, "agent_output", dict, place)
    after = take(item, "transition", dict, place) or {}
    info = take(take(item, "metadata", dict, place) or {}, "info", dict, f"{place}.metadata") or {}
    action = take(output, "action", str, f"{place}.agent_output")
    response = take(output, "raw_response", str, f"{place}.agent_output")
    if action is None and response is None:
        raise Bad("missing_key", f"{place}.agent_output has neither action nor raw_response; log what the agent did")
    reward = take(after, "reward", float, f"{place}.transition")
    thought = _THOUGHT.search(response or "")
    step: dict[str, Any] = {
        "observation": need(state, "observation", str, f"{place}.state"),
        "observation_kind": "text",
        "response": response,
        "thought": thought[1].strip() if thought else None,
        "action": action,
        "action_grammar": "alfworld",
        "action_name": action.split()[0] if action and action.split() else None,
        "reward": reward,
        "reward_source": None if reward is None else "env",
        "extra": {"step": item.get("step"), "is_action_valid": info.get("is_action_valid"), "won": info.get("won")},
        "done": take(after, "done", bool, f"{place}.transition"),
        "answer": take(info, "observation_text", str, f"{place}.metadata.info"),
    }
    admissible = take(state, "admissible_actions", list, f"{place}.state")
    if admissible is not None:
        if any(type(other) is not str for other in admissible):
            raise Bad("wrong_type", f"{place}.state.admissible_actions must be a list of strings")
        step["candidates"] = tuple(
            Candidate(action=other, source="enumerated", executed=other == action) for other in admissible
        )
        step["candidates_complete"] = True
        step["action_valid"] = action in admissible
    if action is None:
        step["action_valid"] = False
    return step


def _mark_cut_actions(steps: list[dict[str, Any]]) -> bool:
    """Marks the steps whose action a later prompt quotes otherwise. Steps count from 1 there."""
    found = False
    for i, later in enumerate(steps):
        for number, sent in _QUOTED.findall(later["observation"]):
            k = int(number) - 1
            if not 0 <= k < i or steps[k]["action"] in (None, sent) or "sent" in steps[k]["extra"]:
                continue
            found = True
            steps[k]["extra"]["sent"] = sent
            steps[k] |= {"action_valid": False, "action_error": f"the environment was sent {sent!r}"}
            if "candidates" in steps[k]:
                steps[k]["candidates"] = tuple(
                    Candidate(action=c.action, source=c.source, executed=c.action == sent)
                    for c in steps[k]["candidates"]
                )
    return found


def _end(steps: list[dict[str, Any]], success: bool | None, max_steps: int | None) -> dict[str, Any]:
    done = [step.pop("done") for step in steps]
    if any(done[:-1]):
        raise Bad("steps_after_end", f"steps[{done.index(True)}] is done, yet steps follow; split the file")
    at_limit = max_steps is not None and len(steps) >= max_steps
    if success or (done[-1] and not at_limit):
        return {"terminated": True, "truncated": False, "end_reason": "env_done"}
    if at_limit:
        return {"terminated": False, "truncated": True, "end_reason": "step_limit"}
    return {"terminated": None, "truncated": None, "end_reason": "unknown"}


def _goal(prompt: Any) -> str | None:
    found = _TASK.search(prompt) if type(prompt) is str else None
    return found[1] if found else None


def _task_id(first: Any, run: dict[str, Any]) -> str | None:
    """The game's folder, ``TYPE-OBJECT-..-SCENE/TRIAL``; without a game file the id that the run gave, if any."""
    info = take(take(first, "metadata", dict) or {}, "info", dict) or {}
    parts = (take(info, "extra.gamefile", str) or "").split("/")
    return "/".join(parts[-3:-1]) if len(parts) > 2 else take(run, "alfworld_task_id", str)
