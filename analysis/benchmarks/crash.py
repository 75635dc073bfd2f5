"""Kills ingest, compaction and vacuum with SIGKILL, and counts what a store lost, doubled or half kept.

    python analysis/benchmarks/crash.py kills=500 [seed=0] [json=true]

Half of the kills come at a random moment, half at the named points of `offline_lm.store.commits.reach`. After each the
store is looked at by a fresh process: every episode that the killed process had acknowledged is there once, with all
its steps, and the doctor finds nothing wrong. When a log is in whole, its store is compacted and vacuumed under the
same fire, and the next store begins.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Imported, not used, before the forks: the children start at once, and no thread is there to be lost in a fork.
from offline_lm.store import Store
from offline_lm.store.check import examine
from offline_lm.store.ingest import add
from offline_lm.store.maintain import compact, vacuum
from offline_lm.store.rows import episode_id
from offline_lm.types import Episode, Step

EPISODES, BATCH = 120, 6
MOST = {"ingest": 12, "compact": 12, "vacuum": 3}
"""Kills in one phase of a store: the next attempt is let through, however slow the machine."""
POINTS = ("begun", "written", "committed", "synced")


def log(seed: int) -> Iterator[Episode]:
    """A log with steps of its own in every episode, and every tenth record a repetition."""
    for i in range(EPISODES):
        name = i if i % 10 else i // 2
        steps = tuple(
            Step(step=t, observation=f"page {seed} {name} {t} " + "x" * 500, action=f"click[{t}]", reward=0.0)
            for t in range(1 + name % 5)
        )
        yield Episode(source="crash", dataset=str(seed), native_id=str(name), goal=f"{name}", steps=steps)


def name_of(i: int) -> str:
    return str(i if i % 10 else i // 2)


def main() -> int:
    given = dict(arg.split("=", 1) for arg in sys.argv[1:])
    kills, rng = int(given.get("kills", 500)), random.Random(int(given.get("seed", 0)))
    totals = {"kills": 0, "lost": 0, "duplicated": 0, "partial": 0, "damaged": 0, "acknowledged": 0, "stores": 0}
    at_points: dict[str, int] = {}
    while totals["kills"] < kills:
        folder = tempfile.mkdtemp()
        store, seed = f"{folder}/store", rng.randrange(10**9)
        acknowledged = 0
        for phase in ("ingest", "compact", "vacuum"):
            done, spared = False, MOST[phase]
            while not done and totals["kills"] < kills:
                point = _point(rng, phase)
                done, records = _attempt(phase, store, seed, point, rng, spare=not spared)
                spared = max(0, spared - 1)
                acknowledged = max(acknowledged, records)
                if not done:
                    totals["kills"] += 1
                    name = point.partition(":")[0] if point else "any moment"
                    at_points[f"{phase} {name}"] = at_points.get(f"{phase} {name}", 0) + 1
                for key, count in _verify(store, seed, acknowledged).items():
                    totals[key] += count
        totals["stores"] += 1
        totals["acknowledged"] += acknowledged
        shutil.rmtree(folder)
    bad = sum(totals[key] for key in ("lost", "duplicated", "partial", "damaged"))
    if given.get("json") == "true":
        print(json.dumps({**totals, "points": at_points, "ok": not bad}))
    else:
        print(", ".join(f"{key} {value}" for key, value in totals.items()))
    return int(bool(bad))


def _point(rng: random.Random, phase: str) -> str | None:
    """A failpoint and the time it is reached, or None for a random moment. A vacuum passes none."""
    if phase == "vacuum" or rng.random() < 0.5:
        return None
    table = rng.choice(("steps", "episodes"))
    return f"{table}.{rng.choice(POINTS)}:{rng.randint(1, 4 if phase == 'ingest' else 3)}"


def _attempt(
    phase: str, store: str, seed: int, point: str | None, rng: random.Random, *, spare: bool
) -> tuple[bool, int]:
    """(finished before it was killed, records that it acknowledged)."""
    read, write = os.pipe()
    point = None if spare else point
    child = _fork(lambda: _work(phase, store, seed, point, write))
    os.close(write)
    deadline = time.monotonic() + (300 if point or spare else rng.uniform(0.0, 0.6 if phase == "ingest" else 0.3))
    records, alive = 0, True
    while alive:
        ready, _, _ = select.select([read], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + 60
            continue
        data = os.read(read, 1 << 16)
        alive = bool(data)
        if lines := data.split():
            records = int(lines[-1])
    os.close(read)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False, records
    if os.WEXITSTATUS(status):
        raise SystemExit(f"{phase} failed by itself; see above")
    return True, records


def _work(phase: str, store: str, seed: int, point: str | None, write: int) -> None:
    if point:
        os.environ["OFFLINE_LM_FAILPOINT"] = point
    if phase == "ingest":

        def acknowledge(counts: dict[str, Any]) -> None:
            os.write(write, b"%09d\n" % (counts["accepted"] + counts["duplicates"] + counts["quarantined"]))

        add(Store.create(store), log(seed), batch=BATCH, acknowledge=acknowledge)
    elif phase == "compact":
        compact(Store.open(store), target=100_000)  # several commits a table
    else:
        vacuum(Store.open(store), hours=0)


def _verify(store: str, seed: int, acknowledged: int) -> dict[str, int]:
    read, write = os.pipe()
    child = _fork(lambda: os.write(write, json.dumps(_look(store, seed, acknowledged)).encode()))
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        answer = stream.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the store cannot be read; see above")
    return json.loads(answer)


def _look(store: str, seed: int, acknowledged: int) -> dict[str, int]:
    if not Path(store, "tables", "episodes", "_delta_log", f"{0:020}.json").exists():
        return {"lost": acknowledged}
    wanted = {episode_id("crash", str(seed), name_of(i)): name_of(i) for i in range(acknowledged)}
    with Store.open(store).connect() as db:
        ids = [row[0] for row in db.execute("SELECT episode_id FROM stored_episodes").fetchall()]
        pages = db.execute("""
            SELECT e.provenance.native_id, list(s.observation ORDER BY s.step)
            FROM episodes AS e LEFT JOIN steps AS s USING (episode_id) GROUP BY ALL
        """).fetchall()
    partial = 0
    for name, seen in pages:
        partial += [page and page[:20] for page in seen] != [
            f"page {seed} {name} {t} {'x' * 500}"[:20] for t in range(1 + int(name) % 5)
        ]
    return {
        "lost": len(wanted.keys() - set(ids)),
        "duplicated": len(ids) - len(set(ids)),
        "partial": partial,
        "damaged": sum(not finding.harmless for finding in examine(store)),
    }


def _fork(work: Callable[[], Any]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
