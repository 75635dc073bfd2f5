"""Hugging Face `datasets`: a folder of ``Dataset.save_to_disk`` (or of a DatasetDict: one such folder a split).

Layout: ``dataset_info.json``, ``state.json`` and files ``data-*.arrow``, Arrow streams. A row is one episode, an
object of the `jsonl` format; its nested objects may be JSON text (`OBJECTS`), its times Arrow timestamps. The files
are read with pyarrow, batch by batch, by a child process (`_child`); `datasets` is not needed, and none of its code
runs. Rows are taken as they lie on disk: `select` or `filter` writes them anew when it saves, so there is no map of
indices to follow; the files ``cache-*.arrow`` that `datasets` leaves in a folder that it worked on are none of its
rows.

The dataset is named by its folder; ``source_offset`` and the offset of a Rejected are the index of the row.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa

from offline_lm.logs import _child, _exact, _files
from offline_lm.logs._adapters import Sample, damaged, rejected
from offline_lm.logs._child import Item
from offline_lm.logs._files import MAX_BYTES, Damaged, Record, TooLarge
from offline_lm.logs._records import Bad, parse
from offline_lm.logs.jsonl import _episode as to_episode
from offline_lm.types import Episode, Rejected

SOURCE = "hf_datasets"
OBJECTS = ("sampling", "screenshot", "action_args", "target", "extra")
"""Objects of no fixed shape."""
_INFO, _STATE = "dataset_info.json", "state.json"


def detect(sample: Sample) -> str | None:
    if {_INFO, _STATE} <= sample.names and any(name.endswith(".arrow") for name in sample.names):
        return f"a folder with {_INFO} and Arrow files, as Dataset.save_to_disk writes"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find_folders(path, lambda folder: (folder / _STATE).is_file(), f"saved dataset ({_STATE})")


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every row of the saved datasets at or below `path`. Raises UserError if there is none."""
    return chain.from_iterable(_read_folder(folder) for folder in find(path))


def _read_folder(folder: Path) -> Iterator[Episode | Rejected]:
    """The files that ``state.json`` lists, in its order."""
    try:
        files = _listed(folder)
    except Bad as bad:
        yield rejected(SOURCE, folder / _STATE, bad)
        return
    index = 0
    for file in files:
        for row in _child.read(file, read_rows):
            if isinstance(row, Damaged):
                yield damaged(SOURCE, file, row, index)
                break
            data = b""
            try:
                if not isinstance(row, Record):
                    raise row[1]
                data = row.data
                value = _unpacked(parse(data), index)
                episode = to_episode(value, row._replace(offset=index), str(file), folder.name)
                yield episode if _exact.is_exact(value) else replace(episode, source=SOURCE)
            except Bad as bad:
                yield rejected(SOURCE, file, bad, index, data)
            index += 1


def _listed(folder: Path) -> list[Path]:
    data, more = _files.whole(folder / _STATE)
    state = None if more else parse(data)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list) or not listed:
        raise Bad("missing_key", f"{_STATE} has no _data_files; save the dataset again")
    names = [item.get("filename") if isinstance(item, dict) else None for item in listed]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise Bad("bad_value", f"{_STATE} lists {str(name)[:50]!r}, which is no file of its folder")
    return [folder / str(name) for name in names]


def read_rows(stream: IO[bytes]) -> Iterator[Item]:
    """Every row of an Arrow stream as JSON; `_child` runs it, for compressed batches may be of any size."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    index = 0
    try:
        with pa.ipc.open_stream(_Capped(stream, size)) as reader:
            for batch in reader:
                batch.validate(full=True)
                for i in range(batch.num_rows):
                    try:
                        data = _json(batch.slice(i, 1))
                        yield Record(index, data, hashlib.sha256(data).hexdigest(), False)
                    except Bad as bad:
                        yield index, bad
                    index += 1
    except MemoryError:
        yield TooLarge("a batch needs more memory than it may have; save the dataset in smaller ones")
    except (OSError, UnicodeDecodeError, ValueError, pa.ArrowException) as error:
        yield Damaged(str(error).splitlines()[0] if str(error) else type(error).__name__)


def _json(row: pa.RecordBatch) -> bytes:
    if row.nbytes > MAX_BYTES:
        raise Bad("too_large", f"the row is longer than {MAX_BYTES} bytes; shorten its pages")
    try:
        data = orjson.dumps(row.to_pylist()[0], default=_refuse)
    except (TypeError, ValueError, OverflowError) as error:  # bytes, an integer over 64 bits, a time without a date
        raise Bad("wrong_type", f"the row cannot be said in JSON: {error}") from None
    if len(data) > MAX_BYTES:
        raise Bad("too_large", f"the row is longer than {MAX_BYTES} bytes; shorten its pages")
    return data


class _Capped(io.RawIOBase):
    """A stream of which nobody gets more than `size` bytes: a damaged length would have Python make room for it."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self.stream, self.size = stream, size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.stream.read(self.size if size < 0 else min(size, self.size))


def _refuse(value: Any) -> Any:
    raise TypeError(type(value).__name__)


def _unpacked(row: Any, index: int) -> Any:
    """The row as a ``jsonl`` object: JSON text parsed, and what Arrow adds to structs, nulls, left out."""
    if type(row) is not dict:
        return row
    value = _objects(row, "")
    if type(steps := value.get("steps")) is list:
        value["steps"] = [
            _objects(step, f"steps[{i}].") if type(step) is dict else step for i, step in enumerate(steps)
        ]
        if not _exact.is_exact(value):
            value["steps"] = [
                {"source_offset": index} | step if type(step) is dict else step for step in value["steps"]
            ]
    return value


def _objects(value: dict[str, Any], place: str) -> dict[str, Any]:
    known = {name: item for name, item in value.items() if item is not None}
    for name in OBJECTS:
        if type(item := known.get(name)) is str:
            try:
                known[name] = parse(item.encode())
            except Bad as bad:
                raise Bad(bad.reason, f"{place}{name}: {bad.message}") from None
        elif type(item) is dict:
            known[name] = {key: inner for key, inner in item.items() if inner is not None}
    return known
