"""Hugging Face `datasets`: episodes as a folder of ``Dataset.save_to_disk``, a row each.

A row has the keys of an exported ``jsonl`` line (`offline_lm.logs._exact`), so `source=hf_datasets` reads all of it
back. Arrow wants one type for a column: objects of no fixed shape (`offline_lm.logs.hf_datasets.OBJECTS`) are JSON
text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from offline_lm.errors import UserError
from offline_lm.logs import _exact
from offline_lm.logs.hf_datasets import OBJECTS
from offline_lm.store import schema
from offline_lm.types import Episode, Step

_ROWS = 50
"""Episodes that are held before they are written."""


def arrow_schema() -> pa.Schema:
    """The columns of a row: fields of `Episode`, typed as in the store."""
    return pa.schema([(_exact.EXACT, pa.bool_()), *_columns(Episode, schema.EPISODES)])


def _columns(cls: type, table: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(f.name, _type(f.name, table)) for f in fields(cls)]


def _type(name: str, table: pa.Schema) -> pa.DataType:
    if name == "steps":
        return pa.list_(pa.struct(_columns(Step, schema.STEPS)))
    if name in OBJECTS or name not in table.names:  # what the store keeps in `provenance` is text
        return pa.string()
    return table.field(name).type


def row(episode: Episode) -> dict[str, Any]:
    """One row of the dataset."""
    value = _exact.write(episode)
    return _times(_packed(value), episode) | {
        "steps": [_times(_packed(given), step) for given, step in zip(value["steps"], episode.steps, strict=True)]
    }


def _packed(value: dict[str, Any]) -> dict[str, Any]:
    return {name: orjson.dumps(item).decode() if name in OBJECTS else item for name, item in value.items()}


def _times(value: dict[str, Any], item: Episode | Step) -> dict[str, Any]:
    names = [name for name in ("started_at", "ts_start", "ts_end") if name in value]
    return value | {name: getattr(item, name) for name in names}


def filled(episode: Episode) -> list[str]:
    """Columns for which the episode gets a stand-in: none, a null stays null."""
    return []


def write(episodes: Iterable[Episode], folder: Path) -> None:
    """Writes the dataset to `folder`, which must not exist.

    Raises:
        UserError: `datasets` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError("format=datasets needs the package: pip install 'offline_lm[datasets]'") from error

    rows, kind = map(row, episodes), arrow_schema()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".datasets.") as beside:
        file = Path(beside) / "data.arrow"
        with pa.ipc.new_stream(file, kind) as stream:
            while batch := list(islice(rows, _ROWS)):
                stream.write_batch(pa.RecordBatch.from_pylist(batch, schema=kind))
        datasets.Dataset.from_file(str(file)).save_to_disk(folder)
