"""Outcomes that a log keeps elsewhere: a table of labels, joined to episodes while they are read.

A row names episodes by its keys, any of `KEYS`: all that it gives must match (columns that are absent or null do
not count). It says an outcome: ``outcome_reward`` (or ``reward``, or ``score``), ``success``, or both; and who judged:
``kind`` (human, if not said), ``labeler``, ``name``, ``reason``. Other columns are not read.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from offline_lm.errors import UserError
from offline_lm.logs import _files
from offline_lm.logs._records import Bad, parse
from offline_lm.store.rows import episode_id
from offline_lm.types import Episode, Label, Step

KEYS = (
    *("native_id", "episode_id", "dataset", "benchmark", "task_id", "task_family"),
    *("model", "agent", "policy_id", "trial", "seed"),
)
REWARDS = ("outcome_reward", "reward", "score")
_OUTCOMES = (*REWARDS, "success")
_NUMBERED = ("trial", "seed")
_TEXTS = ("kind", "labeler", "name", "reason")
_KINDS = ("env", "judge", "human", "self")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table of labels."""

    place: str
    """of the row in its file, for messages"""
    key: tuple[tuple[str, str | int], ...]
    reward: float | None
    success: bool | None
    label: Label

    @property
    def outcome(self) -> float | None:
        """The reward; success alone is 1 or 0."""
        return self.reward if self.reward is not None or self.success is None else float(self.success)


