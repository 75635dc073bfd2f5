"""`Store`: a folder (or object-store URL) of Delta tables, plus the folders of runs and caches.

Layout: ``STORE/tables/NAME/`` are Delta tables, ``STORE/runs/RUN_ID/`` the files of a run, ``STORE/cache/``
whatever can be computed again. Tables lie in a folder of their own because Delta's vacuum deletes every file
below a table that the table does not know.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError
from pyarrow import fs

from offline_lm.errors import UserError
from offline_lm.store import commits, schema

if TYPE_CHECKING:
    import duckdb

_UNSAFE = set("%*?[]")
"""deltalake 1.6 decodes or panics on these in a local path, and DuckDB reads them as a glob."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

ATTEMPTS = 200
"""How often a commit is tried before a writer gives up; each failure means that another writer succeeded."""


@dataclass(frozen=True, slots=True)
class Store:
    """One store; `open` and `create` are the ways to get one. It holds no connection and no lock."""

    url: str
    """Absolute folder, or URL with a scheme that deltalake understands."""
    pinned: Mapping[str, int] = field(default_factory=dict)
    """Tables that are read at an older version; all others at their newest."""

    @classmethod
    def open(cls, url: str | Path, version: int | str | None = None) -> Store:
        """The store at ``url``, now or as it was.

        Args:
            version: of the table ``episodes`` (`versions` tells the present one), which decides what can be seen; or
                the id of a run: what that run was trained on.

        Raises:
            UserError: nothing is there, it is no store, a newer version of offline_lm wrote it, or it has no such
            version (any more).
        """
        store = cls(_normalise(url))
        if not store.exists("episodes"):
            if store.is_local and not Path(store.url).exists():
                problem = f"no store at {store.url}"
            else:
                problem = f"{store.url} is not a store (it holds no table `episodes`)"
            raise UserError(f"{problem}: run `python -m offline_lm.ingest path=LOGS store={url}` first")
        store._check_version()
        return store if version is None else store.at(version)

    def at(self, version: int | str) -> Store:
        """This store as it was; see `open`."""
        if isinstance(version, str) and not version.isdecimal():
            pinned = self._versions_of_run(version)
        else:
            pinned = {"episodes": int(version)}
        store = replace(self, pinned=pinned)
        for table in pinned:
            names = [file.rsplit("/", 1)[1] for file in store.files(table)]
            if any(info.type == fs.FileType.NotFound for info in _infos(self.table_url(table), names)):
                raise UserError(f"version {pinned[table]} of {table} in {self.url} is gone: it was vacuumed away")
        return store

    def frozen(self) -> Store:
        """This store with episodes and steps held at their present version, whatever others add meanwhile."""
        versions = self.versions()
        return replace(self, pinned={table: versions[table] for table in ("episodes", "steps") if table in versions})

    @classmethod
    def at_url(cls, url: str | Path) -> Store:
        """A Store for ``url`` of which nothing was looked at: it may be damaged, or not there."""
        return cls(_normalise(url))

    @classmethod
    def create(cls, url: str | Path) -> Store:
        """Opens the store at ``url``, or makes an empty one there. Raises UserError as `open` does."""
        store = cls(_normalise(url))
        if store.is_local:
            folder = Path(store.url)
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file: a store is a folder")
            # `exists` last: what is there may be another process's store, made a moment ago
            if folder.is_dir() and _strangers(folder) and not store.exists("episodes"):
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
        if data.num_rows:
            self.append_checked(table, lambda _: data)

    def append_checked(self, table: str, make: Callable[[Sequence[str]], pa.Table | None]) -> None:
        """Appends what ``make(files)`` returns, if the snapshot with these files is still the newest when it commits.

        Where another process commits first, ``make`` is asked again with the new files. So what it found out about
        the table (that an episode is not in it, say) holds in the snapshot that the rows become part of.

        Args:
            make: from the Parquet files of the newest snapshot to the rows to append; None or no rows append nothing.

        Raises:
            UserError: the disk is full, or other writers were faster ATTEMPTS times.
        """
        self._create_table(table)
        url = self.table_url(table)
        data = add = None
        try:
            for attempt in range(ATTEMPTS):
                delta = self.delta(table)
                made = make(self._uris(table, delta))
                if made is not data and add is not None:
                    commits.filesystem(url).delete_file(add.path)
                    add = None
                data = made
                if data is None or data.num_rows == 0:
                    return
                add = add or commits.write_file(table, url, data.to_batches())
                try:
                    commits.commit(table, url, delta, [add], {})
                    return
                except commits.Conflict:
                    time.sleep(random.uniform(0, min(0.5, 0.005 * 2**attempt)))
        except (OSError, DeltaError) as error:
            raise UserError(f"{url} cannot be written ({error}): nothing of this commit is kept") from error
        raise UserError(f"{url}: other writers were faster {ATTEMPTS} times; run it again")

    def files(self, table: str) -> list[str]:
        """Parquet files of the snapshot of ``table``: absolute paths, or URLs. Empty: no rows yet."""
        _known(table)
        if not self.exists(table):
            return []
        return self._uris(table, self.delta(table, self.pinned.get(table)))

    def sizes(self, table: str) -> dict[str, int]:
        """Bytes of each of the `files` of ``table``."""
        if not self.exists(table):
            return {}
        rows = pa.table(self.delta(table, self.pinned.get(table)).get_add_actions(flatten=True))
        files = [f"{self.table_url(table)}/{path}" for path in rows["path"].to_pylist()]
        return dict(zip(files, rows["size_bytes"].to_pylist(), strict=True))

    def read_file(self, table: str, file: str, columns: list[str]) -> pa.Table:
        """Columns of one of the `files` of ``table``; those that it lacks, being older, are absent."""
        with commits.opened(self.table_url(table), file.rsplit("/", 1)[1]) as parquet:
            return parquet.read([name for name in columns if name in parquet.schema_arrow.names], use_threads=False)

    def _uris(self, table: str, delta: DeltaTable) -> list[str]:
        uris = delta.file_uris()
        if not self.is_local:
            return uris
        # deltalake percent-encodes the folder of a local table; the file's own name is always plain.
        return [f"{self.table_url(table)}/{uri.rsplit('/', 1)[1]}" for uri in uris]

    def versions(self) -> dict[str, int]:
        """Delta version of each table that exists: together they name a snapshot of the store."""
        newest = {table: self.delta(table).version() for table in schema.TABLES if self.exists(table)}
        return {**newest, **self.pinned}

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

    def table_url(self, table: str) -> str:
        """Folder or URL of the Delta table."""
        return f"{self.url}/tables/{table}"

    def exists(self, table: str) -> bool:
        """Whether ``table`` was ever written to. Raises UserError if an object store does not answer."""
        try:
            return DeltaTable.is_deltatable(self.table_url(table))
        except OSError as error:
            if self.is_local:
                raise
            told = " ".join(_COLOUR.sub("", str(error)).split())
            raise UserError(
                f"{self.url} cannot be read: is the bucket there, and are credentials set? {told}"
            ) from None

    def delta(self, table: str, version: int | None = None) -> DeltaTable:
        """The Delta table ``table``, at its newest version if none is given. Raises UserError."""
        url = self.table_url(table)
        try:
            return DeltaTable(url, version=version)
        except DeltaError as error:
            if version is not None:
                newest = DeltaTable(url).version()
                if not 0 <= version <= newest:
                    raise UserError(
                        f"{self.url}: version {version} of {table} does not exist; the newest is {newest}"
                    ) from error
            raise UserError(
                f"{url}: its log cannot be read ({error}); run `python -m offline_lm.doctor store={self.url}`"
            ) from error

    def _versions_of_run(self, name: str) -> dict[str, int]:
        run_id = self.resolve_run(name)
        with self.connect() as db:
            row = db.execute("SELECT store_versions FROM runs WHERE run_id = ?", [run_id]).fetchone()
        versions = json.loads(row[0]) if row and row[0] else {}
        return {table: versions[table] for table in ("episodes", "steps") if table in versions}

    def _create_table(self, table: str) -> None:
        """Makes the table if there is none; gives one of an older version the columns that it lacks."""
        url = self.table_url(table)
        if self.exists(table):
            delta = self.delta(table)
            have = {column.name for column in delta.schema().fields}
            if lacking := [
                column for column in Schema.from_arrow(schema.TABLES[table]).fields if column.name not in have
            ]:
                delta.alter.add_columns(lacking)
            return
        if self.is_local:
            Path(url).mkdir(parents=True, exist_ok=True)
        _create(table, url)
        if self.is_local:
            commits.sync_log(url)
            for folder in (Path(url), *list(Path(url).parents)[:3]):  # table, tables, store, and where that was made
                commits.sync(folder)

    def _check_version(self) -> None:
        metadata = self.delta("episodes").metadata()
        version = metadata.configuration.get(schema.VERSION_KEY)
        if version is None:
            raise UserError(f"{self.url}: its table `episodes` was not written by offline_lm")
        if int(version) > schema.SCHEMA_VERSION:
            raise UserError(
                f"{self.url} has schema version {version}, this offline_lm knows {schema.SCHEMA_VERSION}: "
                "upgrade offline_lm"
            )


