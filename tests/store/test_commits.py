"""Durability and concurrency of the store's commits: kills, full disks, the order of system calls, many writers."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from offline_lm import paths
from offline_lm.errors import UserError
from offline_lm.store import Store, commits
from offline_lm.store.check import examine
from offline_lm.store.ingest import add
from offline_lm.types import Episode, Step

BENCHMARKS = paths.ANALYSIS / "benchmarks"


def episode(name, text="page"):
    steps = tuple(Step(step=t, observation=f"{text} {name} {t}", action=f"click[{t}]") for t in range(3))
    return Episode(source="test", native_id=str(name), goal=str(name), steps=steps)


def ids(store):
    with store.connect() as db:
        return Counter(row[0] for row in db.execute("SELECT provenance.native_id FROM stored_episodes").fetchall())


def test_kills_lose_nothing_that_was_acknowledged():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "crash.py"), "kills=24", "seed=3", "json=true"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == 24
    assert [counts[key] for key in ("lost", "duplicated", "partial", "damaged")] == [0, 0, 0, 0]
    assert any(name.startswith("ingest steps.") or name.startswith("ingest episodes.") for name in counts["points"])


WRITER = """
import sys
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Episode, Step
url, worker, batches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def episode(name):
    return Episode(source="test", native_id=str(name), goal=str(name),
                   steps=tuple(Step(step=t, observation=f"page {name} {t}", action=f"click[{t}]") for t in range(3)))
store = Store.create(url)
for b in range(batches):
    # batch b of worker w: episodes 4 (b + w) ... 4 (b + w) + 7: half of it is the next batch's, all of it others'
    batch = [episode(n) for n in range(4 * (b + worker), 4 * (b + worker) + 8)]
    for _ in range(2):
        counts = add(store, batch)
        assert counts["accepted"] + counts["duplicates"] == 8, counts
