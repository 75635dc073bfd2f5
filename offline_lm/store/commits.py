"""How rows become durable: a Parquet file, then one entry in the Delta log, each on the disk before the next.

`deltalake` writes neither with fsync, and resolves conflicts between appends by letting both stand. So the file is
written here, the commit is tried once, and whoever lost starts again from what the winner committed.

A test can kill the process at a named point: ``OFFLINE_LM_FAILPOINT=episodes.committed:3`` sends SIGKILL when the
point ``episodes.committed`` is reached the third time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties
from deltalake.exceptions import CommitFailedError
from deltalake.fs import DeltaStorageHandler
from deltalake.transaction import AddAction, RemoveAction
from pyarrow import fs

from offline_lm.store import schema

ROW_GROUP = 1024
"""Rows of ``steps`` in a row group: a batch of training steps is a few row groups to read."""
ROW_GROUP_BYTES = 64 << 20

_DIGEST = re.compile(r"\.([0-9a-f]{32})\.parquet$")
_synced: dict[str, str] = {}
"""Log folder -> the newest entry of it that this process has made durable."""
_reached: Counter[str] = Counter()


class Conflict(Exception):
    """Another process committed first: what was to be committed may be wrong now."""


def reach(point: str) -> None:
    """A point at which a test may kill this process (see the module)."""
    if wanted := os.environ.get("OFFLINE_LM_FAILPOINT"):
        name, _, count = wanted.partition(":")
        _reached[point] += 1
        if name == point and _reached[point] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def filesystem(url: str) -> fs.FileSystem:
    """The files below the folder or URL of a table; for a URL with the credentials that `deltalake` uses."""
    if "://" in url:
        return fs.PyFileSystem(DeltaStorageHandler(url))
    return fs.SubTreeFileSystem(url, fs.LocalFileSystem())


@contextmanager
def opened(url: str, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file below `url`, to be read with `use_threads=False`, in the calling thread alone.

    One of pyarrow's own threads that still lets go of a file written in Python (that of an object store) while Python
    ends aborts the process.
    """
    with filesystem(url).open_input_file(name) as stream, pq.ParquetFile(stream, pre_buffer=False) as parquet:
        yield parquet


def write_file(table: str, url: str, batches: Iterable[pa.RecordBatch], *, data_change: bool = True) -> AddAction:
    """Writes one Parquet file of `table` below `url`, on the disk when this returns; no snapshot has it yet.

    Without `data_change` the rows are those of other files in another arrangement.

    If it fails, a full disk say, nothing of the file is left.
    """
    kind = schema.TABLES[table]
    name = f"part-{uuid.uuid4()}.parquet"
    files = filesystem(url)
    reach(f"{table}.begun")
    rows = 0
    try:
        with (
            files.open_output_stream(name, buffer_size=1 << 20) as sink,
            pq.ParquetWriter(sink, kind, **_parquet(table)) as writer,
        ):
            for batch in batches:
                for part in _row_groups(table, batch):
                    writer.write_batch(part)
                    rows += part.num_rows
        size = files.get_file_info(name).size
        if "://" not in url:
            sync(Path(url, name))
            final = name.replace(".parquet", f".{digest_of(Path(url, name))}.parquet")
            files.move(name, final)
            name = final
            sync(Path(url))
    except BaseException:
        if files.get_file_info(name).type != fs.FileType.NotFound:
            files.delete_file(name)
        raise
    reach(f"{table}.written")
    return AddAction(name, size, {}, int(time.time() * 1000), data_change, json.dumps({"numRecords": rows}))


def commit(
    table: str, url: str, delta: DeltaTable, actions: Sequence[AddAction | RemoveAction], note: dict[str, str]
) -> None:
    """One entry after the version that `delta` was opened at: durable when this returns.

    The entry before it may be another process's, which has not made it durable yet; ours would be lost with it. So
    every entry that this process has not seen on the disk yet is synced.

    Raises:
        Conflict: another entry has that place.
    """
    before = delta.version()
    try:
        delta.create_write_transaction(
            list(actions),
            mode="append",
            schema=schema.TABLES[table],
            commit_properties=CommitProperties(custom_metadata=note, max_commit_retries=0),
            # The log is what time travel reads: 30 days, the default, are not ten years.
            post_commithook_properties=PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False),
        )
    except CommitFailedError as error:
        delta.update_incremental()
        if delta.version() == before:  # not a conflict: a full disk, say
            raise
        raise Conflict(str(error)) from error
    reach(f"{table}.committed")
    sync_log(url)
    reach(f"{table}.synced")


def sync_log(url: str) -> None:
    """Makes the log of a local table durable."""
    if "://" in url:
        return
    log = Path(url, "_delta_log")
    last = _synced.get(str(log), "")
    # Versions sort by name; `_last_checkpoint` sorts after them and is written again and again.
    entries = sorted(name for name in os.listdir(log) if name > last and (log / name).is_file())
    for name in entries:
        sync(log / name)
    sync(log)
    if versions := [name for name in entries if name[0].isdigit()]:
        _synced[str(log)] = versions[-1]


def digest_of(path: Path) -> str:
    """128 bits of the SHA-256 of a file; `write_file` puts them into its name."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def digest_in(name: str) -> str | None:
    """The digest in the name of a data file; None for files of other writers, and of object stores."""
    found = _DIGEST.search(name)
    return found[1] if found else None


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parquet(table: str) -> dict[str, Any]:
    """zstd 1, with checksums; neither dictionaries nor statistics of long text, which cost much and help nobody."""
    long = schema.LONG_TEXT.get(table, ())
    columns = [name for name in schema.TABLES[table].names if name not in long]
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": columns,
        "write_statistics": columns,
        "write_page_checksum": True,
    }


def _row_groups(table: str, batch: pa.RecordBatch) -> Iterable[pa.RecordBatch]:
    """`batch` in pieces of at most ROW_GROUP rows (of other tables 64 times as many) and about ROW_GROUP_BYTES."""
    rows = ROW_GROUP if table == "steps" else 64 * ROW_GROUP
    if batch.num_rows:
        rows = max(1, min(rows, int(ROW_GROUP_BYTES / (batch.nbytes / batch.num_rows + 1))))
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))
