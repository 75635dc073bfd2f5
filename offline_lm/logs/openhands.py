"""Evaluation outputs of OpenHands (Wang et al. 2024): ``output.jsonl``, one run a line.

A line holds ``instance_id``, ``instruction``, ``history``, ``test_result``, ``metrics``, ``error`` and ``metadata``.
Three generations of ``history`` are read: pairs ``[action, observation]`` (2024), a list of events (``action`` with
``args``, or ``observation`` with ``content`` and ``extras``), and the events of the software agent SDK (``kind:
ActionEvent``, ``ObservationEvent``, ``MessageEvent``).

- A step is an action of the agent: a tool call, or a message to the user. Its observation is everything that came
  since the action before: answers, errors, what the user said. What follows the last action is the final observation.
  Bookkeeping (changed state, recall, condensation, system prompt) is left out.
- An error that answers an action makes it ``action_valid=False``; ``last_browser_action_error`` is its
  ``action_error``. A browser's ``url`` and screenshot belong to the step that sees them.
- The outcome is ``resolved``, ``reward``, ``result`` or ``score`` of ``test_result.report``, ``report`` or
  ``test_result``, or ``test_result`` itself where it is a number or true/false; the last action gets it. A
  ``git_patch`` alone is no outcome: the episode is unlabelled. ``success`` is a reward of 1.
- ``finish`` and ``reject`` are the agent's end. ``error`` tells of the limits (``maximum iteration``) and of failures.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import Sample, call_text, each, give_outcome, need, numbered, take
from offline_lm.logs._chat import content_text
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad
from offline_lm.types import Episode, Rejected

SOURCE = "openhands"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_ENDS = frozenset({"finish", "reject"})
_BOOKKEEPING = frozenset(
    {"null", "system", "recall", "change_agent_state", "agent_state_changed", "condensation", "condensation_request"}
)
_NOT_ARGUMENTS = frozenset({"thought", "hidden", "confirmation_state", "security_risk", "kind"})
_OUTCOMES = ("resolved", "reward", "result", "score")
_NOT_EXTRA = frozenset({"screenshot", "set_of_marks", "axtree_object", "dom_object", "extra_element_properties"})


def detect(sample: Sample) -> str | None:
    known = {"instance_id", "history", "test_result"} <= sample.keys
    return "runs with instance_id, history and test_result" if known else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every run of a file or folder.

    Raises UserError for a folder without such files.
    """
    return chain.from_iterable(_read_file(file) for file in find(path))


def _read_file(path: Path) -> Iterator[Episode | Rejected]:
    seen: dict[str, int] = {}

    def to_episode(value: Any, record: Record) -> Episode:
        instance = need(value, "instance_id", (str, int))
        seen[str(instance)] = attempt = seen.get(str(instance), 0) + 1
        return _episode(value, record, path, str(instance), attempt)

    return each(SOURCE, path, to_episode)


