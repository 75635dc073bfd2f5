import datetime
import io
import threading
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from offline_lm.errors import UserError
from offline_lm.store import Store, commits, connect, schema
from offline_lm.types import Candidate, Episode, Label, Step

INSIDE_PROVENANCE = {"native_id", "uri", "sha256", "licence", "adapter_version"}


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "a store é")


def names(record):
    return {f.name for f in fields(record)}


def test_schema_mirrors_types():
    assert set(schema.STEPS.names) == names(Step) | {"episode_id", "ingest_id"}
    own = {"episode_id", "content_hash", "ingest_id", "n_steps", "provenance"}
    assert set(schema.EPISODES.names) == names(Episode) - {"steps"} - INSIDE_PROVENANCE | own
    assert {f.name for f in schema.CANDIDATE} == names(Candidate)
    assert {f.name for f in schema.LABEL} == names(Label)
    assert {f.name for f in schema.PROVENANCE} == INSIDE_PROVENANCE | {"adapter"}


def test_every_view_has_its_columns_when_empty(store):
    db = store.connect()
    for table, kind in schema.TABLES.items():
        hidden = {"ingest_id"} if table == "steps" else set()
        assert set(db.sql(f'FROM "{table}"').columns) == set(kind.names) - hidden
        assert db.sql(f'FROM "{table}"').fetchall() == []
    assert db.sql("FROM run_values").fetchall() == []


def test_append_fills_missing_columns_with_null_and_reads_back(store):
    store.append("metrics", [{"run_id": "r", "name": "loss", "value": 1}, {"run_id": "r", "step": 3}])
    assert store.connect().sql("FROM metrics ORDER BY step").fetchall() == [
        ("r", 3, None, None),
        ("r", None, "loss", 1.0),
    ]


def test_append_takes_a_table_and_refuses_unknown_columns(store):
    store.append("metrics", pa.table({"run_id": ["r"], "step": [1]}))
    with pytest.raises(ValueError, match="no column oops"):
        store.append("metrics", [{"run_id": "r", "oops": 1}])
    with pytest.raises(ValueError, match="no column oops"):
        store.append("metrics", pa.table({"oops": [1]}))
    with pytest.raises(ValueError, match="no table `nope`"):
        store.append("nope", [])
    assert store.connect().sql("SELECT count(*) FROM metrics").fetchall() == [(1,)]


def test_an_append_is_one_commit_and_files_exist(store):
    before = store.versions()
    store.append("metrics", [{"run_id": "r"}] * 3)
    store.append("metrics", [])
    assert before == {"episodes": 0}
    assert store.versions() == {"episodes": 0, "metrics": 1}
    (file,) = store.files("metrics")
    assert pq.ParquetFile(file).metadata.num_rows == 3


def test_steps_are_written_in_row_groups_without_dictionaries_of_text(store):
    store.append("steps", [{"episode_id": "e", "step": i, "observation": "same page"} for i in range(3000)])
    metadata = pq.ParquetFile(store.files("steps")[0]).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1024, 1024, 952]
    column = {
        metadata.row_group(0).column(i).path_in_schema: metadata.row_group(0).column(i)
        for i in range(metadata.num_columns)
    }
    assert column["observation"].compression == "ZSTD"
    assert "RLE_DICTIONARY" not in column["observation"].encodings
    assert "RLE_DICTIONARY" in column["episode_id"].encodings


def test_schema_version_is_in_the_table_and_a_newer_one_is_refused(store, monkeypatch):
    configuration = DeltaTable(f"{store.url}/tables/episodes").metadata().configuration
    assert configuration["offline_lm.schema_version"] == "1"
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 0)
    with pytest.raises(UserError, match="schema version 1"):
        Store.open(store.url)