"""


def test_many_writers_of_overlapping_batches_store_each_episode_once(tmp_path):
    """``WRITERS=8x25`` for 8 processes and 25 batches each."""
    workers, batches = map(int, os.environ.get("WRITERS", "3x5").split("x"))
    url = str(tmp_path / "store")
    started = [subprocess.Popen([sys.executable, "-c", WRITER, url, str(w), str(batches)]) for w in range(workers)]
    assert [process.wait(timeout=250) for process in started] == [0] * workers
    store = Store.open(url)
    assert ids(store) == Counter({str(n): 1 for n in range(4 * (workers + batches))})
    with store.connect() as db:
        rows = db.execute("SELECT observation, count(*) FROM steps GROUP BY 1").fetchall()
    expected = {f"page {n} {t}" for n in range(4 * (workers + batches)) for t in range(3)}
    assert dict(rows) == dict.fromkeys(expected, 1)
    assert not [finding for finding in examine(url) if not finding.harmless]


def test_a_writer_that_lost_looks_again(tmp_path, monkeypatch):
    store = Store.create(tmp_path / "store")
    other = Store.open(tmp_path / "store")
    real, raced = commits.commit, []

    def commit(table, *args):
        if table == "episodes" and not raced:
            raced.append(True)
            add(other, [episode(1), episode(2)])
        real(table, *args)

    monkeypatch.setattr(commits, "commit", commit)
    counts = add(store, [episode(2), episode(3), episode(1, text="another page")])
    assert raced
    assert (counts["accepted"], counts["duplicates"], counts["by_reason"]) == (1, 1, {"id_conflict": 1})
    assert ids(store) == Counter({"1": 1, "2": 1, "3": 1})


def test_what_is_acknowledged_is_in_the_store_at_once(tmp_path):
    store = Store.create(tmp_path / "store")
    seen = []
    add(
        store,
        [episode(n) for n in range(600)],
        batch=200,
        acknowledge=lambda counts: seen.append((counts["accepted"], ids(Store.open(store.url)).total())),
    )
    assert seen[-1] == (600, 600)
    assert all(told == held for told, held in seen)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_data_is_on_the_disk_before_the_log_and_the_log_before_the_answer(tmp_path):
    """The order of system calls: fsync of every Parquet file, then the commit, then its fsync, then the answer."""
    url = tmp_path / "store"
    script = (
        "import sys; from offline_lm.store import Store; from offline_lm.store.ingest import add\n"
        "from offline_lm.types import Episode, Step\n"
        "store = Store.create(sys.argv[1])\n"
        "step = Step(step=0, observation='o', action='a')\n"
        "done = add(store, [Episode(source='s', native_id='1', steps=(step,))])\n"
        "print('accepted' + str(done['accepted']), flush=True)\n"
    )
    trace = tmp_path / "trace"
    calls = "trace=openat,fsync,fdatasync,rename,renameat,renameat2,link,linkat,write,close"
    subprocess.run(
        ["strace", "-f", "-y", "-s", "64", "-e", calls, "-o", str(trace), sys.executable, "-c", script, str(url)],
        check=True,
        capture_output=True,
        timeout=250,
    )
    events = []
    for line in trace.read_text(errors="replace").splitlines():
        if (found := re.search(r"f(?:data)?sync\(\d+<([^>]*)>", line)) and str(url) in found[1]:
            events.append(("sync", found[1].removeprefix(str(url))))
        elif (found := re.search(r'(?:link|linkat|rename\w*)\(.*"([^"]*_delta_log/\d{20}\.json)"', line)) or (
            found := re.search(r'openat\(.*"([^"]*_delta_log/\d{20}\.json)", O_[^)]*O_CREAT', line)
        ):
            events.append(("commit", found[1].removeprefix(str(url))))
        elif re.search(r'write\(1<[^>]*>, "accepted1', line):
            events.append(("answer", ""))
    assert events[-1] == ("answer", "")
    for table in ("steps", "episodes"):
        log = f"/tables/{table}/_delta_log"
        commit = events.index(("commit", f"{log}/{1:020}.json"))
        data = [i for i, (kind, path) in enumerate(events) if re.fullmatch(rf"/tables/{table}/part-.*\.parquet", path)]
        assert data
        assert max(data) < commit
        assert ("sync", f"/tables/{table}") in events[max(data) : commit]
        after = events[commit:]
        assert after.index(("sync", f"{log}/{1:020}.json")) < after.index(("sync", log)) < after.index(("answer", ""))
    steps_done = events.index(("sync", f"/tables/steps/_delta_log/{1:020}.json"))
    assert steps_done < events.index(("commit", f"/tables/episodes/_delta_log/{1:020}.json"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here (that takes root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(ballast, free):
    """Fills the disk but for `free` bytes."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1024)):
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - free))


@pytest.mark.parametrize("free", [0, 1, 4, 8, 12, 16, 24, 32, 48])
def test_a_full_disk_leaves_the_previous_snapshot(small_disk, free):
    """With 0 to 48 KB left every write of a commit is hit in turn: data, log, checkpoint."""
    store = Store.create(small_disk / "store")
    add(store, [episode(n) for n in range(10)])
    fill(small_disk / "ballast", free * 1024)
    incompressible = [episode(n, text=os.urandom(400).hex()) for n in range(100, 200)]
    with pytest.raises(UserError, match="cannot be written"):
        add(store, incompressible)
    assert ids(Store.open(store.url)) == Counter({str(n): 1 for n in range(10)})
    assert not [finding for finding in examine(store.url) if not finding.harmless]
    (small_disk / "ballast").unlink()
    add(store, [episode(n) for n in range(10, 20)])
    assert ids(Store.open(store.url)) == Counter({str(n): 1 for n in range(20)})


def test_failing_writes_leave_no_file_behind(tmp_path, monkeypatch):
    store = Store.create(tmp_path / "store")
    add(store, [episode(1)])
    before = sorted(Path(store.url).rglob("*.parquet"))
    monkeypatch.setattr(commits.pq.ParquetWriter, "write_batch", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="cannot be written"):
        add(store, [episode(2)])
    assert sorted(Path(store.url).rglob("*.parquet")) == before