def _episode(value: Any, record: Record, path: Path, instance: str, attempt: int) -> Episode:
    history = need(value, "history", list)
    about = take(value, "metadata", dict) or {}
    if not history:
        raise Bad("outcome_only", "history is empty: the line is an outcome; join it to steps with labels=")
    instruction = take(value, "instruction", str)
    steps, said = _steps(_events(history), instruction)
    if not steps:
        raise Bad("no_steps", "history holds no action of the agent; leave the run out")
    outcome = _outcome(value)
    give_outcome(steps, outcome)
    error = take(value, "error", str)
    last = next(step for step in reversed(steps) if not step.get("is_final_observation"))
    end = _end(last["action_name"], error)
    last |= {"terminated": end["terminated"], "truncated": end["truncated"]}
    arguments = last["action_args"] or {}
    answer = arguments.get("message") or take(arguments, "outputs", dict, "outputs") or None
    metrics = take(value, "metrics", dict) or {}
    usage = take(metrics, "accumulated_token_usage", dict, "metrics") or {}
    config = take(about, "llm_config", dict, "metadata") or take(about, "llm", dict, "metadata") or {}
    times = [step["ts_start"] for step in steps if step.get("ts_start")]
    sampling = {key: take(config, key, float, "metadata.llm_config") for key in ("temperature", "top_p")}
    return Episode(
        source=SOURCE,
        native_id=instance if attempt == 1 else f"{instance}#{attempt}",
        dataset=path.parent.name or None,
        steps=numbered(steps),
        benchmark=take(about, "dataset", str, "metadata"),
        task_id=instance,
        goal=instruction or said,
        trial=attempt - 1 if attempt > 1 else None,
        policy_kind="llm",
        model=take(config, "model", str, "metadata.llm_config"),
        agent=take(about, "agent_class", str, "metadata") or "OpenHands",
        sampling=sampling if any(item is not None for item in sampling.values()) else None,
        outcome_reward=outcome,
        raw_reward=outcome,
        success=None if outcome is None else outcome == 1,
        **end,
        final_answer=answer if type(answer) is str else None,
        started_at=min(times) if times else None,
        duration_s=(max(times) - min(times)).total_seconds() if times else None,
        tokens_in=take(usage, "prompt_tokens", int, "metrics.accumulated_token_usage"),
        tokens_out=take(usage, "completion_tokens", int, "metrics.accumulated_token_usage"),
        cost_usd=take(metrics, "accumulated_cost", float, "metrics"),
        uri=str(path),
        sha256=record.sha256,
        quality_flags=() if outcome is not None else ("unlabelled",),
        extra={
            "test_result": value.get("test_result"),
            "error": error,
            "max_iterations": about.get("max_iterations"),
            "git_commit": about.get("git_commit"),
        },
    )


# --- three generations of events, as one -------------------------------------------------------------------


