"""DuckDB over a store: a view for each table, a few joined ones, and the macros of `macros.sql`.

Files are read from the Delta snapshot's own list; no extension is downloaded. A connection sees the snapshot
of the moment it was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from offline_lm.errors import UserError
from offline_lm.store import schema
from offline_lm.store.tables import Store


def connect(url: str | Path) -> duckdb.DuckDBPyConnection:
    """A connection to the store at ``url`` with every view and macro.

    Raises:
        UserError: no store there, or one of its Parquet files cannot be read.
    """
    return connect_store(Store.open(url))


def connect_store(store: Store) -> duckdb.DuckDBPyConnection:
    """As `connect`, for a store that is open already."""
    db = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    try:
        db.execute("SET parquet_metadata_cache = true; SET enable_progress_bar = false; SET TimeZone = 'UTC'")
        with explained(store):
            for table, paths in _files(db, store).items():
                db.execute(f"CREATE VIEW {_stored(table)} AS {_select(table, paths)}")
            sql = files("offline_lm.store")
            db.execute(sql.joinpath("views.sql").read_text(encoding="utf-8"))
            db.execute(sql.joinpath("macros.sql").read_text(encoding="utf-8"))
    except BaseException:
        db.close()
        raise
    return db


def _files(db: duckdb.DuckDBPyConnection, store: Store) -> dict[str, list[str]]:
    """The files of every table; ``db`` is given the means to read those of an object store."""
    if store.is_local:
        return {table: store.files(table) for table in schema.TABLES}
    try:
        from offline_lm.store._remote import ObjectStore
    except ModuleNotFoundError:
        raise UserError(f"store={store.url} needs `pip install 'offline_lm[s3]'`") from None
    sizes = {table: store.sizes(table) for table in schema.TABLES}
    db.register_filesystem(ObjectStore(store.url, {file: n for files in sizes.values() for file, n in files.items()}))
    return {table: list(files) for table, files in sizes.items()}


@contextmanager
def explained(store: Store) -> Iterator[None]:
    """Turns a DuckDB error into a UserError that names the file, if a file of ``store`` is at fault.

    Files are looked at only after an error. Other errors pass unchanged.
    """
    try:
        yield
    except duckdb.Error as error:
        if broken := store.is_local and _first_broken(store):
            raise UserError(f"{broken[0]} cannot be read ({broken[1]}): restore it or ingest again") from error
        raise


def _first_broken(store: Store) -> tuple[str, str] | None:
    for table in schema.TABLES:
        for file in store.files(table):
            try:
                with pq.ParquetFile(file) as parquet:
                    for group in range(parquet.num_row_groups):
                        parquet.read_row_group(group)
            except (OSError, pa.ArrowException) as error:
                return file, str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return None


def _stored(table: str) -> str:
    """Name of the view over the files alone; `views.sql` builds what users see from these."""
    return f"stored_{table}"


def _select(table: str, paths: list[str]) -> str:
    """Rows of the files after an empty relation with every column, so that absent columns are null.

    Times become plain TIMESTAMP in UTC: DuckDB's TIMESTAMPTZ cannot come to Python without pytz, and would
    print in the time zone of the reader.
    """
    names = {field.name: duckdb_type(field.type) for field in schema.TABLES[table]}
    empty = ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in names.items())
    sql = f"SELECT {empty} WHERE false"
    if paths:
        listed = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
        sql += f" UNION ALL BY NAME SELECT * FROM read_parquet([{listed}], union_by_name = true)"
    times = [name for name, kind in names.items() if kind == "TIMESTAMPTZ"]
    if times:
        replaced = ", ".join(f"{name} AT TIME ZONE 'UTC' AS {name}" for name in times)
        return f"SELECT * REPLACE ({replaced}) FROM ({sql})"
    return sql


def duckdb_type(kind: pa.DataType) -> str:
    """DuckDB's name for an Arrow type of our schemas."""
    if pa.types.is_list(kind):
        return duckdb_type(kind.value_type) + "[]"
    if pa.types.is_struct(kind):
        return "STRUCT(" + ", ".join(f'"{field.name}" {duckdb_type(field.type)}' for field in kind) + ")"
    if pa.types.is_timestamp(kind):
        return "TIMESTAMPTZ"
    names = {"string": "VARCHAR", "large_string": "VARCHAR", "double": "DOUBLE", "bool": "BOOLEAN"}
    return names.get(str(kind)) or {"int64": "BIGINT", "int32": "INTEGER"}[str(kind)]
