"""From `Episode` to Arrow rows of ``episodes`` and ``steps``: validation, identity, conversion."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from operator import attrgetter
from typing import Any

import orjson
import pyarrow as pa

from offline_lm.store import schema
from offline_lm.types import Candidate, Episode, Label, Step

EPISODE_NAMESPACE = uuid.UUID("6f3b5c1e-8d0a-5e0f-9d57-0a6c4f1f3b52")

REDACTED = "redacted"
"""Quality flag of an episode that secrets were taken out of."""

_STEP_FIELDS = tuple(f.name for f in fields(Step))
_step_values = attrgetter(*_STEP_FIELDS)
_STEP_FLOATS = tuple(f.name for f in schema.STEPS if pa.types.is_float64(f.type))
_EPISODE_FIELDS = tuple(f.name for f in fields(Episode) if f.name in schema.EPISODES.names)
_EPISODE_FLOATS = tuple(f.name for f in schema.EPISODES if pa.types.is_float64(f.type))

# What does not make two episodes different: where and when they were read, what they cost.
_STEP_UNHASHED = {"episode_id", "ingest_id", "ts_start", "ts_end", "source_offset", "extra"}
_EPISODE_HASHED = (
    *("benchmark", "task_id", "task_family", "site", "start_url", "goal", "seed", "trial"),
    *("policy_id", "policy_kind", "model", "agent", "sampling"),
    *("outcome_reward", "raw_reward", "success", "self_reported_success", "terminated", "truncated"),
    *("end_reason", "final_answer", "labels"),
)


class Invalid(Exception):
    """An episode that cannot be stored: ``reason`` is a stable code, the message says where and what."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Rows:
    """One episode as rows of plain values, checked; `arrow` makes them columns.

    A step, of whose fields most are null, holds only those that are not.
    """

    episode: dict[str, Any]
    steps: list[dict[str, Any]]

    @property
    def episode_id(self) -> str:
        return self.episode["episode_id"]

    @property
    def content_hash(self) -> str:
        return self.episode["content_hash"]

    @property
    def n_steps(self) -> int:
        """Decisions: the final observation is not counted."""
        return self.episode["n_steps"]


def episode_id(source: str, dataset: str | None, native_id: str) -> str:
    """The store's id of an episode: the same log read again, anywhere, gives the same id."""
    return str(uuid.uuid5(EPISODE_NAMESPACE, _json([source, dataset, native_id])))


def convert(episode: Episode, ingest_id: str) -> Rows:
    """Checks ``episode`` and converts it. What does not fit its column, `arrow` finds.

    Raises:
        Invalid: with reason ``no_steps``, ``step_order``, ``final_observation``, ``no_action``,
            ``no_observation``, ``step_after_end``, ``non_finite``, ``int_range``, ``lone_surrogate`` or
            ``bad_type``.
    """
    _check_steps(episode.steps)
    try:
        id_ = episode_id(episode.source, episode.dataset, episode.native_id)
        steps = [_step_row(step, id_, ingest_id) for step in episode.steps]
        row = _episode_row(episode, id_, ingest_id)
        _check_finite(row, steps)
        row["content_hash"] = _content_hash(row, steps)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _invalid(error, f"episode {episode.native_id!r}") from error
    return Rows(row, steps)


def arrow(rows: Sequence[Rows]) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """(rows of ``episodes``, rows of ``steps``) of checked episodes, steps in the order of the episodes.

    Raises:
        Invalid: a value does not fit its column: ``int_range``, ``lone_surrogate`` or ``bad_type``.
    """
    return (
        _batch([row.episode for row in rows], schema.EPISODES),
        _batch([step for row in rows for step in row.steps], schema.STEPS),
    )


def _check_steps(steps: tuple[Step, ...]) -> None:
    if not any(not step.is_final_observation for step in steps):
        raise Invalid("no_steps", "the episode has no step with an action")
    last = len(steps) - 1
    for i, step in enumerate(steps):
        if type(step.step) is not int or step.step < 0:
            raise Invalid("step_order", f"step index {step.step!r}: indices are whole numbers from 0")
        if i and step.step != steps[i - 1].step + 1:
            raise Invalid("step_order", f"step {step.step} follows step {steps[i - 1].step}: indices rise by one")
        acts = step.action is not None or step.response is not None
        if step.is_final_observation and (acts or i != last):
            where = "has an action" if acts else "is not the last step"
            raise Invalid("final_observation", f"step {step.step}: the final observation {where}")
        if not acts and not step.is_final_observation:
            raise Invalid("no_action", f"step {step.step} has neither action nor response")
        seen = (step.observation, step.messages, step.observation_error, step.screenshot)
        if all(value is None for value in seen):
            raise Invalid("no_observation", f"step {step.step} has neither observation nor messages")
        if (step.terminated or step.truncated) and i != last and not steps[i + 1].is_final_observation:
            flag = "terminated" if step.terminated else "truncated"
            raise Invalid("step_after_end", f"step {step.step} is {flag}, and step {steps[i + 1].step} follows it")