def _events(history: list[Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(event of the second generation, its place)."""
    for i, item in enumerate(history):
        here = f"history[{i}]"
        if type(item) is list:  # a pair; an action that was not answered has null or an empty observation
            for k, event in enumerate(item):
                if event is not None:
                    yield event, f"{here}[{k}]"
        elif type(item) is dict and "kind" in item:
            if (event := _of_sdk(item, here)) is not None:
                yield event, here
        else:
            yield item, here


def _of_sdk(item: dict[str, Any], here: str) -> dict[str, Any] | None:
    kind = take(item, "kind", str, here)
    event = {"source": item.get("source"), "timestamp": item.get("timestamp")}
    if kind == "ActionEvent":
        call = take(item, "tool_call", dict, here)
        thought, _ = content_text(item.get("thought"), f"{here}.thought")
        thought = take(item, "reasoning_content", str, here) or thought
        args = take(item, "action", dict, here) or {}  # null where the call could not be parsed
        name = take(item, "tool_name", str, here) or take(args, "kind", str, here) or "action"
        return event | {"action": name, "args": args, "thought": thought, "source": "agent", "tool_call": call}
    if kind == "ObservationEvent":
        answer = need(item, "observation", dict, here)
        shown = answer.get("content") if answer.get("content") is not None else answer.get("output")
        return event | {"observation": take(item, "tool_name", str, here) or "tool", "content": shown, "extras": {}}
    if kind == "MessageEvent":
        text, _ = content_text(need(item, "llm_message", dict, here).get("content"), f"{here}.llm_message.content")
        return event | {"action": "message", "args": {"content": text}}
    if kind in ("AgentErrorEvent", "UserRejectObservation", "ConversationErrorEvent"):
        told = take(item, "error", str, here) or take(item, "rejection_reason", str, here)
        return event | {"observation": "error", "content": told or take(item, "detail", str, here) or "", "extras": {}}
    return None  # bookkeeping


# --- from events to steps ----------------------------------------------------------------------------------


def _steps(events: Iterator[tuple[dict[str, Any], str]], instruction: str | None) -> tuple[list[dict[str, Any]], str]:
    """(steps with a final observation, what the user said before the first)."""
    steps: list[dict[str, Any]] = []
    seen: dict[str, Any] = {"texts": []}
    said = ""
    for event, here in events:
        kind = take(event, "action", str, here)
        if kind is not None and kind not in _BOOKKEEPING:
            source = take(event, "source", str, here)
            if source == "user" or (kind == "message" and source == "environment"):
                seen["texts"].append(_said(event, here))
                continue
            if not steps:
                said = "\n\n".join(seen["texts"])
                if instruction and instruction.strip() not in said:
                    seen["texts"].insert(0, instruction)
            steps.append(_seen(seen) | _action(event, kind, here))
            seen = {"texts": []}
        elif kind is None and take(event, "observation", str, here) not in {None, *_BOOKKEEPING}:
            _answer(event, here, seen, steps)
    if steps and (seen["texts"] or "screenshot" in seen):
        steps.append(_seen(seen) | {"is_final_observation": True})
    return steps, said


def _said(event: dict[str, Any], here: str) -> str:
    args = take(event, "args", dict, here) or {}
    return take(args, "content", str, here) or take(event, "message", str, here) or ""


def _seen(seen: dict[str, Any]) -> dict[str, Any]:
    step = {"observation": "\n\n".join(seen["texts"]), "observation_kind": "text"}
    return step | {key: seen[key] for key in ("url", "screenshot") if key in seen}


def _action(event: dict[str, Any], kind: str, here: str) -> dict[str, Any]:
    args = take(event, "args", dict, here) or {}
    given = {key: item for key, item in args.items() if key not in _NOT_ARGUMENTS}
    call = take(event, "tool_call_metadata", dict, here) or {}
    thought = take(event, "thought", str, here) or take(args, "thought", str, here)
    raw = event.get("tool_call") or call.get("model_response")
    return {
        "ts_start": _time(event.get("timestamp")),
        "thought": thought or None,
        "action": call_text(kind, given),
        "action_name": kind,
        "action_args": given,
        "action_grammar": "openhands",
        "response": _response(call, here),
        "extra": {"tool_call": raw} if raw is not None else None,
    }


def _response(call: dict[str, Any], here: str) -> str | None:
    """The text of the model's message, where the log keeps the message (its tool calls stand in ``extra``)."""
    answer = take(call, "model_response", dict, here) or {}
    choices = take(answer, "choices", list, here) or []
    message = take(choices[0], "message", dict, here) if choices else None
    return content_text(message.get("content"), here)[0] or None if message else None


def _answer(event: dict[str, Any], here: str, seen: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    text, pictures = content_text(event.get("content"), f"{here}.content")
    extras = take(event, "extras", dict, here) or {}
    if text:
        seen["texts"].append(text)
    if type(url := extras.get("url")) is str and url:
        seen["url"] = url
    if type(shot := extras.get("screenshot")) is str and shot:
        pictures.append(_media.of_base64(shot))
    if pictures:
        seen["screenshot"] = pictures[-1]
    if not steps:
        return
    last = steps[-1]
    failed = extras.get("last_browser_action_error")
    if event["observation"] == "error":
        last |= {"action_valid": False, "action_error": text[:2000] or None}
    elif type(failed) is str and failed:
        last["action_error"] = failed[:2000]
    kept = {key: item for key, item in extras.items() if key not in _NOT_EXTRA and len(str(item)) < 1000}
    if kept:
        last["extra"] = (last["extra"] or {}) | {"answer": kept}


# --- outcome and end ---------------------------------------------------------------------------------------


def _outcome(value: dict[str, Any]) -> float | None:
    result = value.get("test_result")
    if type(result) in (bool, int, float):
        return float(take(value, "test_result", (bool, int, float)))
    whole = result if type(result) is dict else {}
    holders = [h for h in (whole.get("report"), value.get("report"), whole) if isinstance(h, dict)]
    for holder in holders:
        for name in _OUTCOMES:
            if type(holder.get(name)) in (bool, int, float):
                return float(take(holder, name, (bool, int, float)))
    return None


def _end(action: str, error: str | None) -> dict[str, Any]:
    told = (error or "").lower()
    if "iteration" in told or "budget" in told:
        return {"terminated": False, "truncated": True, "end_reason": "step_limit"}
    if "timeout" in told or "timed out" in told:
        return {"terminated": False, "truncated": True, "end_reason": "time_limit"}
    if told:
        return {"terminated": None, "truncated": None, "end_reason": "agent_error"}
    if action in _ENDS:
        return {"terminated": True, "truncated": False, "end_reason": "agent_stop"}
    return {"terminated": None, "truncated": None, "end_reason": "unknown"}


def _time(value: Any) -> datetime | None:
    """Events carry local times without a zone; they are taken as UTC."""
    if type(value) is not str:
        return None
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
