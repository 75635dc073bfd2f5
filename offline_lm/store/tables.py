"""`Store`: a folder (or object-store URL) of Delta tables, plus the folders of runs and caches.

Layout: ``STORE/tables/NAME/`` are Delta tables, ``STORE/runs/RUN_ID/`` the files of a run, ``STORE/cache/``
whatever can be computed again. Tables lie in a folder of their own because Delta's vacuum deletes every file
below a table that the table does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from deltalake import ColumnProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import DeltaError

from offline_lm.errors import UserError
from offline_lm.store import schema

if TYPE_CHECKING:
    import duckdb

_UNSAFE = set("%*?[]")
"""deltalake 1.6 decodes or panics on these in a local path, and DuckDB reads them as a glob."""


def _writer(table: str) -> WriterProperties:
    """zstd 1 and row groups of 1,024: fast to write, and a batch of steps is a few row groups to read."""
    plain = ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE")
    return WriterProperties(
        compression="ZSTD",
        compression_level=1,
        max_row_group_size=1024 if table == "steps" else 65_536,
        column_properties=dict.fromkeys(schema.LONG_TEXT.get(table, ()), plain),
    )


@dataclass(frozen=True, slots=True)
class Store:
    """One store; `open` and `create` are the ways to get one. It holds no connection and no lock."""

    url: str
    """Absolute folder, or URL with a scheme that deltalake understands."""

    @classmethod
    def open(cls, url: str | Path) -> Store:
        """The store at ``url``.

        Raises:
            UserError: nothing is there, it is no store, or a newer version of offline_lm wrote it.
        """
        store = cls(_normalise(url))
        if not store._exists("episodes"):
            if store.is_local and not Path(store.url).exists():
                problem = f"no store at {store.url}"
            else:
                problem = f"{store.url} is not a store (it holds no table `episodes`)"
            raise UserError(f"{problem}: run `python -m offline_lm.ingest path=LOGS store={url}` first")
        store._check_version()
        return store

    @classmethod
    def create(cls, url: str | Path) -> Store:
        """Opens the store at ``url``, or makes an empty one there. Raises UserError as `open` does."""
        store = cls(_normalise(url))
        if store.is_local:
            folder = Path(store.url)
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file: a store is a folder")
            if not store._exists("episodes") and folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"{folder} holds other files and is no store: name a new or empty folder")
        store._create_table("episodes")
        store._check_version()
        return store

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    def append(self, table: str, rows: Sequence[Mapping[str, Any]] | pa.Table) -> None:
        """Appends ``rows`` to ``table`` as one Delta commit: all of them become visible, or none.

        Columns that are missing become null. In ``runs`` a missing ``written_at`` becomes the present time.

        Raises:
            ValueError: a column that the table does not have.
            pyarrow.ArrowInvalid, pyarrow.ArrowTypeError: a value that does not fit its column.
        """
        data = _as_table(table, rows)
        if data.num_rows == 0:
            return
        self._create_table(table)
        write_deltalake(
            self._table_url(table),
            data,
            mode="append",
            schema_mode="merge",  # a store of an older version gains the new columns
            writer_properties=_writer(table),
        )

    def files(self, table: str) -> list[str]:
        """Parquet files of the newest snapshot of ``table``: absolute paths, or URLs. Empty: no rows yet."""
        _known(table)
        if not self._exists(table):
            return []
        uris = self._delta(table).file_uris()
        if not self.is_local:
            return uris
        # deltalake percent-encodes the folder of a local table; the file's own name is always plain.
        return [f"{self._table_url(table)}/{uri.rsplit('/', 1)[1]}" for uri in uris]

    def versions(self) -> dict[str, int]:
        """Delta version of each table that exists: together they name a snapshot of the store."""
        return {table: self._delta(table).version() for table in schema.TABLES if self._exists(table)}

    def connect(self) -> duckdb.DuckDBPyConnection:
        """A fresh DuckDB connection to the present snapshot; see `offline_lm.store.connect`."""
        from offline_lm.store.connect import connect_store

        return connect_store(self)

    def run_dir(self, run_id: str) -> Path:
        """``STORE/runs/RUN_ID`` (not created). Raises UserError for a remote store."""
        return self._folder("run_dir=FOLDER") / "runs" / run_id

    @property
    def cache_dir(self) -> Path:
        """``STORE/cache`` (not created). Raises UserError for a remote store."""
        return self._folder("a local copy of the store") / "cache"

    def resolve_run(self, name: str) -> str:
        """The run id that ``name`` means: itself, or for ``latest`` the newest finished run.

        Raises:
            UserError: no run has that id (the message lists the known ones), or none is finished.
        """
        with self.connect() as db:
            runs = db.execute("SELECT run_id, status FROM runs ORDER BY written_at DESC, run_id").fetchall()
        finished = [run_id for run_id, status in runs if status == "finished"]
        if name == "latest" and finished:
            return finished[0]
        if name in (run_id for run_id, _ in runs):
            return name
        if not runs:
            raise UserError(f"no run in {self.url}: run `python -m offline_lm.fit data.store={self.url}` first")
        known = ", ".join(f"{run_id} ({status})" for run_id, status in runs[:10])
        problem = "no run is finished" if name == "latest" else f"no run `{name}`"
        raise UserError(f"{problem} in {self.url}; known, newest first: {known}")

    def _folder(self, instead: str) -> Path:
        if not self.is_local:
            raise UserError(f"{self.url} is remote and has no folders of its own: give {instead}")
        return Path(self.url)

    def _table_url(self, table: str) -> str:
        return f"{self.url}/tables/{table}"

    def _exists(self, table: str) -> bool:
        return DeltaTable.is_deltatable(self._table_url(table))

    def _delta(self, table: str) -> DeltaTable:
        try:
            return DeltaTable(self._table_url(table))
        except DeltaError as error:
            raise UserError(f"{self._table_url(table)}: its log cannot be read: {error}") from error

    def _create_table(self, table: str) -> None:
        if self._exists(table):
            return
        if self.is_local:
            Path(self._table_url(table)).mkdir(parents=True, exist_ok=True)
        DeltaTable.create(
            self._table_url(table),
            schema.TABLES[table],
            mode="ignore",
            name=table,
            configuration={
                schema.VERSION_KEY: str(schema.SCHEMA_VERSION),
                "delta.dataSkippingStatsColumns": schema.stats_columns(table),
            },
            raise_if_key_not_exists=False,
        )

    def _check_version(self) -> None:
        metadata = self._delta("episodes").metadata()
        version = metadata.configuration.get(schema.VERSION_KEY)
        if version is None:
            raise UserError(f"{self.url}: its table `episodes` was not written by offline_lm")
        if int(version) > schema.SCHEMA_VERSION:
            raise UserError(
                f"{self.url} has schema version {version}, this offline_lm knows {schema.SCHEMA_VERSION}: "
                "upgrade offline_lm"
            )


def _normalise(url: str | Path) -> str:
    text = str(url)
    if urlsplit(text).scheme == "file":
        text = unquote(urlsplit(text).path)
    elif "://" in text:
        return text.rstrip("/")
    if not text:
        raise UserError("store= is empty: name a folder")
    path = str(Path(text).expanduser().absolute())
    if bad := _UNSAFE & set(path):
        raise UserError(f"store path {path} has {' '.join(sorted(bad))} in it: name a folder without")
    return path


def _known(table: str) -> pa.Schema:
    if table not in schema.TABLES:
        raise ValueError(f"no table `{table}`; there are {', '.join(schema.TABLES)}")
    return schema.TABLES[table]


def _as_table(table: str, rows: Sequence[Mapping[str, Any]] | pa.Table) -> pa.Table:
    want = _known(table)
    if isinstance(rows, Sequence):
        names, count = list(dict.fromkeys(name for row in rows for name in row)), len(rows)
    else:
        names, count = rows.column_names, rows.num_rows
    if unknown := [name for name in names if name not in want.names]:
        raise ValueError(f"no column {', '.join(unknown)} in table `{table}`: {', '.join(want.names)}")
    if isinstance(rows, Sequence):
        columns = {name: pa.array([row.get(name) for row in rows], want.field(name).type) for name in names}
    else:
        columns = {name: rows[name] for name in names}
    if table == "runs" and "written_at" not in columns:
        columns["written_at"] = pa.array([datetime.now(UTC)] * count, want.field("written_at").type)
    return pa.table(
        [
            columns[field.name].cast(field.type) if field.name in columns else pa.nulls(count, field.type)
            for field in want
        ],
        schema=want,
    )
