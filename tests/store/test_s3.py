"""A store and logs in an object store: a local S3-compatible server (moto). Skipped where the extra `s3` is absent."""

import hashlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from offline_lm import ingest, query
from offline_lm.errors import UserError
from offline_lm.store import Store, schema
from offline_lm.store.ingest import add
from offline_lm.store.maintain import compact, vacuum
from offline_lm.types import Episode, Step

pytest.importorskip("s3fs", reason="s3fs is not installed (extra `s3`)")
pytest.importorskip("moto", reason="moto, the server to test with, is not installed")
boto3 = pytest.importorskip("boto3", reason="boto3, the client to test with, is not installed")

PNG = b"\x89PNG\r\n\x1a\n" + os.urandom(3 << 20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL of a server of our own; what deltalake and s3fs need to find it stands in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(300):
                with socket.socket() as trial:
                    if trial.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def bucket(server, request) -> str:
    """URL of a fresh bucket."""
    name = f"b{hashlib.sha256(request.node.name.encode()).hexdigest()[:20]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


def upload(folder: Path, url: str) -> None:
    name, _, prefix = url.removeprefix("s3://").partition("/")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        boto3.client("s3").upload_file(str(file), name, f"{prefix}/{file.relative_to(folder)}")


def keys(url: str, ending: str = "") -> list[str]:
    name, _, prefix = url.removeprefix("s3://").partition("/")
    listed = boto3.client("s3").list_objects_v2(Bucket=name, Prefix=prefix)["Contents"]
    return [entry["Key"] for entry in listed if entry["Key"].endswith(ending)]


def episodes(first: int, stop: int) -> list[Episode]:
    return [
        Episode(
            source="test",
            native_id=str(i),
            task_id=f"t{i}",
            goal="g",
            steps=(Step(step=0, observation=f"page {i}", action="click(1)", reward=1.0),),
        )
        for i in range(first, stop)
    ]


def rows(store: Store) -> list[tuple]:
    with store.connect() as db:
        return db.execute("SELECT * FROM steps ORDER BY episode_id, step").fetchall()


@pytest.fixture
def logs(tmp_path) -> Path:
    folder = tmp_path / "logs"
    for i in range(6):
        file = folder / f"d{i % 2}" / f"log{i}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        steps = [{"observation": f"page {i} {k}", "action": f"click[{k}]"} for k in range(3)]
        lines = [json.dumps({"task_id": f"{i}-{j}", "goal": "g", "success": True, "steps": steps}) for j in range(4)]
        file.write_text("\n".join([*lines, "{damaged"]) + "\n")
    return folder


def test_logs_from_s3_into_a_store_on_s3(bucket, logs, tmp_path, capsys):
    upload(logs, f"{bucket}/logs")
    for workers in (1, 2):
        assert ingest.main([f"path={bucket}/logs", f"store={bucket}/store", f"workers={workers}"]) == 0
    out = capsys.readouterr().out
    assert "read 30: accepted 24, duplicates 0, quarantined 6" in out
    assert "read 30: accepted 0, duplicates 24, quarantined 6" in out
    assert ingest.main([f"path={logs}", f"store={tmp_path / 'local'}"]) == 0
    assert rows(Store.open(f"{bucket}/store")) == rows(Store.open(tmp_path / "local"))


def test_query(bucket, logs, capsys):
    assert ingest.main([f"path={logs}", f"store={bucket}/store"]) == 0
    capsys.readouterr()
    sql = "SELECT count(*) AS n, min(observation) AS o FROM steps JOIN episodes USING (episode_id) WHERE success"
    assert query.main([sql, f"store={bucket}/store", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == [{"n": 72, "o": "page 0 0"}]


def test_large_columns_by_several_threads(bucket):
    """Each of DuckDB's threads reads where it wants to: many row groups, and pages larger than a block."""
    store = Store.create(f"{bucket}/store")
    table = [
        {
            "episode_id": f"e{i:05}",
            "ingest_id": "i",
            "step": i,
            "observation": f"{i:05}" * (20_000 if i % 9 == 0 else 9),
        }
        for i in range(5000)
    ]
    table[7]["observation"] = os.urandom(3 << 20).hex()
    store.append("steps", table)
    for threads in (1, 4):
        with store.connect() as db:
            db.execute(f"SET threads = {threads}")
            found = db.execute("SELECT step, observation FROM stored_steps ORDER BY step").fetchall()
        assert found == [(row["step"], row["observation"]) for row in table]


def test_compaction_time_travel_and_vacuum(bucket):
    store = Store.create(f"{bucket}/store")
    for i in range(4):
        add(store, episodes(10 * i, 10 * i + 10))
    before, version = rows(store), store.versions()["episodes"]
    assert len(before) == 40
    assert compact(store) == {
        "episodes": {"before": 4, "after": 1, "dropped": 0},
        "steps": {"before": 4, "after": 1, "dropped": 0},
    }
    assert rows(store) == before
    assert len(rows(Store.open(store.url, version - 2))) == 20
    assert vacuum(store, hours=0) == {"episodes": 4, "steps": 4}
    assert len(keys(f"{store.url}/tables/steps", ".parquet")) == 1
    assert rows(store) == before
    with pytest.raises(UserError, match="was vacuumed away"):
        Store.open(store.url, version - 2)


def test_vacuum_keeps_what_a_run_was_trained_on(bucket):
    store = Store.create(f"{bucket}/store")
    add(store, episodes(0, 5))
    store.append("runs", [{"run_id": "r", "status": "finished", "store_versions": json.dumps(store.versions())}])
    add(store, episodes(5, 10))
    compact(store)
    vacuum(store, hours=0)
    assert len(rows(Store.open(store.url, "r"))) == 5


def write(url: str, seed: int) -> None:
    for i in range(5):
        first = 4 * ((i * (1 + 2 * seed)) % 5)  # the same batches in another order, overlapping
        add(Store.open(url), episodes(first, first + 8), batch=3)


def test_two_writers_store_each_episode_once(bucket):
    """An append on S3 is a conditional put, so the loser sees it and looks again."""
    store = Store.create(f"{bucket}/store")
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(store.url, seed)) for seed in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    with store.connect() as db:
        assert db.execute("SELECT count(*), count(DISTINCT episode_id) FROM stored_episodes").fetchall() == [(24, 24)]
        assert db.execute("SELECT count(*) FROM steps").fetchall() == [(24,)]


def test_the_one_who_commits_second_starts_again(bucket):
    store = Store.create(f"{bucket}/store")
    first, second = (pa.Table.from_pylist([{"episode_id": id_}], schema=schema.EPISODES) for id_ in "ab")
    asked = []

    def make(files):
        asked.append(len(files))
        if len(asked) == 1:
            Store.open(store.url).append("episodes", first)
        return second

    store.append_checked("episodes", make)
    assert asked == [0, 1]
    assert len(keys(f"{store.url}/tables/episodes", ".parquet")) == 2


def test_pictures(bucket, tmp_path):
    UPath = pytest.importorskip("upath").UPath
    sha256 = hashlib.sha256(PNG).hexdigest()
    (tmp_path / "shot.png").write_bytes(PNG)
    upload(tmp_path, f"{bucket}/log")
    store = Store.create(f"{bucket}/store")
    shot = {"sha256": sha256, "mime": "image/png", "status": "ok"}
    for i, source in enumerate(
        [{"data": PNG}, {"path": tmp_path / "shot.png"}, {"path": UPath(f"{bucket}/log/shot.png")}]
    ):
        step = Step(step=0, observation=str(i), action="a", screenshot=shot | source)
        add(store, [Episode(source="test", native_id=str(i), task_id="t", goal="g", steps=(step,))])
    assert keys(f"{store.url}/media") == [f"store/media/{sha256[:2]}/{sha256}.png"]
    with store.connect() as db:
        assert db.execute("SELECT DISTINCT screenshot.status FROM steps").fetchall() == [("stored",)]


def test_no_bucket_and_no_run_folder_are_told(bucket):
    with pytest.raises(UserError, match="is the bucket there"):
        Store.open("s3://no-such-bucket/store")
    with pytest.raises(UserError, match="is not a store"):
        Store.open(f"{bucket}/nothing")
    with pytest.raises(UserError, match="give run_dir=FOLDER"):
        Store.create(f"{bucket}/store").run_dir("r")


def test_no_secret_is_stored(bucket, logs):
    assert ingest.main([f"path={logs}", f"store={bucket}/store"]) == 0
    s3 = boto3.client("s3")
    name = bucket.removeprefix("s3://")
    for key in keys(f"{bucket}/store"):
        assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in s3.get_object(Bucket=name, Key=key)["Body"].read()
