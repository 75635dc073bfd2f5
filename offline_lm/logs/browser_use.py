"""browser-use runs, in the three ways that its versions write them.

- A history, from ``AgentHistoryList.save_to_file``: ``{"history": [{model_output, result[], state, metadata,
  state_message}]}``, one episode a file. In files of 2024 ``action`` and ``result`` are single objects, the screenshot
  is inline base64, the page is a list of ``items``, and a key is misspelt (``valuation_previous_goal``). Later ones
  keep the page only in ``state_message``, the prompt of the step; where that is not logged either, the observation is
  url, title and tabs, with the flag ``no_observations``.
- Conversations, from ``save_conversation_path``: a folder of ``conversation_N.txt`` or ``conversation_AGENT_N.txt``,
  one file a step and one episode an agent. Each file is the prompt and the reply, divided by ``Model output:``,
  ``RESPONSE`` or, today, nothing. ``current_state_N.html`` after the last of them is the final observation.
- Message lists of version 0.13: a folder with ``meta.json`` (task, status) and ``step_NNN/messages.json``. Where these
  hold prompts without replies no action is known, and the folder is Rejected (``no_actions``).

The model's output ``{memory, next_goal, ..., action: [{name: {params}}]}`` becomes commands: ``click(index=3)``.
Several of them are one step with ``sub_actions``. A history keeps the output parsed, so ``response`` is it as JSON; a
step whose model call failed (``model_output`` null) has the action "" and ``action_valid=False``. Errors in ``result``
are ``action_error``; what results say stands in ``extra``, without their images. Values that the writer replaced
(``<secret>name</secret>``) stay replaced.

No reward and no label is logged: ``done`` ends the run (``agent_stop``), its ``success`` is the agent's own report, and
``judgement`` is a judge's label. A run without ``done`` was stopped by a limit if its last prompt or its meta.json says
so, else the reason is unknown. ``screenshot_path`` names a file on the writer's machine: the picture is looked for
beside the log, by its name, and nowhere else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.errors import UserError
from offline_lm.logs._adapters import Sample, contents, each, need, numbered, rejected, take, to_json
from offline_lm.logs._browser_use import SOURCE, done, end, goal_of, history_item, place_of, reply
from offline_lm.logs._chat import ASSISTANT, content_text
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Label, Rejected

_CONVERSATION = re.compile(r"conversation_(?:(.+)_)?(\d{1,9})\.txt")
_STEP = re.compile(r"step_(\d{1,9})")
_ROLES = re.compile(r"^(system|user|assistant): ", re.MULTILINE)
_ROLE_LINES = re.compile(r"^ ((?:System|Human|AI|Tool)Message|system|user|assistant) $", re.MULTILINE)
_META = ("source", "id", "site", "start_url", "question", "answer", "agent_self_reported_success")
_BUDGET = re.compile(r"<step_info>\s*Step\s*(\d{1,9}) maximum:(\d{1,9})")
_ENDS: dict[Any, tuple[bool | None, bool | None, str]] = {
    "timeout": (False, True, "time_limit"),
    "max_steps": (False, True, "step_limit"),
    "error": (None, None, "agent_error"),
}


def detect(sample: Sample) -> str | None:
    if any(map(_CONVERSATION.fullmatch, sample.names)):
        return "a folder of conversation_N.txt"
    if _is_steps(sample.names):
        return "meta.json and step_NNN folders of messages"
    history = sample.value.get("history") if sample.keys else None
    first = history[0] if isinstance(history, list) and history else None
    if isinstance(first, dict) and {"model_output", "result", "state"} <= first.keys():
        return "a history of model_output, result and state"
    return None


def _is_steps(names: frozenset[str]) -> bool:
    return bool({"meta.json", "tool_schema.json"} & names) and any(map(_STEP.fullmatch, names))


def find(path: Path) -> Iterator[Path]:
    """Files of histories, folders of conversations and of message lists."""
    nothing = True
    for part in _parts(path):
        nothing = False
        yield part
    if nothing:
        raise UserError(f"{path} holds no history, conversation or message list of browser-use; name another path")


def _parts(path: Path) -> Iterator[Path]:
    if not path.is_dir() or _folder_reader(path) is not None:
        yield path
        return
    for entry in sorted(path.iterdir(), key=lambda p: p.name):
        if entry.name.startswith(".") or (entry.is_dir() and entry.is_symlink()):
            continue
        if entry.is_dir() or entry.name.endswith((".json", ".json.gz")):
            yield from _parts(entry)


def _folder_reader(path: Path) -> Callable[..., Iterator[Episode | Rejected]] | None:
    names = frozenset(entry.name for entry in path.iterdir())
    if any(map(_CONVERSATION.fullmatch, names)):
        return _conversations
    return _message_lists if _is_steps(names) else None


def read(
    path: Path, *, dataset: str | None = None, model: str | None = None, goal: str | None = None
) -> Iterator[Episode | Rejected]:
    """Everything at or below `path`.

    `dataset` is the folder above the log unless given; `model` is not logged; `goal` is for histories, which hold the
    task only where they hold prompts.

    Raises:
        UserError: a path without any log of browser-use.
    """
    given = {key: item for key, item in (("dataset", dataset), ("model", model), ("goal", goal)) if item is not None}
    return chain.from_iterable(_read_part(part, given) for part in find(path))


def _read_part(path: Path, given: dict[str, Any]) -> Iterator[Episode | Rejected]:
    if not path.is_dir():
        yield from each(SOURCE, path, partial(_history, path=path, given=given))
    elif reader := _folder_reader(path):
        yield from reader(path, given)


def _episode(path: Path, steps: list[dict[str, Any]], given: dict[str, Any], **fields: Any) -> Episode:
    acting = [step for step in steps if not step.get("is_final_observation")]
    ends = {key: fields[key] for key in ("terminated", "truncated")}
    if acting:
        acting[-1] |= ends
    known = {"policy_kind": "llm", "agent": SOURCE, "dataset": path.parent.name or None, "uri": str(path)}
    known |= {key: item for key, item in fields.items() if item is not None}
    return Episode(source=SOURCE, steps=numbered(steps), **(known | given))


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Bad("invalid_utf8", f"{path.name}: byte {error.start} is not UTF-8; re-encode the file") from None


# --- histories ----------------------------------------------------------------------------------------------


def _history(value: Any, record: Record, path: Path, given: dict[str, Any]) -> Episode:
    items = need(value, "history", list)
    made = [history_item(item, f"history[{i}]", path) for i, item in enumerate(items)]
    if not made:
        raise Bad("no_steps", "history is empty; leave the file out")
    steps = [step for step, _ in made]
    prompts = [item["state_message"] for item in items if item.get("state_message")]
    flags = ["unlabelled"]
    if any([step.pop("unseen") for step in steps]):
        flags.append("no_observations")
    name = f"{path.parent.name}/{path.name.removesuffix('.gz').removesuffix('.json')}"
    start, end = steps[0].get("ts_start"), steps[-1].get("ts_end")
    tokens = [take(item.get("metadata") or {}, "input_tokens", int) for item in items]
    return _episode(
        path,
        steps,
        given,
        native_id=f"{name}/{record.offset}" if record.offset else name,
        goal=goal_of(prompts[0]) if prompts else None,
        **_history_end(made[-1][1], prompts, items[-1]),
        started_at=start,
        duration_s=(end - start).total_seconds() if start and end else None,
        tokens_in=sum(tokens) if None not in tokens else None,
        sha256=record.sha256,
        quality_flags=tuple(flags),
        extra={key: item for key, item in value.items() if key != "history"},
    )


def _history_end(results: list[dict[str, Any]], prompts: list[str], item: dict[str, Any]) -> dict[str, Any]:
    last = results[-1] if results else {}
    if take(last, "is_done", bool, "result"):
        return {
            **end(True, False, "agent_stop"),
            "final_answer": take(last, "extracted_content", str, "result"),
            "self_reported_success": take(last, "success", bool, "result"),
            "labels": _labels(take(last, "judgement", dict, "result")),
        }
    budget = _BUDGET.search(prompts[-1]) if prompts else None
    if budget and int(budget[1]) >= int(budget[2]):
        return end(False, True, "step_limit")
    return end(None, None, "agent_error" if not item.get("model_output") else "unknown")


def _labels(judgement: dict[str, Any] | None) -> tuple[Label, ...]:
    if judgement is None:
        return ()
    place = "result.judgement"
    verdict = take(judgement, "verdict", bool, place)
    reason = take(judgement, "failure_reason", str, place) or take(judgement, "reasoning", str, place)
    return (Label(kind="judge", name="verdict", value=None if verdict is None else float(verdict), reason=reason),)


# --- folders of prompts and replies -------------------------------------------------------------------------


def _conversations(folder: Path, given: dict[str, Any]) -> Iterator[Episode | Rejected]:
    agents: dict[str, dict[int, Path]] = {}
    for file in sorted(folder.iterdir(), key=lambda p: p.name):
        if match := _CONVERSATION.fullmatch(file.name):
            agents.setdefault(match[1] or "", {})[int(match[2])] = file
        elif file.name.endswith((".json", ".json.gz")):
            yield from _read_part(file, given)
    for agent, files in agents.items():
        try:
            yield _conversation(folder, agent, files, given)
        except Bad as bad:
            yield rejected(SOURCE, folder, bad)


def _conversation(folder: Path, agent: str, files: dict[int, Path], given: dict[str, Any]) -> Episode:
    turns, digest = [], hashlib.sha256()
    for number in sorted(files):
        data = contents(files[number])
        digest.update(data)
        turns.append(_turn(_text(data, files[number])))
    after = folder / f"current_state_{max(files) + 1}.html"
    final = None
    if not agent and after.is_file():
        data = contents(after)
        digest.update(data)
        final = {"observation": _text(data, after), "observation_kind": "html"}
    return _run(
        folder,
        sorted(files),
        turns,
        given,
        final=final,
        native_id=f"{folder.name}/{agent}" if agent else folder.name,
        sha256=digest.hexdigest(),
    )


def _turn(text: str) -> tuple[dict[str, Any], str | None, str | None]:
    """(what the agent saw, its reply, the task) of one conversation file."""
    for mark in ("\n\nModel output:\n", "\n RESPONSE\n", "\n{\n"):
        prompt, found, answer = text.rpartition(mark)
        if found and (mark != "\n{\n" or text.startswith(" ")):
            answer = mark[1:] + answer if mark == "\n{\n" else answer
            break
    else:
        prompt, answer = text, ""
    roles = list((_ROLE_LINES if prompt.startswith(" ") else _ROLES).finditer(prompt))
    ends = [match.start() for match in roles[1:]] + [len(prompt)]
    said = [
        prompt[match.end() : end].strip()
        for match, end in zip(roles, ends, strict=False)
        if match[1].lower() in ("user", "humanmessage")
    ] or [prompt.strip()]
    task = next((found for text in said if (found := goal_of(text))), None)
    seen = {"observation": said[-1], "observation_kind": "text"} | place_of(said[-1])
    return seen, answer.strip() or None, task


def _message_lists(folder: Path, given: dict[str, Any]) -> Iterator[Episode | Rejected]:
    try:
        yield _message_list(folder, given)
    except Bad as bad:
        yield rejected(SOURCE, folder, bad)


def _message_list(folder: Path, given: dict[str, Any]) -> Episode:
    numbers = {
        int(match[1]): entry / "messages.json"
        for entry in folder.iterdir()
        if (match := _STEP.fullmatch(entry.name)) and (entry / "messages.json").is_file()
    }
    digest, turns = hashlib.sha256(), []
    meta: dict[str, Any] = {}
    told = [folder / "meta.json"] if (folder / "meta.json").is_file() else []
    for file in (*told, *(numbers[number] for number in sorted(numbers))):
        data = contents(file)
        digest.update(data)
        try:
            value = parse(data)
            if file.name == "messages.json":
                turns.append(_message_turn(need(value, "messages", list)))
            else:
                meta = need({"meta": value}, "meta", dict)
        except Bad as bad:
            raise Bad(bad.reason, f"{file.parent.name}/{file.name}: {bad.message}") from None
    status = meta.get("status")
    fields = {
        "native_id": folder.name,
        "sha256": digest.hexdigest(),
        "benchmark": take(meta, "source", str, "meta"),
        "task_id": take(meta, "id", str, "meta"),
        "site": take(meta, "site", str, "meta"),
        "start_url": take(meta, "start_url", str, "meta"),
        "goal": take(meta, "question", str, "meta"),
        "final_answer": take(meta, "answer", str, "meta"),
        "self_reported_success": take(meta, "agent_self_reported_success", bool, "meta"),
        "extra": {key: item for key, item in meta.items() if key not in _META},
    }
    if type(status) is str and status in _ENDS:
        fields |= end(*_ENDS[status])
    return _run(folder, sorted(numbers), turns, given, logged=take(meta, "num_steps", int, "meta"), **fields)


def _message_turn(messages: list[Any]) -> tuple[dict[str, Any], str | None, str | None]:
    seen: dict[str, Any] = {"observation": "", "observation_kind": "text"}
    answer = task = None
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        role = need(message, "role", str, place)
        text, shots = content_text(message.get("content"), f"{place}.content")
        if role in ASSISTANT:
            answer = _called(message, place) or text or None
        elif role == "user":
            seen = {"observation": text, "observation_kind": "text"} | place_of(text)
            seen |= {"screenshot": shots[-1]} if shots else {}
            answer, task = None, goal_of(text) or task
    return seen, answer, task


def _called(message: dict[str, Any], place: str) -> str | None:
    """The arguments of a message's tool call: the output that browser-use asks for."""
    calls = take(message, "tool_calls", list, place)
    if not calls:
        return None
    arguments = take(take(calls[0], "function", dict, place) or calls[0], "arguments", (str, dict), place)
    return to_json(arguments) if type(arguments) is dict else arguments