@dataclass(frozen=True, slots=True)
class OpenStore(Store):
    """A store that keeps what it read of the logs of its tables: of the next commit it reads only what is new.

    For many small commits, such as one an episode: reading a log again is most of what each costs. One thread's alone.
    """

    tables: dict[str, DeltaTable] = field(default_factory=dict)

    def delta(self, table: str, version: int | None = None) -> DeltaTable:
        if version is not None:
            return Store.delta(self, table, version)
        if table in self.tables:
            self.tables[table].update_incremental()
        else:
            self.tables[table] = Store.delta(self, table)
        return self.tables[table]

    def _create_table(self, table: str) -> None:
        if table not in self.tables:
            Store._create_table(self, table)


def _create(table: str, url: str) -> None:
    DeltaTable.create(
        url,
        schema.TABLES[table],
        mode="ignore",
        name=table,
        configuration={
            schema.VERSION_KEY: str(schema.SCHEMA_VERSION),
            "delta.dataSkippingStatsColumns": schema.stats_columns(table),
        },
        raise_if_key_not_exists=False,
    )


def first_entry(table: str) -> str:
    """The first entry of the log of a table: protocol, schema, configuration."""
    with tempfile.TemporaryDirectory() as folder:
        _create(table, folder)
        return Path(folder, "_delta_log", f"{0:020}.json").read_text(encoding="utf-8")


def _normalise(url: str | Path) -> str:
    text = str(url)
    if urlsplit(text).scheme == "file":
        text = unquote(urlsplit(text).path)
    if not text:
        raise UserError("store= is empty: name a folder")
    path = text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute())
    if bad := _UNSAFE & set(path):
        raise UserError(f"store path {path} has {' '.join(sorted(bad))} in it: name a folder without")
    return path


def _infos(url: str, names: list[str]) -> list[fs.FileInfo]:
    return commits.filesystem(url).get_file_info(names) if names else []


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


def _strangers(folder: Path) -> bool:
    """Whether a folder holds anything but tables, of which another process may be making the first."""
    tables = folder / "tables"
    if any(path != tables for path in folder.iterdir()):
        return True
    return tables.is_dir() and any(path.name not in schema.TABLES for path in tables.iterdir())
