"""Conversations with tool calls or plain text: a row is an episode, an assistant message a step (see `_chat`).

Files: JSON, JSONL, a JSON array (each .gz or .zst too), or Parquet. A line may also be the list of messages itself.

One field map says where things are; `PRESETS` holds the known ones, and ``fields={"reward": "info.score"}`` overrides
any of it by dotted paths, so that rows with names of their own are read too (null: the row does not have it):

- ``openai``: ``messages``, and beside them ``BASE``: id, task_id, trial, model, goal, reward, ...
- ``trl``: ``prompt`` and ``completion``, each a text or messages
- ``verl``: the trainer's dump, ``input``, ``output``, ``gts``, ``score``, ``step``; the policy is ``step-N``
- ``verifiers``: ``prompt``, ``completion``, ``reward``, ``is_truncated``, ``stop_condition``, ``trajectory[].tokens``
- ``tau_bench``: ``task_id``, ``trial``, ``reward``, ``traj``
- ``sharegpt``: ``conversations``, with ``from`` and ``value``, or ``role`` and ``content``
- ``nnetnav``: a row is a step (see `_nnetnav`)

Which assistant messages are decisions. Not those of the prompt, where prompt and completion stand apart. Where any
carries ``loss`` (AgentInstruct) or ``weight`` (OpenAI), only those with true or above 0; ``loss`` false or null is
context, such as the "Ok." that answers the instructions. A row may also list them, as indices in ``decisions``.

Rewards. ``reward`` is the outcome and goes to the last decision; ``rewards`` is a list, one for each decision; with
``success`` alone it is 1 or 0. Rewards inside verifiers' ``trajectory`` are left: they repeat the total on each step.

Ends. As logged, else null. tau-bench does not log them: it ends when the user says ``###STOP###`` or the agent
transfers to a human, and after 30 decisions otherwise, which is a truncation. verifiers' ``is_completed`` holds for
every finished rollout: ``stop_condition`` and ``is_truncated`` say whether it was cut.

tau-bench's ``info.task.instruction`` is for the simulated user. The agent never sees it, so it is no goal here.

A text made by a chat template (ChatML, Llama 3) is read back into messages. Keys of no column go to ``extra``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.errors import UserError
from offline_lm.logs import _chat_row, _files, _nnetnav, _parquet, _tokens
from offline_lm.logs._adapters import Sample, damaged, each, give_outcome, numbered, rejected, take, to_json
from offline_lm.logs._chat_fields import BASE, PRESETS, Fields, Row, recognise, steps_of
from offline_lm.logs._files import Damaged, Record
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected

SOURCE = "chat"
GENERAL = True
_JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*_JSON, *(s + z for s in _JSON for z in (".gz", ".zst")), ".parquet")

_TAU_LIMIT = 30
_LIMITS = {"max_turns_reached": "step_limit", "timeout_reached": "time_limit"}


@dataclass(frozen=True, slots=True)
class _How:
    """The options of `read`, and where the rows come from."""

    path: Path
    preset: str = "auto"
    fields: dict[str, str | None] | None = None
    dataset: str | None = None


def detect(sample: Sample) -> str | None:
    if sample.head.startswith(b"PAR1"):
        names = _parquet.footer(sample.path)
        talk = any(name in names for name in (b"messages", b"conversations")) and (b"role" in names or b"from" in names)
        return "Parquet with messages" if talk or (b"prompt" in names and b"completion" in names) else None
    value = {"messages": sample.value} if type(sample.value) is list else sample.value
    preset = recognise(value) if type(value) is dict else None
    return f"rows as {preset} writes them" if preset else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(
    path: Path, *, preset: str = "auto", fields: dict[str, str | None] | None = None, dataset: str | None = None
) -> Iterator[Episode | Rejected]:
    """Every row of a file, or of the files ending in `SUFFIXES` under a folder.

    Args:
        path: a file or a folder
        preset: a name of `PRESETS`; auto looks at each row
        fields: dotted paths that replace those of the preset, e.g. ``{"messages": "log.turns", "reward": "info.r"}``
        dataset: instead of the file's name

    Raises:
        UserError: an unknown preset or field, a folder without such files.
    """
    if preset not in ("auto", *PRESETS):
        raise UserError(f"preset={preset} is not known; take one of: auto, {', '.join(PRESETS)}")
    if unknown := [name for name in fields or () if name not in BASE]:
        raise UserError(f"fields= names {', '.join(unknown)}; it may name: {', '.join(BASE)}")
    return chain.from_iterable(_read_file(_How(file, preset, fields, dataset)) for file in find(path))


def _read_file(how: _How) -> Iterator[Episode | Rejected]:
    rows = _Rows(how)
    if _parquet.is_parquet(how.path):
        yield from _parquet_rows(how.path, rows)
    else:
        for made in each(SOURCE, how.path, rows.take):
            rows.hole |= isinstance(made, Rejected)
            yield made
    yield from rows.end()


def _parquet_rows(path: Path, rows: _Rows) -> Iterator[Episode | Rejected]:
    count = 0
    for row in _parquet.rows(path):
        count += 1
        if isinstance(row, Damaged):
            yield damaged(SOURCE, path, row, count - 1)
            return
        data, at = (row.data, row.offset) if isinstance(row, Record) else (b"", row[0])
        try:
            if not isinstance(row, Record):
                raise row[1]
            yield from rows.take(parse(row.data), row)
        except Bad as bad:
            rows.hole = True
            yield rejected(SOURCE, path, bad, at, data)
    if not count:
        yield rejected(SOURCE, path, Bad("empty_file", "the file holds no row; was it written to the end?"))


class _Rows:
    """Rows to episodes; holds the rows of one NNetNav episode until its last."""

    def __init__(self, how: _How) -> None:
        self.how = how
        self.hole = False
        """A row of the episode that is held was refused."""
        self._held: list[tuple[Row, Record]] = []

    def take(self, value: Any, record: Record) -> Iterable[Episode | Rejected]:
        row = {"messages": value} if type(value) is list else value
        if type(row) is not dict:
            raise Bad("not_an_object", "the row is not a JSON object; write a conversation as one object")
        preset = self.how.preset
        if preset == "auto":
            preset = recognise(row) or ("openai" if self.how.fields else None)
        if preset is None:
            told = ", ".join(list(row)[:8])
            raise Bad("unknown_format", f"a row with the keys {told[:80]} is of no known shape; name them with fields=")
        if preset != "nnetnav":
            return [*self.end(), _episode(row, record, preset, self.how)]
        of = _nnetnav.episode_of(row)
        _nnetnav.step(row)  # a row that cannot be read is refused by itself
        done = list(self.end()) if self._held and of != _nnetnav.episode_of(self._held[0][0]) else []
        self._held.append((row, record))
        return done

    def end(self) -> Iterator[Episode | Rejected]:
        """The episode that is held, if there is one."""
        held, hole, self._held, self.hole = self._held, self.hole, [], False
        if held:
            yield _nnetnav_episode(held, hole, self.how)


# --- one row ------------------------------------------------------------------------------------------------


def _episode(row: Row, record: Record, preset: str, how: _How) -> Episode:
    get = Fields(row, PRESETS[preset] | (how.fields or {}))
    steps = steps_of(get)
    acting = [step for step in steps if not step.get("is_final_observation")]
    flags: list[str] = []
    own = _chat_row.said(row)
    known, extra = own or ({}, {})
    if own:
        get.used.add("metadata")
    known |= {"task_id": get.text("task_id"), "model": get.text("model"), "goal": get.take("goal", str)}
    known["trial"] = _trial(get)
    known |= _outcome(get, acting, preset, flags)
    known |= {"terminated": get.take("terminated", bool), "truncated": get.take("truncated", bool)} | {
        key: value for key, value in _end(row, acting, steps, preset).items() if value is not None
    }
    policy = get.text("policy_id")
    known["policy_id"] = known.get("policy_id") or (policy and (f"step-{policy}" if preset == "verl" else policy))
    if not _tokens_of(get, acting):
        flags.append("tokens_unmatched")
    if acting:
        acting[-1] |= {"terminated": known["terminated"], "truncated": known["truncated"]}
    for step in acting:
        step.setdefault("source_offset", record.offset)
    flags = [*known.pop("quality_flags", ()), *flags]
    dataset = known.pop("dataset", None)
    return Episode(
        source=SOURCE,
        native_id=_native_id(get.text("id"), known, record),
        dataset=how.dataset or dataset or _dataset(how.path, preset),
        steps=numbered(steps),
        uri=str(how.path),
        sha256=record.sha256,
        quality_flags=tuple(dict.fromkeys(flags)),
        extra=extra | {key: item for key, item in row.items() if key not in get.used and item is not None},
        **known,
    )


def _native_id(logged: str | None, known: Row, record: Record) -> str:
    """As logged; else model, task and trial, if there is a trial: the same task may be tried again; else the hash."""
    if logged is not None:
        return logged
    if known["task_id"] is not None and known["trial"] is not None:
        return "/".join(filter(None, (known["model"], known["task_id"], str(known["trial"]))))
    return record.sha256[:32]


def _dataset(path: Path, preset: str) -> str:
    """The file's name; verl names its dumps by the step alone, so the folder's."""
    return path.absolute().parent.name if preset == "verl" else path.name.split(".")[0]


def _trial(get: Fields) -> int | None:
    value = get.take("trial", int, str)
    if type(value) is str and not (value.isdecimal() and len(value) < 19):
        raise Bad("bad_value", f"trial is {value[:40]!r}; it must be a whole number")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise Bad("out_of_range", "trial does not fit into 64 bits")
    return None if value is None else int(value)


def _outcome(get: Fields, acting: list[dict[str, Any]], preset: str, flags: list[str]) -> Row:
    success = get.take("success", bool, int)
    reward, rewards = get.take("reward", float, bool), get.take("rewards", list)
    reward = None if reward is None else float(reward)
    if preset == "tau_bench" and reward is not None and success is None:
        success = reward == 1
    success = None if success is None else bool(success)
    if rewards is not None:
        if len(rewards) != len(acting):
            message = f"the row has {len(acting)} decisions and {len(rewards)} rewards; log one each"
            raise Bad("length_mismatch", message)
        source = get.take("reward_source", str) or "env"
        for i, (step, item) in enumerate(zip(acting, rewards, strict=True)):
            if item is not None and type(item) not in (int, float):
                raise Bad("wrong_type", f"rewards[{i}] must be a number or null")
            if item is not None:
                step |= {"reward": float(item), "reward_source": source}
        logged = [step.get("reward") for step in acting]
        if reward is None and None not in logged:
            reward = float(sum(item for item in logged if item is not None))
        return {"success": success, "outcome_reward": reward}
    if reward is None and success is not None:
        reward = float(success)
    give_outcome(acting, reward)
    if reward is None:
        flags.append("unlabelled")
    return {"success": success, "outcome_reward": reward}


def _end(row: Row, acting: list[Row], steps: list[Row], preset: str) -> Row:
    """terminated, truncated and end_reason by the rules of tau-bench and verifiers."""
    if preset == "tau_bench" and acting:
        stopped = "###STOP###" in steps[-1]["messages"] if steps[-1] is not acting[-1] else False
        if stopped or acting[-1].get("action_name") == "transfer_to_human_agents":
            return {"terminated": True, "truncated": False, "end_reason": "env_done"}
        if len(acting) >= _TAU_LIMIT:
            return {"terminated": False, "truncated": True, "end_reason": "step_limit"}
    if preset == "verifiers":
        reason = _LIMITS.get(take(row, "stop_condition", str) or "")
        cut = take(row, "is_truncated", bool)
        if reason or cut:
            return {"terminated": False, "truncated": True, "end_reason": reason}
        if take(row, "is_completed", bool) and row.get("error") is None:
            return {"terminated": True, "truncated": False}
    return {}


def _tokens_of(get: Fields, acting: list[dict[str, Any]]) -> bool:
    """False where tokens were logged and fit no step; they stay in `extra` then."""
    trajectory = get.take("trajectory", list)
    if trajectory is not None:
        told = all(type(item) is dict for item in trajectory) and any(item.get("tokens") for item in trajectory)
        if not told or _tokens.of_trajectory(trajectory, acting):
            return True
        get.used.discard("trajectory")
        return False
    for place, tokens in (("tokens", get.row.get("tokens")), ("the row", get.row)):
        if type(tokens) is dict and type(tokens.get("completion_ids")) is list:
            if not _tokens.of_rollout(tokens, acting, place):
                return False
            get.used |= {"tokens", "prompt_ids", "completion_ids", "completion_mask", "completion_logprobs"}
    return True


def _nnetnav_episode(held: list[tuple[Row, Record]], hole: bool, how: _How) -> Episode:
    read = [_nnetnav.step(row) for row, _ in held]
    steps: list[dict[str, Any]] = [
        step | {"source_offset": record.offset} for (step, _, _), (_, record) in zip(read, held, strict=True)
    ]
    last = steps[-1]
    stopped = True if last.get("action_name") == "stop" else None
    last |= {"terminated": stopped, "truncated": False if stopped else None}
    dataset, native_id = _nnetnav.episode_of(held[0][0])
    return Episode(
        source=SOURCE,
        native_id=native_id,
        dataset=how.dataset or dataset or _dataset(how.path, "nnetnav"),
        steps=numbered(steps),
        task_id=native_id,
        goal=next((goal for _, goal, _ in read if goal), None),
        start_url=steps[0].get("url"),
        terminated=stopped,
        truncated=False if stopped else None,
        end_reason="agent_stop" if stopped else None,
        final_answer=" ".join(last["action_args"]["arguments"]) if stopped else None,
        uri=str(how.path),
        sha256=hashlib.sha256("".join(record.sha256 for _, record in held).encode()).hexdigest(),
        quality_flags=("unlabelled", "missing_rows") if hole else ("unlabelled",),
        extra={"system": system} if (system := read[0][2]) else {},
    )


# --- rows for others ----------------------------------------------------------------------------------------


def write(episode: Episode) -> tuple[Row, list[str]]:
    """The episode as a row of chat JSONL, and the columns that the row cannot say.

    The row has ``messages`` as OpenAI writes them, and, where the episode has a value: ``id``, ``task_id``, ``trial``,
    ``model``, ``goal``, ``reward`` (the outcome), ``success``, ``terminated``, ``truncated``; ``rewards`` and
    ``reward_source`` where steps earned rewards of their own; ``decisions``, the indices of the messages that are
    steps, where another message of the assistant stands among them; ``trajectory[].tokens`` as verifiers logs them
    (``prompt_ids``, ``completion_ids``, ``completion_logprobs``); and ``metadata``: its ``schema``, the ``episode``'s
    other columns under their names in the store, and its ``extra``.

    What it cannot say is measured, not declared: the row is read back, and every column that had a value and came back
    otherwise is named, those of steps as ``steps.NAME``.

    Raises:
        Bad: the episode cannot be a conversation (its tokens are no token ids, say).
    """
    row = _chat_row.row_of(episode)
    data = to_json(row).encode()
    record = Record(0, data, hashlib.sha256(data).hexdigest(), False)
    return row, _chat_row.lost(episode, _episode(row, record, "openai", _How(Path("row.jsonl"))))