def _run(
    folder: Path,
    numbers: list[int],
    turns: list[tuple[dict[str, Any], str | None, str | None]],
    given: dict[str, Any],
    *,
    final: dict[str, Any] | None = None,
    logged: int | None = None,
    **fields: Any,
) -> Episode:
    """The episode of prompts and replies, one pair a step."""
    if all(answer is None for _, answer, _ in turns):
        raise Bad(
            "no_actions",
            f"{len(turns)} prompts and no reply: no action is known; log the replies, or take the outcome with labels=",
        )
    flags = ["unlabelled"]
    if logged not in (None, len(turns)) or numbers != list(range(numbers[0], numbers[0] + len(turns))):
        flags.append("missing_steps")
    if len(turns) > 1 and turns[-1][1] is None and final is None:
        final = turns.pop()[0]
    steps, calls = [], []
    for number, (seen, answer, _) in zip(numbers, turns, strict=False):
        step, calls = reply(answer)
        steps.append(seen | step | {"extra": {"number": number}})
    if final is not None:
        steps.append(final | {"is_final_observation": True})
    task = next((task for _, _, task in turns if task), None)
    known = {key: item for key, item in fields.items() if item is not None}
    return _episode(folder, steps, given, quality_flags=tuple(flags), **({"goal": task} | done(calls) | known))