@dataclass(slots=True)
class Labels:
    """A table of labels, and how much of it found its episode so far."""

    path: Path
    rows: list[Row]
    matched: int = 0
    """episodes that got a label"""
    used: set[int] = field(default_factory=set)
    """indices of the rows that named an episode"""
    _by_key: dict[tuple[str, ...], dict[tuple[str | int, ...], list[int]]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Labels:
        """The table in a JSONL, JSON, CSV or Parquet file; JSON is a list of rows, or an object by task_id whose
        values are rows, rewards (numbers) or successes (true, false).

        Raises:
            UserError: not such a file; no row, no key or no outcome in it; a value of the wrong type.
        """
        labels = cls(path, [row for value, place in _table(path) if (row := _row(value, f"{path}, {place}"))])
        if not labels.rows:
            raise UserError(f"{path} holds no label; a row has keys and an outcome ({', '.join(_OUTCOMES)})")
        for i, row in enumerate(labels.rows):
            names, values = zip(*row.key, strict=True)
            labels._by_key.setdefault(names, {}).setdefault(values, []).append(i)
        return labels

    @property
    def unmatched(self) -> int:
        """Rows that no episode has matched."""
        return len(self.rows) - len(self.used)

    def apply(self, episode: Episode) -> Episode:
        """The episode with its label, or as it was if no row names it.

        Without a logged reward it gets the label's as its outcome. With one it keeps its own, and the flag
        ``label_differs`` if the label says otherwise. A label of kind ``self`` is no reward.

        Raises:
            UserError: two rows name the episode and disagree.
        """
        found = self._find(episode)
        if not found:
            return episode
        self.matched += 1
        self.used.update(found)
        rows = [self.rows[i] for i in found]
        labels = [row.label for row in rows]
        episode = replace(episode, labels=(*episode.labels, *dict.fromkeys(labels)))
        if reported := _agreed([row for row in rows if row.label.kind == "self"], episode):
            episode = replace(episode, self_reported_success=_first(episode.self_reported_success, reported.success))
        judged = _agreed([row for row in rows if row.label.kind != "self"], episode)
        return _judged(episode, judged) if judged else episode

    def _find(self, episode: Episode) -> list[int]:
        found: list[int] = []
        for names, rows in self._by_key.items():
            values = tuple(
                episode_id(episode.source, episode.dataset, episode.native_id)
                if name == "episode_id"
                else getattr(episode, name)
                for name in names
            )
            found += rows.get(values, ())
        return sorted(found)


def _agreed(rows: list[Row], episode: Episode) -> Row | None:
    """What all rows of one episode say together."""
    if not rows:
        return None
    one = rows[0]
    for row in rows[1:]:
        if _differ(one.outcome, row.outcome) or _differ(one.success, row.success):
            raise UserError(
                f"{one.place} and {row.place} disagree on episode {episode.native_id!r} "
                f"({_said(one)}, {_said(row)}): remove one, or add a key that tells their episodes apart"
            )
        one = replace(one, reward=_first(one.reward, row.reward), success=_first(one.success, row.success))
    return one


def _judged(episode: Episode, row: Row) -> Episode:
    rewards = [step.reward for step in episode.steps if not step.is_final_observation]
    logged = [reward for reward in rewards if reward is not None]
    outcome = episode.outcome_reward
    if outcome is None and logged:
        outcome = math.fsum(logged)
    if _differ(outcome, row.outcome) or _differ(episode.success, row.success):
        return replace(episode, quality_flags=tuple(dict.fromkeys((*episode.quality_flags, "label_differs"))))
    if not logged:
        episode = replace(episode, steps=_with_outcome(episode.steps, _first(outcome, row.outcome)))
    return replace(
        episode,
        outcome_reward=_first(outcome, row.outcome),
        success=_first(episode.success, row.success),
        quality_flags=tuple(flag for flag in episode.quality_flags if flag != "unlabelled"),
    )


def _with_outcome(steps: tuple[Step, ...], reward: float | None) -> tuple[Step, ...]:
    """The reward on the last action, 0 before: as `_adapters.give_outcome`, for steps that are made."""
    last = max(i for i, step in enumerate(steps) if not step.is_final_observation)
    return tuple(
        step
        if step.is_final_observation
        else replace(step, reward=reward if i == last else 0.0, reward_source="outcome")
        for i, step in enumerate(steps)
    )


def _differ(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and not math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


def _first(a: Any, b: Any) -> Any:
    return b if a is None else a


def _said(row: Row) -> str:
    return " ".join(f"{name} {value}" for name in ("success", "reward") if (value := getattr(row, name)) is not None)


# --- files --------------------------------------------------------------------------------------------------


def _table(path: Path) -> Iterator[tuple[Any, str]]:
    """(row, its place) for each row of the file."""
    if not path.is_file():
        raise UserError(f"labels={path} is no file; name a table of labels ({', '.join(_SUFFIXES)})")
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        return _parquet(path)
    if name.endswith(".csv"):
        return _csv(path)
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return _json(path)
    raise UserError(f"labels={path}: its name must end in one of {', '.join(_SUFFIXES)}")


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:
            columns = [name for name in file.schema_arrow.names if name in (*KEYS, *_OUTCOMES, *_TEXTS)]
            index = 0
            for batch in file.iter_batches(1024, columns=columns):
                for row in batch.to_pylist():
                    index += 1
                    yield row, f"row {index}"
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _csv(path: Path) -> Iterator[tuple[Any, str]]:
    data, more = _whole(path)
    if more:
        raise UserError(f"{path} is longer than {_files.TOTAL_BYTES} bytes: write it as Parquet")
    try:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        for row in rows:
            yield {name: text for name, text in row.items() if text not in (None, "")}, f"line {rows.line_num}"
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from error


def _whole(path: Path) -> tuple[bytes, bool]:
    try:
        return _files.whole(path, _files.TOTAL_BYTES)
    except _files.Damaged as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _json(path: Path) -> Iterator[tuple[Any, str]]:
    for count, found in enumerate(_files.records(path)):
        if isinstance(found, _files.Damaged):
            raise UserError(f"{path} cannot be read: {found}")
        place = f"byte {found.offset}"
        if found.too_long:
            raise UserError(f"{path}, {place}: the row is longer than {_files.MAX_BYTES} bytes; write one a line")
        try:
            value = parse(found.data)
        except Bad as bad:
            raise UserError(f"{path}, {place}: {bad.message}") from bad
        if count == 0 and type(value) is dict and not any(_is_value(value.get(name)) for name in (*KEYS, *_OUTCOMES)):
            yield from _by_task(value, path)
        else:
            yield value, place


def _is_value(value: Any) -> bool:
    return type(value) in (int, float, bool, str)


def _by_task(value: dict[str, Any], path: Path) -> Iterator[tuple[Any, str]]:
    for task, item in value.items():
        place = f"key {task[:50]!r}"
        if type(item) is dict:
            yield {"task_id": task} | item, place
        elif type(item) is bool:
            yield {"task_id": task, "success": item}, place
        elif type(item) in (int, float):
            yield {"task_id": task, "reward": item}, place
        else:
            raise UserError(
                f"{path}, {place}: no label; a row has an outcome ({', '.join(_OUTCOMES)}), and an object by task_id "
                "holds rows, rewards or successes"
            )


# --- one row ------------------------------------------------------------------------------------------------


def _row(value: Any, place: str) -> Row | None:
    """None: the row has no outcome yet."""
    if type(value) is not dict:
        raise UserError(f"{place}: a row is an object with keys and an outcome")
    given = {name: item for name, item in value.items() if item is not None}

    def get(name: str, kind: Callable[[Any], Any], want: str) -> Any:
        try:
            return None if name not in given else kind(given[name])
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{place}: {name} is {str(given[name])[:40]!r}; it must be {want}") from None

    keys = {name: get(name, *((_whole_number, "a whole number") if name in _NUMBERED else _TEXT)) for name in KEYS}
    key = tuple((name, item) for name, item in keys.items() if item is not None)
    if not key:
        raise UserError(f"{place}: the row names no episode; it needs one or more of {', '.join(KEYS)}")
    rewards = {name: get(name, _number, "a finite number") for name in REWARDS if name in given}
    if len(set(rewards.values())) > 1:
        raise UserError(f"{place}: {' and '.join(rewards)} differ; keep one")
    reward, success = next(iter(rewards.values()), None), get("success", _bool, "true or false")
    if reward is None and success is None:
        return None
    kind, labeler, name, reason = (get(text, *_TEXT) for text in _TEXTS)
    if kind not in (None, *_KINDS):
        raise UserError(f"{place}: kind is {kind[:40]!r}; it must be one of {', '.join(_KINDS)}")
    told = reward if reward is not None else float(success)
    label = Label(kind=kind or "human", labeler=labeler, name=name, value=told, reason=reason)
    return Row(place, key, reward, success, label)


def _text(value: Any) -> str:
    """Ids are numbers in some tables and text in others."""
    if type(value) is int:
        return str(value)
    if type(value) is not str:
        raise TypeError
    return value


_TEXT = (_text, "text")


def _whole_number(value: Any) -> int:
    if type(value) not in (int, str) and value != int(value):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if type(value) is bool or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _bool(value: Any) -> bool:
    if type(value) is bool:
        return value
    text = str(int(value)) if type(value) is float and value.is_integer() else str(value)
    if text.lower() not in _BOOLS:
        raise ValueError
    return _BOOLS[text.lower()]