def _step_row(step: Step, episode_id: str, ingest_id: str) -> dict[str, Any]:
    values = zip(_STEP_FIELDS, _step_values(step), strict=True)
    row: dict[str, Any] = {name: value for name, value in values if value is not None}
    row["episode_id"], row["ingest_id"] = episode_id, ingest_id
    if step.candidates is not None:
        row["candidates"] = [_plain(candidate, ("logprob", "score")) for candidate in step.candidates]
    extra = dict(step.extra or {})
    if step.screenshot is not None:
        row["screenshot"] = _struct("screenshot", step.screenshot, schema.SCREENSHOT, extra)
    if step.target is not None:
        row["target"] = _struct("target", step.target, schema.TARGET, extra)
    if step.action_args is not None:
        row["action_args"] = _json(step.action_args)
    row.pop("extra", None)
    if extra:
        row["extra"] = _json(extra)
    return _floats(row, _STEP_FLOATS)


def _episode_row(episode: Episode, episode_id: str, ingest_id: str) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(episode, name) for name in _EPISODE_FIELDS}
    row["episode_id"], row["ingest_id"] = episode_id, ingest_id
    row["n_steps"] = sum(not step.is_final_observation for step in episode.steps)
    row["labels"] = [_plain(label, ("value",)) for label in episode.labels]
    row["quality_flags"] = list(episode.quality_flags)
    extra = dict(episode.extra or {})
    row["sampling"] = _struct("sampling", episode.sampling, schema.SAMPLING, extra)
    row["extra"] = _json(extra) if extra else None
    row["provenance"] = {
        "adapter": episode.source,
        "adapter_version": episode.adapter_version,
        "uri": episode.uri,
        "sha256": episode.sha256,
        "native_id": episode.native_id,
        "licence": episode.licence,
    }
    return _floats(row, _EPISODE_FLOATS)


def _plain(record: Candidate | Label, floats: tuple[str, ...]) -> dict[str, Any]:
    return _floats({name: getattr(record, name) for name in type(record).__slots__}, floats)


def _struct(name: str, value: Any, kind: pa.StructType, extra: dict[str, Any]) -> dict[str, Any] | None:
    """``value`` cut to the fields of ``kind``; other keys move to ``extra[name]``, so nothing is lost."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {value!r}: an object is wanted")
    known = {field.name: field.type for field in kind}
    row: dict[str, Any] = {}
    for key in known.keys() & value.keys():
        item = value[key]
        if item is None:  # absent and null are one content
            continue
        if known[key] == pa.string() and not isinstance(item, str):
            item = _json(item)  # a ref is a number in some logs
        row[key] = item
    if other := {key: item for key, item in value.items() if key not in known}:
        extra[name] = other
    return _floats(row, [key for key, type_ in known.items() if pa.types.is_float64(type_)])


def _floats(row: dict[str, Any], names: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """Whole numbers become floats where the column is float64, so that 1 and 1.0 are the same content."""
    for name in names:
        value = row.get(name)
        if type(value) is int:
            row[name] = float(value)
        elif type(value) is bool:
            raise TypeError(f"{name} is {value}: a number is wanted")
    return row


_WHOLE = frozenset({str, int, bool, type(None)})
"""Types of nearly all values, and of all in a list of token ids; they hold no float."""


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{path}.{key}")
    elif isinstance(value, list | tuple) and not _WHOLE.issuperset(map(type, value)):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{path}[{i}]")


def _check_finite(episode: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    for where, row in (("episode", episode), *((f"step {step['step']}", step) for step in steps)):
        for name, value in row.items():
            if type(value) not in _WHOLE:
                for path, number in _numbers(value, name):
                    if not math.isfinite(number):
                        raise Invalid("non_finite", f"{where}: {path} is {number}")


def _content_hash(episode: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    content = {name: episode[name] for name in _EPISODE_HASHED if episode[name] is not None}
    if REDACTED in episode["quality_flags"]:  # two that differed in their secrets alone are still two
        content["record"] = episode["provenance"]["sha256"] or episode["provenance"]["native_id"]
    content["steps"] = [{name: value for name, value in step.items() if name not in _STEP_UNHASHED} for step in steps]
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _json(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _batch(rows: list[dict[str, Any]], kind: pa.Schema) -> pa.RecordBatch:
    columns = []
    present = set(chain.from_iterable(rows))
    for field in kind:
        if field.name not in present:
            columns.append(pa.nulls(len(rows), field.type))
            continue
        values = [row.get(field.name) for row in rows]
        try:
            columns.append(pa.array(values, field.type))
        except (TypeError, ValueError, OverflowError) as error:
            raise _invalid(error, _culprit(rows, values, field)) from error
    return pa.RecordBatch.from_arrays(columns, schema=kind)


def _culprit(rows: list[dict[str, Any]], values: list[Any], field: pa.Field) -> str:
    """The place of the first value that is no value of the column."""
    for row, value in zip(rows, values, strict=True):
        try:
            pa.array([value], field.type)
        except (TypeError, ValueError, OverflowError):
            place = f"step {row['step']}" if "step" in row else "episode"
            return f"{place}: {field.name}"
    return field.name


def _invalid(error: Exception, where: str) -> Invalid:
    text = str(error)
    if isinstance(error, UnicodeError) or "surrogates" in text:
        return Invalid("lone_surrogate", f"{where} holds a lone surrogate, which is no text in UTF-8")
    if isinstance(error, OverflowError) or any(s in text for s in ("64-bit", "too large", "out of ")):
        return Invalid("int_range", f"{where} holds a number out of range: {text}")
    return Invalid("bad_type", f"{where} holds a value of another type than the column: {text}")
