"""Rows of the store back to `Episode`: the inverse of `offline_lm.store.rows`, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import duckdb
import orjson

from offline_lm.errors import UserError
from offline_lm.store import schema
from offline_lm.store.connect import explained
from offline_lm.store.tables import Store
from offline_lm.types import Candidate, Episode, Label, Step

_STEP_FIELDS = [f.name for f in fields(Step)]
_EPISODE_FIELDS = [f.name for f in fields(Episode) if f.name in schema.EPISODES.names]
_STRUCTS = {"sampling": schema.SAMPLING, "screenshot": schema.SCREENSHOT, "target": schema.TARGET}


def read_episodes(store: Store, where: str | None = None, batch: int = 100) -> Iterator[Episode]:
    """The episodes of `store` for which the SQL condition `where` on the view ``episodes`` holds.

    They come in the order of source, dataset and episode_id, from the snapshot of the first call of next().
    `batch` of them are held at a time. ``rows.convert`` of one gives the rows it was read from.

    Raises:
        UserError: `where` is no condition on episodes, or a file of the store cannot be read.
    """
    with store.connect() as db, explained(store):
        ids = _selected(db, where)
        for first in range(0, len(ids), batch):
            chosen = ids[first : first + batch]
            heads = {row["episode_id"]: row for row in _rows(db, "episodes", chosen)}
            steps: dict[str, list[Step]] = {id_: [] for id_ in chosen}
            for row in _rows(db, "steps", chosen, order="step"):
                steps[row["episode_id"]].append(_step(row))
            for id_ in chosen:
                yield _episode(heads.pop(id_), tuple(steps.pop(id_)))


def _selected(db: duckdb.DuckDBPyConnection, where: str | None) -> list[str]:
    # A line of its own, so that a comment at its end does not swallow the bracket.
    condition = "true" if where is None else f"(\n{where}\n)"
    sql = f"SELECT episode_id FROM episodes WHERE {condition} ORDER BY source, dataset, episode_id"
    try:
        return [row[0] for row in db.execute(sql).fetchall()]
    except (duckdb.ProgrammingError, duckdb.DataError) as error:
        raise UserError(f"where={where}: no condition on the view episodes: {str(error).splitlines()[0]}") from error


def _rows(
    db: duckdb.DuckDBPyConnection, view: str, ids: list[str], order: str = "episode_id"
) -> Iterator[dict[str, Any]]:
    found = db.execute(f"SELECT * FROM {view} WHERE episode_id IN (SELECT unnest($1)) ORDER BY {order}", [ids])
    names = [column[0] for column in found.description]
    while rows := found.fetchmany(100):
        for row in rows:
            yield dict(zip(names, row, strict=True))


def _step(row: dict[str, Any]) -> Step:
    value = {name: row[name] for name in _STEP_FIELDS}
    extra = _parsed(row["extra"])
    for name in ("screenshot", "target"):
        value[name] = _joined(name, row[name], extra)
    for name in ("ts_start", "ts_end"):
        value[name] = _utc(row[name])
    for name in ("sub_actions", "prompt_token_ids", "response_token_ids", "response_logprobs"):
        value[name] = None if row[name] is None else tuple(row[name])
    value["candidates"] = None if row["candidates"] is None else tuple(Candidate(**c) for c in row["candidates"])
    value["action_args"] = _parsed(row["action_args"])
    value["extra"] = extra or None
    return Step(**value)


def _episode(row: dict[str, Any], steps: tuple[Step, ...]) -> Episode:
    value = {name: row[name] for name in _EPISODE_FIELDS}
    extra = _parsed(row["extra"]) or {}
    provenance = row["provenance"]
    for name in ("adapter_version", "uri", "sha256", "native_id", "licence"):
        value[name] = provenance[name]
    value["sampling"] = _joined("sampling", row["sampling"], extra)
    value["started_at"] = _utc(row["started_at"])
    value["labels"] = tuple(Label(**label) for label in row["labels"] or ())
    value["quality_flags"] = tuple(row["quality_flags"] or ())
    return Episode(**(value | {"extra": extra, "steps": steps}))


def _joined(name: str, row: dict[str, Any] | None, extra: dict[str, Any] | None) -> dict[str, Any] | None:
    """A struct as it was given: without its nulls, and with the keys that `rows` moved to ``extra[name]``."""
    if row is None:
        return None
    value = {key: item for key, item in row.items() if item is not None}
    moved = extra.get(name) if extra else None
    known = {field.name for field in _STRUCTS[name]}
    if extra is not None and isinstance(moved, dict) and moved and not known & moved.keys():
        value |= extra.pop(name)
    return value


def _parsed(text: str | None) -> dict[str, Any] | None:
    return None if text is None else orjson.loads(text)


def _utc(time: datetime | None) -> datetime | None:
    """The views give times in UTC without saying so."""
    return None if time is None else time.replace(tzinfo=UTC)
