"""The field map of chat rows: where each format has its messages, reward and the rest, and a row read through it."""

from __future__ import annotations

from typing import Any

from offline_lm.logs import _nnetnav, _template
from offline_lm.logs._adapters import need, take
from offline_lm.logs._chat import ASSISTANT, split
from offline_lm.logs._records import Bad, parse

Paths = str | tuple[str, ...] | None
Row = dict[str, Any]

BASE: dict[str, Paths] = {
    "id": ("id", "episode_id"),
    "task_id": "task_id",
    "trial": "trial",
    "model": "model",
    "goal": "goal",
    "reward": "reward",
    "rewards": "rewards",
    "reward_source": "reward_source",
    "success": "success",
    "terminated": "terminated",
    "truncated": "truncated",
    "decisions": "decisions",
    "trajectory": "trajectory",
    "messages": None,
    "prompt": None,
    "completion": None,
    "policy_id": None,
}
PRESETS: dict[str, dict[str, Paths]] = {
    "openai": BASE | {"messages": "messages"},
    "trl": BASE | {"prompt": "prompt", "completion": "completion"},
    "verl": BASE | {"prompt": "input", "completion": "output", "reward": "score", "policy_id": "step"},
    "verifiers": BASE
    | {"prompt": "prompt", "completion": "completion", "task_id": "example_id", "truncated": "is_truncated"},
    "tau_bench": BASE | {"messages": "traj"},
    "sharegpt": BASE | {"messages": "conversations", "task_id": ("item_id", "task_id", "id")},
    "nnetnav": {},
}
_VERIFIERS = {"is_completed", "is_truncated", "example_id", "stop_condition", "metrics", "trajectory"}
_FROM = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "observation": "tool"}


def recognise(row: Row) -> str | None:
    keys = row.keys()
    if type(row.get("traj")) is list and "task_id" in keys:
        return "tau_bench"
    if _turns(row.get("conversations")):
        return "sharegpt"
    if _nnetnav.is_row(row):
        return "nnetnav"
    if _turns(row.get("messages")):
        return "openai"
    if {"input", "output", "score", "step"} <= keys and type(row["input"]) is type(row["output"]) is str:
        return "verl"
    if {"prompt", "completion"} <= keys:
        return "verifiers" if _VERIFIERS & keys else "trl"
    return None


def _turns(value: Any) -> bool:
    """Whether it is a list of messages; an empty one is."""
    if value == []:
        return True
    first = value[0] if type(value) is list else None
    return type(first) is dict and any(type(first.get(key)) is str for key in ("role", "from"))


class Fields:
    """A row through its field map."""

    def __init__(self, row: Row, paths: dict[str, Paths]) -> None:
        self.row = row
        self.paths = paths
        self.used: set[str] = set()

    def take(self, name: str, *kinds: type) -> Any:
        """The value of a field, None if the row lacks it. Raises Bad (``wrong_type``)."""
        paths = self.paths.get(name) or ()
        for path in (paths,) if isinstance(paths, str) else paths:
            value = self._at(path)
            if value is None:
                continue
            if type(value) is int and float in kinds and int not in kinds:
                value = float(value)
            if type(value) not in kinds:
                found = type(value).__name__
                raise Bad("wrong_type", f"{path} is of type {found}, which is no {name}; say where it is with fields=")
            return value
        return None

    def text(self, name: str) -> str | None:
        value = self.take(name, str, int)
        return None if value is None else str(value)

    def _at(self, path: str) -> Any:
        if path in self.row:
            self.used.add(path)
            return self.row[path]
        value: Any = self.row
        for key in path.split("."):
            if type(value) is list and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            elif type(value) is dict:
                value = value.get(key)
            else:
                return None
        return value


# --- messages ----------------------------------------------------------------------------------------------


def steps_of(get: Fields) -> list[dict[str, Any]]:
    given = get.take("messages", list, str)
    if given is not None:
        messages, context = _conversation(given, "messages")
    else:
        messages, context = _prompt_and_completion(get)
    decisions = get.take("decisions", list)
    if decisions is not None:
        context = {i for i in range(len(messages)) if i not in decisions}
    return split(messages, "messages", context)


def _prompt_and_completion(get: Fields) -> tuple[list[Row], set[int]]:
    prompt, completion = get.take("prompt", str, list), get.take("completion", str, list, dict)
    if completion is None:
        raise Bad("missing_key", "the row has no messages and no completion; say where they are with fields=")
    if type(prompt) is str and type(completion) is str and (before := _template.messages(prompt)) is not None:
        messages = _template.messages(prompt + completion) or []
        return messages, set(range(len(before)))
    before = [{"role": "user", "content": prompt}] if type(prompt) is str else _conversation(prompt or [], "prompt")[0]
    said = [completion] if type(completion) is dict else completion
    after = [{"role": "assistant", "content": said}] if type(said) is str else _conversation(said, "completion")[0]
    return before + after, set(range(len(before)))


def _conversation(given: list[Any] | str, place: str) -> tuple[list[Row], set[int]]:
    """(messages, indices of those of the assistant that are no decisions)."""
    turns = parse(given.encode()) if type(given) is str else given
    if type(turns) is not list:
        raise Bad("wrong_type", f"{place} is not a list of messages")
    messages, taught = [], []
    for i, turn in enumerate(turns):
        messages.append(_message(turn, f"{place}[{i}]"))
        weight = take(turn, "weight", float, f"{place}[{i}]")
        taught.append(take(turn, "loss", bool, f"{place}[{i}]") if weight is None else weight > 0)
    said = [i for i, message in enumerate(messages) if need(message, "role", str, f"{place}[{i}]") in ASSISTANT]
    if all(taught[i] is None for i in said):
        return messages, set()
    return messages, {i for i in said if not taught[i]}


def _message(turn: Any, place: str) -> Row:
    """A message with role and content; ShareGPT calls them from and value. Nulls are not logged."""
    speaker = take(turn, "from", str, place)
    message = {key: item for key, item in turn.items() if item is not None and key not in ("loss", "weight")}
    if speaker is None or "role" in message:
        return message
    text = take(turn, "value", str, place)
    del message["from"]
    message = {"role": _FROM.get(speaker, speaker), "content": text or ""} | message
    message.pop("value", None)
    if speaker == "function_call":  # LLaMA-Factory: the value is the call
        call = parse((text or "").encode())
        message |= {"role": "assistant", "content": "", "tool_calls": call if type(call) is list else [call]}
    return message
