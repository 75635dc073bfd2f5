"""An ingest of a log that is larger than the memory it may take, and one whose worker is killed."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offline_lm.store import Store

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux what a process takes")

MB = 1_000_000
PAGE = "".join(f"[{i}] link 'item {i * 7919 % 1000}', visible\n" for i in range(420))[:14_000]


def write(file: Path, size: int) -> None:
    """Episodes of four pages of 14 KB, no two alike."""
    with file.open("wb") as stream:
        for number in itertools.count():
            steps = [
                {"observation": f"{file.name} {number} {i}\n{PAGE}", "action": f"click('{i}')", "thought": "next"}
                for i in range(4)
            ]
            line = {"native_id": f"{file.name}/{number}", "goal": f"find {number}", "success": True, "steps": steps}
            stream.write(json.dumps(line).encode() + b"\n")
            if stream.tell() >= size:
                return


def below(pid: int) -> Iterator[int]:
    """The process and all that it started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from below(int(child))


def status(pid: int, key: str) -> int:
    """Of a process: kB, or 0 once it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def ingest(
    path: Path, store: Path, workers: int, watch: Callable[[int], None] | None = None
) -> tuple[int, dict[str, int], str, float]:
    """(exit code, counts, stderr, peak in MB: of each process its own, together)"""
    arguments = [f"path={path}", "source=jsonl", f"store={store}", f"workers={workers}", "json=true"]
    command = [sys.executable, "-m", "offline_lm.ingest", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peaks: dict[int, int] = {}
        while process.poll() is None:
            try:
                for pid in below(process.pid):
                    peaks[pid] = max(peaks.get(pid, 0), status(pid, "VmHWM"))
                if watch is not None:
                    watch(process.pid)
            except (FileNotFoundError, ProcessLookupError):  # it ended while it was looked at
                pass
            time.sleep(0.02)
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
    counts = json.loads(out.splitlines()[-1]) if process.returncode == 0 else {}
    return process.returncode, counts, err, sum(peaks.values()) * 1024 / MB


def content(store: Path) -> list[tuple]:
    """Rows and a hash of both tables, whatever the order of the rows and the ingest."""
    with Store.open(store).connect() as db:
        tables = ("(SELECT * EXCLUDE (ingest_id) FROM episodes)", "steps")
        hashed = "SELECT count(*), bit_xor(hash(t)), sum(hash(t)::HUGEINT)"
        return [db.sql(f"{hashed} FROM {table} AS t").fetchall()[0] for table in tables]


def test_memory_is_bounded_and_two_workers_make_the_same_store(tmp_path):
    log = tmp_path / "log.jsonl"
    write(log, 150 * MB)
    peaks = []
    for workers in (1, 2):
        code, counts, err, peak = ingest(log, tmp_path / f"store{workers}", workers)
        assert code == 0, err
        assert counts["accepted"] == counts["read"] > 2000
        peaks.append(peak)
    assert content(tmp_path / "store1") == content(tmp_path / "store2")
    print(peaks)
    assert peaks[0] < 600
    assert peaks[1] < 1400  # three processes, each with its imports


def test_a_killed_worker_is_told_and_the_same_command_completes(tmp_path):
    logs, store = tmp_path / "logs", tmp_path / "store"
    logs.mkdir()
    for i in range(6):
        write(logs / f"{i}.jsonl", 9 * MB)
    killed: list[int] = []

    def kill(pid: int) -> None:
        """One worker, when the first commit is on the disk."""
        if killed or not (store / "tables" / "episodes" / "_delta_log" / f"{1:020}.json").exists():
            return
        for child in below(pid):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
                killed.append(child)
                return

    code, _, err, _ = ingest(logs, store, 2, kill)
    assert killed
    assert code == 2, err
    assert "died (exit code -9)" in err
    assert "run the same command" in err
    ((kept,),) = Store.open(store).connect().sql("SELECT count(*) FROM episodes").fetchall()
    assert kept > 0
    code, counts, err, _ = ingest(logs, store, 1)
    assert code == 0, err
    assert counts["duplicates"] == kept
    assert counts["accepted"] == counts["read"] - kept > 0
