"""Trajectories of SWE-agent (Yang et al. 2024): ``.traj`` files, one JSON object each.

Versions 0.x and 1.x are read: a turn has ``action``, ``observation``, ``response``, ``thought``, ``state`` (JSON as
text, later an object) and, later, ``execution_time``, ``query`` and ``extra_info``.

- A turn's ``observation`` answers its action. So a step sees the answer of the turn before, and the first step what
  stands in ``history`` (later ``query``) before the first response of the agent, demonstrations left out. The last
  answer, if there is one, is the final observation.
- ``info.exit_status`` is the end: ``submitted`` is the agent's (``agent_stop``); ``exit_cost``, ``exit_context`` and
  the like are limits (truncated), with ``submitted (exit_cost)`` where the harness then submitted what there was;
  errors and unknown words leave both null.
- Whether the submission is right is not logged: the episodes are unlabelled, their rewards null (``labels=`` joins the
  benchmark's report). ``info.submission`` is the ``final_answer``.
- Costs and tokens of 0 mean that nobody counted (demonstrations are replayed without a model): they stay null.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, each, need, numbered, take
from offline_lm.logs._chat import ASSISTANT, content_text
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected

SOURCE = "swe_agent"
SUFFIXES = (".traj", ".traj.gz")
_TURN = frozenset({"action", "observation", "response", "thought", "state"})
_LIMITS = {
    "exit_cost": "step_limit",
    "exit_context": "step_limit",
    "exit_total_execution_time": "time_limit",
    "exit_command_timeout": "time_limit",
}
_ERRORS = {
    "exit_format": "agent_error",
    "exit_error": "agent_error",
    "exit_api": "agent_error",
    "exit_environment_error": "env_error",
}
_STOPS = frozenset({"submitted", "exit_forfeit", "skipped"})


def detect(sample: Sample) -> str | None:
    turns = sample.value.get("trajectory") if "trajectory" in sample.keys else None
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and {"action", "observation", "response", "state"} <= first.keys():
        return "a trajectory of turns with response and state"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every trajectory of a file or folder.

    Raises UserError for a folder without such files.
    """
    return chain.from_iterable(_read_file(file) for file in find(path))


def _read_file(path: Path) -> Iterator[Episode | Rejected]:
    return each(SOURCE, path, lambda value, record: _episode(value, record, path))


def _episode(value: Any, record: Record, path: Path) -> Episode:
    turns = need(value, "trajectory", list)
    history = take(value, "history", list) or []
    info = take(value, "info", dict) or {}
    if not turns:
        raise Bad("no_steps", "trajectory is empty; leave the file out")
    first = take(turns[0], "query", list, "trajectory[0]")
    prompt, system, shots = _prompt(history if first is None else first, "history" if first is None else "query")
    steps: list[dict[str, Any]] = []
    seen = prompt
    for i, turn in enumerate(turns):
        step, answer = _step(turn, f"trajectory[{i}]")
        steps.append(step | {"observation": seen, "observation_kind": "text"})
        seen = answer
    if shots:
        steps[0]["screenshot"] = shots[-1]
    end = _end(take(info, "exit_status", str, "info"))
    steps[-1] |= {"terminated": end["terminated"], "truncated": end["truncated"]}
    if seen.strip():
        steps.append({"observation": seen, "observation_kind": "text", "is_final_observation": True})
    stats = take(info, "model_stats", dict, "info") or {}
    cost = take(stats, "instance_cost", float, "info.model_stats")
    name = path.name.removesuffix(".gz").removesuffix(".traj")
    folder = path.parent if path.parent.name != name else path.parent.parent
    known = {"submission", "model_stats", "exit_status"}
    return Episode(
        source=SOURCE,
        native_id=name if record.offset == 0 else f"{name}:{record.offset}",
        dataset=folder.name or None,
        steps=numbered(steps),
        task_id=name,
        goal=prompt or None,
        policy_kind="llm",
        agent="SWE-agent",
        model=_model(value),
        end_reason=end["end_reason"],
        terminated=end["terminated"],
        truncated=end["truncated"],
        final_answer=take(info, "submission", str, "info"),
        tokens_in=take(stats, "tokens_sent", int, "info.model_stats") or None,
        tokens_out=take(stats, "tokens_received", int, "info.model_stats") or None,
        cost_usd=cost or None,
        uri=str(path),
        sha256=record.sha256,
        quality_flags=("unlabelled",) if prompt else ("unlabelled", "no_prompt"),
        extra={
            "environment": value.get("environment"),
            "exit_status": info.get("exit_status"),
            "system": system,
            "info": {key: item for key, item in info.items() if key not in known},
        },
    )


def _prompt(messages: list[Any], place: str) -> tuple[str, str | None, list[dict[str, Any]]]:
    """(what the user said, what the system said, pictures) before the agent's first response."""
    user: list[str] = []
    system: list[str] = []
    shots: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        here = f"{place}[{i}]"
        role = need(message, "role", str, here)
        if take(message, "is_demo", bool, here):
            continue
        if role in ASSISTANT:
            break
        text, pictures = content_text(message.get("content"), f"{here}.content")
        shots += pictures
        (system if role == "system" else user).append(text)
    return "\n\n".join(user), "\n\n".join(system) or None, shots


def _step(turn: Any, place: str) -> tuple[dict[str, Any], str]:
    """(fields of a step without what it saw, the answer to its action)."""
    action = (take(turn, "action", str, place) or "").rstrip("\n")
    response = take(turn, "response", str, place)
    thought = take(turn, "thought", str, place)
    state = turn.get("state")
    if type(state) is str:
        with suppress(Bad):  # a command of the tools prints it; what is no JSON stays the text it is
            state = parse(state.encode())
    extra = {key: item for key, item in turn.items() if key not in _TURN and key not in ("query", "messages")}
    extra["state"] = state  # after the action
    step: dict[str, Any] = {
        "response": response,
        "thought": (thought or "").strip() or None,
        "action": action,
        "action_grammar": "swe-agent",
        "action_name": action.split()[0] if action.split() else None,
        "extra": extra,
    }
    if not action:
        step["action_valid"] = False  # a response without a command: the agent was asked again, or gave up
    return step, take(turn, "observation", str, place) or ""


def _end(status: str | None) -> dict[str, Any]:
    word = (status or "").strip()
    if word.startswith("submitted (") and word.endswith(")"):
        word = word[len("submitted (") : -1]
    if word in _STOPS:
        return {"terminated": True, "truncated": False, "end_reason": "agent_stop"}
    if word in _LIMITS:
        return {"terminated": False, "truncated": True, "end_reason": _LIMITS[word]}
    return {"terminated": None, "truncated": None, "end_reason": _ERRORS.get(word, "unknown")}


def _model(value: Any) -> str | None:
    """The model's name in the run's own settings (1.x keeps them as JSON in text)."""
    settings = value.get("replay_config")
    if type(settings) is str:
        with suppress(Bad):  # settings are a comment on the run, not a part of it
            settings = parse(settings.encode())
    for key in ("agent", "model", "name"):
        settings = settings.get(key) if type(settings) is dict else None
    return settings if type(settings) is str else None
