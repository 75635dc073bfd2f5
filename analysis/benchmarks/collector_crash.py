"""Kills the collector, and its browser, at random moments, and counts what the store lost, half kept or kept twice.

    python analysis/benchmarks/collector_crash.py kills=50 terms=50 [seed=0] [episodes=60] [env=miniwob] [json=true]

Half of the kills are SIGKILLs of the collector, half of its browser; as many SIGTERMs as `terms` says. After each the
collector is called again, and goes on. What is looked at every time: every episode that the store had shown is still
there, once, with all its steps; the doctor finds nothing; no process that the collector had started is alive; after a
SIGTERM it said that what was under way is dropped. When a store is full it must equal, row for row, one that was never
disturbed, but for episodes that a dead browser cut short (`end_reason` crash): these are counted.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from offline_lm.store import Store
from offline_lm.store.check import examine

LINGER = 10.0
"""Seconds that a dead collector's children have to go."""

ROWS = """SELECT episode_id, end_reason, n_steps, list([s.observation, s.action, s.reward::VARCHAR] ORDER BY s.step)
    FROM episodes LEFT JOIN steps s USING (episode_id) GROUP BY ALL"""
DISTURBED = ("SIGKILL of the collector", "SIGKILL of the browser", "SIGTERM", "stores", "episodes", "cut short")
WRONG = ("lost", "doubled", "partial", "other", "damaged", "orphans", "silent", "missing")


def main() -> int:
    given = dict(arg.split("=", 1) for arg in sys.argv[1:])
    rng = random.Random(int(given.get("seed", 0)))
    left = Counter({"kill": int(given.get("kills", 50)), "term": int(given.get("terms", 50))})
    env, episodes = given.get("env", "miniwob"), int(given.get("episodes", 60))
    command = [sys.executable, "-m", "offline_lm.collect", f"env={env}", "policy=random", f"episodes={episodes}"]
    command += ["max_steps=4", f"sandbox={str(os.geteuid() != 0).lower()}", "json=true"]
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = f"{folder}/undisturbed"
        began = time.monotonic()
        subprocess.run([*command, f"store={undisturbed}"], check=True, capture_output=True, cwd=folder)
        longest = time.monotonic() - began
        wanted = rows(undisturbed)
        while left.total():
            store, shown = f"{folder}/store", dict[str, tuple[Any, ...]]()
            while left.total():
                what = rng.choice([name for name, n in left.items() if n])
                ended, found = attempt([*command, f"store={store}"], what, rng, longest, folder)
                counted.update(found)
                left[what] -= not ended
                shown = look(store, shown, wanted, counted)
                if ended:
                    counted["stores"] += 1
                    counted["missing"] += len(wanted.keys() - shown.keys())
                    break
            shutil.rmtree(store, ignore_errors=True)
    bad = sum(counted[key] for key in WRONG)
    if given.get("json") == "true":
        print(json.dumps({**{key: counted[key] for key in DISTURBED + WRONG}, "ok": not bad}))
    else:
        print(", ".join(f"{key} {counted[key]}" for key in DISTURBED + WRONG))
    return int(bool(bad))


def attempt(
    command: list[str], what: str, rng: random.Random, longest: float, folder: str
) -> tuple[bool, dict[str, int]]:
    """Whether the collector ended before it was disturbed, and what is to be counted."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder)
    chromium = None
    browser = what == "kill" and "env=miniwob" in command and rng.random() < 0.5
    deadline = time.monotonic() + rng.uniform(0.0, longest)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    while browser and process.poll() is None and not (chromium := _browser(process.pid)):  # it comes late
        time.sleep(0.02)
    if process.poll() is not None:
        process.communicate()
        return True, {"orphans": _orphans({})}
    children = _descendants(process.pid)
    if chromium:
        os.kill(chromium, signal.SIGKILL)
        process.communicate(timeout=300)
        if process.returncode:
            raise SystemExit(f"the collector did not go on without its browser: it ended with {process.returncode}")
        return False, {"SIGKILL of the browser": 1, "orphans": _orphans(children)}
    if what == "kill":
        process.kill()
        process.communicate()
        return False, {"SIGKILL of the collector": 1, "orphans": _orphans(children)}
    process.terminate()
    told, _ = process.communicate(timeout=120)
    # before it listens for signals there is nothing under way, and Python's own way to end is as good
    silent = process.returncode not in (143, -signal.SIGTERM) or (process.returncode == 143 and "stopped" not in told)
    return False, {"SIGTERM": 1, "silent": int(silent), "orphans": _orphans(children)}


def look(
    store: str, shown: dict[str, tuple[Any, ...]], wanted: dict[str, tuple[Any, ...]], counted: Counter[str]
) -> dict[str, tuple[Any, ...]]:
    """The rows of the store; counts what is wrong with them."""
    if not Path(store, "tables", "episodes", "_delta_log", f"{0:020}.json").exists():
        counted["lost"] += len(shown)
        return {}
    found = rows(store)
    counted["lost"] += len(shown.keys() - found.keys())
    counted["other"] += sum(found[key] != row for key, row in shown.items() if key in found)
    for key in found.keys() - shown.keys():
        end, n, steps = found[key]
        counted["episodes"] += 1
        if end == "crash":
            counted["cut short"] += 1
        else:
            counted["other"] += found[key] != wanted[key]
        counted["partial"] += sum(action is not None for _, action, _ in steps) != n
    with Store.open(store).connect() as db:
        ((n, distinct),) = db.execute("SELECT count(*), count(DISTINCT episode_id) FROM stored_episodes").fetchall()
    counted["doubled"] += n - distinct
    counted["damaged"] += sum(not finding.harmless for finding in examine(store))
    return found


def rows(store: str) -> dict[str, tuple[Any, ...]]:
    with Store.open(store).connect() as db:
        return {str(key): tuple(rest) for key, *rest in db.execute(ROWS).fetchall()}


def _descendants(pid: int) -> dict[int, str]:
    """Live processes that `pid` started, and those that they did, by number, each with its time of start."""
    stats = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    parents = {child: int(stat[1]) for child, stat in stats.items() if stat}
    found, front = dict[int, str](), {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front}
        found |= {child: born for child in front if (born := _born(child))}
    return found


def _born(pid: int) -> str | None:
    """When a live process started, in ticks; None of one that is gone, or dead and not yet buried."""
    stat = _stat(pid)
    return stat[19] if stat and stat[0] != "Z" else None


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name; None if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _browser(pid: int) -> int | None:
    """The browser's main process among what `pid` started."""
    for child in _descendants(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        options = [word.partition(b"=")[0] for word in words[1:]]
        if b"chrom" in words[0] and b"--type" not in options and b"--user-data-dir" in options:
            return child
    return None


def _orphans(children: dict[int, str]) -> int:
    """How many of these are still there some seconds later."""
    deadline = time.monotonic() + LINGER
    while alive := sum(_born(pid) == born for pid, born in children.items()):
        if time.monotonic() > deadline:
            return alive
        time.sleep(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