def test_columns_that_old_files_lack_are_null(store, monkeypatch):
    old = pa.schema([field for field in schema.METRICS if field.name != "value"])
    with monkeypatch.context() as patch:
        patch.setitem(schema.TABLES, "metrics", old)
        store.append("metrics", [{"run_id": "old"}])
    assert store.connect().sql("SELECT run_id, value FROM metrics").fetchall() == [("old", None)]
    store.append("metrics", [{"run_id": "new", "value": 2.0}])
    rows = store.connect().sql("SELECT run_id, value FROM metrics ORDER BY run_id").fetchall()
    assert rows == [("new", 2.0), ("old", None)]


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"no store at .*nowhere.*offline_lm.ingest"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a store"):
        connect(tmp_path)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match="holds other files"):
        Store.create(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        Store.create(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match=r"has \* in it"):
        Store.create(tmp_path / "a*")


def test_a_corrupt_file_is_named(store):
    store.append("metrics", [{"run_id": "r"}])
    (file,) = store.files("metrics")
    with open(file, "r+b") as broken:
        broken.truncate(20)
    with pytest.raises(UserError, match=r"part-.*\.parquet cannot be read"):
        store.connect()


def test_a_missing_file_is_named(store):
    store.append("metrics", [{"run_id": "r"}])
    (file,) = store.files("metrics")
    Path(file).unlink()
    with pytest.raises(UserError, match=Path(file).name):
        store.connect()


def test_times_are_utc_without_a_zone(store):
    zone = datetime.timezone(datetime.timedelta(hours=2))
    store.append("runs", [{"run_id": "r", "started_at": datetime.datetime(2026, 1, 1, 12, tzinfo=zone)}])
    assert store.connect().sql("SELECT started_at FROM runs").fetchall() == [(datetime.datetime(2026, 1, 1, 10),)]


def test_latest_is_the_newest_finished_run(store):
    with pytest.raises(UserError, match=r"offline_lm\.fit"):
        store.resolve_run("latest")
    store.append("runs", [{"run_id": "a", "status": "running"}])
    with pytest.raises(UserError, match=r"no run is finished.*a \(running\)"):
        store.resolve_run("latest")
    store.append("runs", [{"run_id": "b", "status": "finished"}])
    store.append("runs", [{"run_id": "a", "status": "finished", "metrics": "{}"}])
    store.append("runs", [{"run_id": "c", "status": "running"}])
    store.append("runs", [{"run_id": "c", "status": "interrupted"}])
    assert store.resolve_run("latest") == "a"
    assert store.resolve_run("c") == "c"
    with pytest.raises(UserError, match=r"no run `z`.*c \(interrupted\), a \(finished\), b \(finished\)"):
        store.resolve_run("z")
    rows = store.connect().sql("SELECT run_id, status FROM runs ORDER BY run_id").fetchall()
    assert rows == [("a", "finished"), ("b", "finished"), ("c", "interrupted")]


def test_folders_of_runs_lie_outside_the_tables(store):
    assert str(store.run_dir("r")) == f"{store.url}/runs/r"
    assert str(store.cache_dir) == f"{store.url}/cache"
    with pytest.raises(UserError, match="remote"):
        _ = Store("s3://bucket/store").cache_dir


def test_importing_the_store_does_not_import_torch():
    import subprocess
    import sys

    code = "import offline_lm.store.ingest, sys; assert 'torch' not in sys.modules; offline_lm.connect"
    subprocess.run([sys.executable, "-c", code], check=True)


class _Watched(LocalFileSystem):
    """Files written in Python, as those of an object store; notes which threads read them."""

    def __init__(self, threads: set[int]) -> None:
        super().__init__()
        self.threads = threads

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        file, threads = super()._open(path, mode, **kwargs), self.threads

        class Noting(io.RawIOBase):
            def readable(self):
                return True

            def seekable(self):
                return True

            def seek(self, *args):
                return file.seek(*args)

            def tell(self):
                return file.tell()

            def readinto(self, buffer):
                threads.add(threading.get_ident())
                return file.readinto(buffer)

        return io.BufferedReader(Noting())


def test_files_of_an_object_store_are_read_in_the_calling_thread(store, monkeypatch):
    """A thread of pyarrow's that still holds such a file while Python ends aborts the process (1 in 10, when busy)."""
    store.append("runs", [{"run_id": str(i), "status": "s" * i} for i in range(2000)])
    threads: set[int] = set()
    watched = fs.PyFileSystem(fs.FSSpecHandler(_Watched(threads)))
    monkeypatch.setattr(commits, "filesystem", lambda url: fs.SubTreeFileSystem(url, watched))
    (file,) = store.files("runs")
    assert store.read_file("runs", file, ["run_id", "status", "absent"]).column_names == ["run_id", "status"]
    assert threads == {threading.get_ident()}


def test_a_folder_in_which_the_first_table_is_being_made_is_no_stranger(tmp_path):
    """Two processes create one store: the second finds the first one's folders, and no commit yet."""
    (tmp_path / "store" / "tables" / "episodes" / "_delta_log").mkdir(parents=True)
    assert Store.create(tmp_path / "store").exists("episodes")
    (tmp_path / "other" / "tables" / "of another kind").mkdir(parents=True)
    with pytest.raises(UserError, match="holds other files and is no store"):
        Store.create(tmp_path / "other")
