"""`python -m offline_lm.ingest` beside DuckDB, beside parsing alone, and the memory that it takes.

    python analysis/benchmarks/ingest.py [json=true] [size_mb=200] [others_mb=15] [repeats=2] [formats=jsonl,chat,...]
    python analysis/benchmarks/ingest.py big=10 [workers=2]

The logs are those of `_web_logs.py`: `size_mb` of jsonl, `others_mb` of each other format. On the same files, in one
run, repeats interleaved:

    duckdb   the peer, of jsonl alone: ``read_json`` with every column declared, then COPY to Parquet, zstd 1, one row
             a step; as many threads as cores, insertion order not kept, row groups small enough for all threads. It
             checks nothing beyond the types, redacts nothing, hashes nothing, and stops at the first damaged line
    duckdb1  the same with one thread
    nested   the same as `duckdb`, but one row an episode with its steps as a list
    floor    one thread: `orjson.loads` of each line, then Parquet, zstd 1, of the texts of the steps
    parse    one thread: the bytes of each record read and given to `orjson.loads`
    ours     the ingest command in a process of its own with as many workers as it chooses itself: `seconds` of its
             report, from the first byte read, starting the workers included, to the last commit on the disk
    ours1    the same with workers=1

`ratio` compares `ours` with the faster of `duckdb` and `nested`. `mb_cpu_s` is MB for each second of all cores
together, of ours with starting Python and its imports: what remains comparable on a machine that others use too. Memory
is the peak of the resident sizes of the command's process and its children together, sampled every 20 ms; what they
share is counted in each.

``big=GB`` writes one file of jsonl of that size and ingests it, for "10 GB of logs go through 2 GB of memory".
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import _measure
import duckdb
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from _web_logs import FORMATS, JSON, write

GOAL = 2.0
MEMORY_MB = 2000
"""At most, whatever the size of the log."""
TEXTS = ("url", "title", "observation", "response", "thought", "action")
STEP = """STRUCT(url VARCHAR, title VARCHAR, observation VARCHAR, observation_kind VARCHAR, response VARCHAR,
    thought VARCHAR, "action" VARCHAR, action_name VARCHAR, action_args JSON, reward DOUBLE)"""
EPISODE = {
    "native_id": "VARCHAR", "task_id": "VARCHAR", "goal": "VARCHAR", "model": "VARCHAR", "trial": "BIGINT",
    "success": "BOOLEAN", "terminated": "BOOLEAN", "steps": f"{STEP}[]",
}  # fmt: skip


# --- peers --------------------------------------------------------------------------------------------------


def with_duckdb(log: Path, output: Path, threads: int, *, nested: bool) -> float:
    """Seconds from the file of jsonl to Parquet."""
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in EPISODE.items())
    chosen = (
        "*" if nested else f"{', '.join(name for name in EPISODE if name != 'steps')}, unnest(steps, max_depth := 2)"
    )
    with duckdb.connect() as db:
        db.execute(f"SET threads = {threads}; SET preserve_insertion_order = false")
        began = time.perf_counter()
        db.execute(f"""
            COPY (SELECT {chosen} FROM read_json('{log}', format = 'newline_delimited', columns = {{{columns}}}))
            TO '{output}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE 2048)
        """)
        return time.perf_counter() - began


def floor(log: Path, output: Path) -> float:
    """Seconds to parse the file and write the texts of its steps."""
    began = time.perf_counter()
    schema = pa.schema([(name, pa.large_string()) for name in TEXTS])
    options: JSON = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
    with log.open("rb", buffering=1 << 20) as file, pq.ParquetWriter(output, schema, **options) as writer:
        steps = (step for line in file for step in orjson.loads(line)["steps"])
        while some := list(islice(steps, 1024)):
            columns = [pa.array([step[name] for step in some], pa.large_string()) for name in TEXTS]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return time.perf_counter() - began


def parse(folder: Path, name: str) -> float:
    """Seconds to read the log and parse it."""
    began = time.perf_counter()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=1 << 20) as file:
            if FORMATS[name].one_file:
                for line in file:
                    orjson.loads(line)
            else:
                orjson.loads(file.read())
    return time.perf_counter() - began


# --- ours ---------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    report: JSON
    seconds: float
    cpu: float
    peak_mb: float


def _tree(pid: int) -> Iterator[int]:
    """The process and its descendants that live."""
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def ingest(log: Path, source: str, store: Path, workers: str) -> Run:
    arguments = (f"path={log}", f"source={source}", f"store={store}", f"workers={workers}", "json=true")
    command = [sys.executable, "-m", "offline_lm.ingest", *arguments]
    with tempfile.TemporaryFile() as out:
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, sum(map(_resident, _tree(process.pid))))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
        seconds = time.perf_counter() - began
        out.seek(0)
        printed = out.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{printed}")
    report = json.loads(printed.splitlines()[-1])
    if report["accepted"] != report["read"]:
        raise SystemExit(f"not every episode was accepted: {report}")
    return Run(report, seconds, usage.ru_utime + usage.ru_stime, peak / 1e6)


class Ours:
    """The command as a row: seconds; the runs are kept."""

    def __init__(self, log: Path, source: str, scratch: Path, workers: str) -> None:
        self.runs: list[Run] = []
        self._log, self._source, self._scratch, self._workers = log, source, scratch, workers
        self._numbers = count()

    def __call__(self) -> float:
        store = self._scratch / f"store_{self._source}_{self._workers}_{next(self._numbers)}"
        self.runs.append(ingest(self._log, self._source, store, self._workers))
        shutil.rmtree(store)
        return self.runs[-1].report["seconds"]


class Here:
    """What runs in this process as a row: seconds; the CPU of each is kept, that of all threads."""

    def __init__(self, work: Callable[..., float], *given: Any, **named: Any) -> None:
        self.cpu: list[float] = []
        self._work = partial(work, *given, **named)

    def __call__(self) -> float:
        before = time.process_time()
        seconds = self._work()
        self.cpu.append(time.process_time() - before)
        return seconds


# --- tables -------------------------------------------------------------------------------------------------


def measure(names: list[str], sizes: dict[str, int], repeats: int, scratch: Path) -> tuple[JSON, list[JSON]]:
    cores = os.cpu_count() or 1
    timed: dict[str, Here | Ours] = {}
    mb: dict[str, float] = {}
    for seed, name in enumerate(names):
        folder = scratch / name
        mb[name] = write(folder, name, sizes[name], seed) / 1e6
        timed[f"{name} parse"] = Here(parse, folder, name)
        for how, workers in (("ours1", "1"), ("ours", "null")):
            if how == "ours1" or name == "jsonl":
                timed[f"{name} {how}"] = Ours(folder, name, scratch, workers)
        if name == "jsonl":
            files = folder / FORMATS[name].name, scratch / "peer.parquet"
            timed["jsonl floor"] = Here(floor, *files)
            timed["jsonl duckdb"] = Here(with_duckdb, *files, cores, nested=False)
            timed["jsonl duckdb1"] = Here(with_duckdb, *files, 1, nested=False)
            timed["jsonl nested"] = Here(with_duckdb, *files, cores, nested=True)
    found = _measure.medians(_measure.repeat(timed, repeats))
    speed = {row: mb[row.split()[0]] / seconds for row, seconds in found.items()}
    table = []
    for row, mb_s in sorted(speed.items(), key=lambda item: names.index(item[0].split()[0])):
        name, how = row.split()
        work = timed[row]
        runs = work.runs if isinstance(work, Ours) else []
        cpu = [run.cpu for run in runs] if isinstance(work, Ours) else work.cpu
        report = runs[0].report if runs else {}
        table.append({
            "format": name, "how": how, "mb": round(mb[name], 1), "mb_s": round(mb_s, 1),
            "to_parse": round(speed[f"{name} parse"] / mb_s, 2),
            "to_floor": round(speed["jsonl floor"] / mb_s, 2) if name == "jsonl" else None,
            "episodes": report.get("episodes"), "steps": report.get("steps"),
            "redacted": sum(report["redacted"].values()) if runs else None,
            "mb_cpu_s": round(mb[name] / statistics.median(cpu), 1),
            "peak_mb": round(max(run.peak_mb for run in runs)) if runs else None,
        })  # fmt: skip
    versions = _measure.versions("orjson", "pyarrow", "deltalake", "duckdb", load=os.getloadavg()[0], repeats=repeats)
    mine = speed.get("jsonl ours")
    peer = max((speed[f"jsonl {how}"] for how in ("duckdb", "nested")), default=None) if mine else None
    ratio = mine / peer if mine and peer else None
    unit = "MB/s of jsonl"
    return {"ours": mine, "peer": peer, "ratio": ratio, "goal": GOAL, "unit": unit, "versions": versions}, table


def big(gb: float, workers: str, scratch: Path) -> tuple[JSON, list[JSON]]:
    log = scratch / "big"
    mb = write(log, "jsonl", int(gb * 1e9)) / 1e6
    run = ingest(log, "jsonl", scratch / "store", workers)
    counts = {key: run.report[key] for key in ("read", "accepted", "duplicates", "quarantined", "steps")}
    row = {"mb": round(mb), "mb_s": round(mb / run.report["seconds"], 1), "seconds": round(run.seconds, 1),
           "cpu_s": round(run.cpu, 1), "peak_mb": round(run.peak_mb), **counts}  # fmt: skip
    return {
        "ours": round(run.peak_mb), "peer": round(mb), "ratio": round(mb / run.peak_mb, 1),
        "goal": round(mb / MEMORY_MB, 1), "unit": "MB: log for each of memory",
        "versions": _measure.versions("orjson", "pyarrow", "deltalake", workers=workers, load=os.getloadavg()[0]),
    }, [row]  # fmt: skip


def main(argv: list[str]) -> None:
    given = _measure.arguments(
        argv, size_mb="200", others_mb="15", repeats="2", formats=",".join(FORMATS), big="0", workers="null"
    )
    names = given["formats"].split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        raise SystemExit(f"no format {', '.join(unknown)}; there are {', '.join(FORMATS)}")
    mb: dict[str, Any] = {name: given["size_mb" if name == "jsonl" else "others_mb"] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        if float(given["big"]):
            result, rows = big(float(given["big"]), given["workers"], Path(folder))
        else:
            sizes = {name: int(float(size) * 1e6) for name, size in mb.items()}
            result, rows = measure(names, sizes, int(given["repeats"]), Path(folder))
    _measure.report(result, rows, given, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
