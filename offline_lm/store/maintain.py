"""Upkeep of a store: small files into large ones, and files that no snapshot needs any more away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.transaction import RemoveAction

from offline_lm.store import commits, schema
from offline_lm.store.tables import Store

TARGET = 100 << 20
"""Bytes of a Parquet file that is large enough."""
_DAY_MS = 24 * 3600 * 1000
RETENTION_HOURS = 7 * 24


class _File(NamedTuple):
    path: str
    size: int
    modified: int
    """milliseconds"""


def compact(store: Store, target: int = TARGET) -> dict[str, dict[str, int]]:
    """Writes the small Parquet files of each table into files of about ``target`` bytes.

    Each new file takes the place of its sources in one commit. Rows of ``steps`` that no episode claims, of ingests
    that died, are left out once they are a day old. The old files stay for time travel until `vacuum`.

    Returns:
        For each table that changed: files before, files after, steps dropped.
    """
    report = {}
    for table in schema.TABLES:
        before = len(store.files(table))
        dropped = 0
        while (rows := _compact_once(store, table, target)) is not None:
            dropped += rows
        if (after := len(store.files(table))) != before:
            report[table] = {"before": before, "after": after, "dropped": dropped}
    return report


def _compact_once(store: Store, table: str, target: int) -> int | None:
    """One new file in place of several; returns the rows dropped, None if there was nothing to do."""
    if not store.exists(table):
        return None
    url = store.table_url(table)
    delta = store.delta(table)
    group = _group(_live(delta), target)
    if not group:
        return None
    claimed = _claimed(store) if table == "steps" else None
    dropped = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal dropped
        for file in group:
            old = file.modified < time.time() * 1000 - _DAY_MS
            for batch in _batches(store, table, file.path):
                kept = batch if claimed is None or not old else batch.filter(_is_claimed(batch, claimed))
                dropped += batch.num_rows - kept.num_rows
                yield kept

    add = commits.write_file(table, url, batches(), data_change=False)
    now = int(time.time() * 1000)
    try:
        commits.commit(
            table, url, delta, [add, *(RemoveAction(f.path, False, now, f.size, {}) for f in group)], {"by": "compact"}
        )
    except commits.Conflict:
        commits.filesystem(url).delete_file(add.path)  # others are writing: look again at what is there now
        return 0
    return dropped


def _live(delta: DeltaTable) -> list[_File]:
    rows = pa.table(delta.get_add_actions(flatten=True)).select(["path", "size_bytes", "modification_time"])
    times = rows["modification_time"].cast(pa.timestamp("ms")).cast(pa.int64()).to_pylist()
    files = zip(rows["path"].to_pylist(), rows["size_bytes"].to_pylist(), times, strict=True)
    return sorted((_File(*file) for file in files), key=lambda file: (file.modified, file.path))


def _group(files: list[_File], target: int) -> list[_File]:
    """The oldest small files that together make about one of ``target`` bytes; at least two, or none."""
    group: list[_File] = []
    for file in files:
        if file.size < target // 2 and sum(f.size for f in group) < target:
            group.append(file)
    return group if len(group) > 1 else []


def _batches(store: Store, table: str, name: str) -> Iterator[pa.RecordBatch]:
    """Row groups of a file with every column of the table: those that an older version lacked are null."""
    kind = schema.TABLES[table]
    with commits.opened(store.table_url(table), name) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, use_threads=False)
            full = [
                rows[f.name].cast(f.type) if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type)
                for f in kind
            ]
            yield from pa.table(full, schema=kind).combine_chunks().to_batches()


def _claimed(store: Store) -> pa.Array:
    keys: set[str] = set()
    for file in store.files("episodes"):
        keys.update(_keys(store.read_file("episodes", file, ["episode_id", "ingest_id"])).to_pylist())
    return pa.array(sorted(keys), pa.string())


def _keys(rows: pa.Table | pa.RecordBatch) -> Any:
    return pc.binary_join_element_wise(rows["episode_id"], rows["ingest_id"], "|")  # type: ignore[attr-defined]


def _is_claimed(batch: pa.RecordBatch, claimed: pa.Array) -> Any:
    return pc.is_in(_keys(batch), value_set=claimed)  # type: ignore[attr-defined]


def vacuum(store: Store, hours: int = RETENTION_HOURS) -> dict[str, int]:
    """Deletes the files that no snapshot of the last ``hours`` needs, and none that a run was trained on.

    Files that no commit knows (of a writer that was killed) go too once they are that old; a younger one may belong
    to a writer at work.

    Returns:
        For each table the number of files deleted.
    """
    kept = _trained_on(store)
    report = {}
    for table in schema.TABLES:
        if not store.exists(table):
            continue
        delta = store.delta(table)
        deleted = delta.vacuum(
            retention_hours=hours,
            dry_run=False,
            enforce_retention_duration=False,
            full=True,
            keep_versions=sorted(v for v in kept.get(table, ()) if v <= delta.version()) or None,
        )
        commits.sync_log(store.table_url(table))
        if deleted:
            report[table] = len(deleted)
    return report


def _trained_on(store: Store) -> dict[str, set[int]]:
    """Versions of each table that any run, finished or not, read."""
    with store.connect() as db:
        rows = db.execute("SELECT store_versions FROM stored_runs WHERE store_versions IS NOT NULL").fetchall()
    versions: dict[str, set[int]] = {}
    for (text,) in rows:
        for table, version in json.loads(text).items():
            versions.setdefault(table, set()).add(version)
    return versions
