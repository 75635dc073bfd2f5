"""The same rows whatever engine reads the logs, and whatever engine reads the store."""

import hashlib
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offline_lm import ingest, interop, logs
from offline_lm.errors import UserError
from offline_lm.interop import processes
from offline_lm.store import Store

SHOP = Path(__file__).resolve().parents[2] / "datasets" / "shop" / "sample.jsonl.gz"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Thirty files in three folders: five episodes each, a damaged record in every fifth."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(30):
        file = folder / f"d{i % 3}" / f"log{i:02}.jsonl"
        file.parent.mkdir(exist_ok=True)
        steps = [{"observation": f"page {i} {k}", "action": f"click[{k}]", "reward": float(k)} for k in range(3)]
        lines = [json.dumps({"task_id": f"{i}-{j}", "goal": "g", "success": None, "steps": steps}) for j in range(5)]
        file.write_text("\n".join([*lines, "{damaged"] if i % 5 == 0 else lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr(processes, "BUNDLE_PARTS", 4)  # several tasks for each engine


def stored(engine: str, workers: int, path: Path, store: Path) -> tuple[list[str], dict[str, str]]:
    """Ingests `path`; the episodes in their order, and a hash of each table."""
    if engine != "processes":
        pytest.importorskip(engine, reason=f"{engine} is not installed (extra `{engine}`)")
    argv = [f"path={path}", f"store={store}", f"engine={engine}", f"workers={workers}"]
    assert ingest.main(argv) == 0
    with Store.open(store).connect() as db:
        order = [row[0] for row in db.execute("SELECT episode_id FROM stored_episodes").fetchall()]
        tables = {
            table: digest(db.sql(f"SELECT * EXCLUDE ({left_out}) FROM stored_{table}").to_arrow_table())
            for table, left_out in (
                ("episodes", "ingest_id"),
                ("steps", "ingest_id"),
                ("quarantine", "ingest_id, quarantined_at"),
            )
        }
    return order, tables


def digest(rows: pa.Table) -> str:
    """A hash of all rows and columns, nested ones too, whatever the order of the rows."""
    names = sorted(rows.column_names)
    hashes = sorted(
        hashlib.sha256(repr([plain(row[name]) for name in names]).encode()).digest() for row in rows.to_pylist()
    )
    return hashlib.sha256(b"".join(hashes) + repr(names).encode()).hexdigest()


def plain(value):
    """Times without their zone (always UTC; DuckDB's have none), objects with sorted keys."""
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat()
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value)}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def by_one_process(many, tmp_path_factory) -> dict[Path, tuple[list[str], dict[str, str]]]:
    folder = tmp_path_factory.mktemp("one")
    return {path: stored("processes", 1, path, folder / path.name) for path in (SHOP, many)}


def test_the_hash_sees_every_value(many, by_one_process, tmp_path):
    table = pa.table({"a": [1, 2], "b": [[{"x": 1.0}], [{"x": 2.0}]]})
    assert digest(table) == digest(table.take([1, 0]))
    assert digest(table) != digest(pa.table({"a": [1, 2], "b": [[{"x": 1.0}], [{"x": 2.5}]]}))
    order, tables = by_one_process[many]
    assert len(order) == 150
    assert len(set(tables.values())) == 3


@pytest.mark.parametrize(("engine", "workers"), [("processes", 2), ("ray", 2), ("daft", 2)])
@pytest.mark.parametrize("what", ["shop", "many"])
def test_every_engine_makes_the_same_store(engine, workers, what, many, by_one_process, tmp_path):
    path = SHOP if what == "shop" else many
    assert stored(engine, workers, path, tmp_path / "store") == by_one_process[path]


@pytest.mark.parametrize("engine", ["ray", "daft"])
def test_a_users_mistake_stays_one_line(engine, tmp_path, monkeypatch):
    pytest.importorskip(engine, reason=f"{engine} is not installed (extra `{engine}`)")
    bundle = processes.Bundle((logs.Part("nope", tmp_path, 1),), 1)
    monkeypatch.setattr(processes.Job, "bundles", lambda job: iter([bundle]))
    job = processes.Job("jsonl", tmp_path, str(tmp_path), "i")
    with pytest.raises(UserError, match=r"^source=nope is not a known log format[^\n]*$"):
        list(ingest.engine(engine)(job, 2))


@pytest.mark.parametrize("engine", ["ray", "daft"])
def test_without_the_package_it_says_what_to_install(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.delitem(sys.modules, f"offline_lm.interop.{engine}", raising=False)
    monkeypatch.delattr(interop, engine, raising=False)
    with pytest.raises(UserError, match=rf"pip install 'offline_lm\[{engine}\]'"):
        ingest.engine(engine)


# --- the store's own tables, by other engines ---------------------------------------------------------------


def by_duckdb(store: Store, table: str) -> Iterator[pa.Table]:
    with store.connect() as db:
        yield db.sql(f"SELECT * FROM stored_{table}").to_arrow_table()


def by_daft_delta(store: Store, table: str) -> Iterator[pa.Table]:
    daft = pytest.importorskip("daft", reason="daft is not installed (extra `daft`)")
    yield daft.read_deltalake(store.table_url(table)).to_arrow()


def by_daft_parquet(store: Store, table: str) -> Iterator[pa.Table]:
    daft = pytest.importorskip("daft", reason="daft is not installed (extra `daft`)")
    yield daft.read_parquet(store.files(table)).to_arrow()


def by_ray(store: Store, table: str) -> Iterator[pa.Table]:
    data = pytest.importorskip("ray.data", reason="ray is not installed (extra `ray`)")
    yield from data.read_parquet(store.files(table)).iter_batches(batch_size=None, batch_format="pyarrow")


@pytest.fixture(scope="module")
def store(many, tmp_path_factory) -> Store:
    store = Store.create(tmp_path_factory.mktemp("read") / "store")
    for path in (many / "d0", many / "d1", SHOP):
        assert ingest.main([f"path={path}", f"store={store.url}"]) == 0
    return store


@pytest.mark.parametrize("engine", [by_duckdb, by_daft_delta, by_daft_parquet, by_ray])
@pytest.mark.parametrize("table", ["episodes", "steps"])
def test_every_engine_reads_the_same_rows(engine, table, store):
    files = store.files(table)
    assert len(files) > 2
    want = pa.concat_tables([pq.read_table(file) for file in files])
    rows = pa.concat_tables(engine(store, table))
    assert rows.num_rows == want.num_rows == (1100 if table == "episodes" else 8755)  # final observations too
    assert digest(rows) == digest(want)
