"""The benchmarks run, at their smallest, and say what DESIGN section 9 asks; `run_all` keeps the README's table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "analysis" / "benchmarks"

SMALLEST = {
    "critic_update": "turns=2 rows=ours,offline_archer,floor threads=1",
    "heads": "updates=1 repeats=1 threads=1 batch=64",
    "embed": "steps=2 repeats=1 threads=1 batches=2",
    "candidates": "k=2 state=40 action=5 turns=2 page=20 layers=1 repeats=1",
    "ingest": "size_mb=1 repeats=1 formats=jsonl",
    "sampling": "steps=2048 batch=16 repeats=1",
    "sql_score": "rows=16 repeats=1 threads=1",
    "returns": "steps=20000 loop_steps=2000 repeats=1",
}


@pytest.fixture
def run_all(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import run_all  # pyright: ignore[reportMissingImports]

    return run_all


def result(ratio, goal):
    return {"ours": 1234.5, "peer": 0.5, "ratio": ratio, "goal": goal, "unit": "rows/s", "versions": {}}


def test_table_takes_new_rows_and_keeps_others(run_all):
    text = f"before\n{run_all.BEGIN}\n{run_all.END}\nafter\n"
    rows = {"heads": run_all.row("heads", result(2.0, 2.5)), "returns": run_all.row("returns", result(12.0, 10))}
    text = run_all.replaced(text, rows)
    assert "| `heads` | 1,234 | 0.5 | rows/s | 2 | 2.5 (missed) |" in text
    assert "| `returns` | 1,234 | 0.5 | rows/s | 12 | 10 |" in text
    text = run_all.replaced(text, {"heads": run_all.row("heads", result(3.0, 2.5))})
    assert "| 3 | 2.5 |" in text
    assert "(missed)" not in text
    assert "`returns`" in text
    assert text.startswith("before\n")
    assert text.endswith(f"{run_all.END}\nafter\n")
    assert text.count("| benchmark |") == 1


def test_a_file_without_marks_is_refused(run_all):
    with pytest.raises(SystemExit, match="no lines"):
        run_all.replaced("no table here", {})


def test_readme_has_a_row_for_every_benchmark(run_all):
    readme = (FOLDER.parents[1] / "README.md").read_text()
    table = readme.partition(run_all.BEGIN)[2].partition(run_all.END)[0]
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == list(run_all.NAMES)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_measures_itself_and_its_peer(name, tmp_path):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "json=true", *SMALLEST[name].split()]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    assert {"ours", "peer", "ratio", "goal", "unit", "versions", "rows"} <= found.keys()
    gain = found["ours"] / found["peer"]  # of a rate; of a time it is the other way round
    assert found["ratio"] in (pytest.approx(gain, rel=0.05, abs=0.01), pytest.approx(1 / gain, rel=0.05, abs=0.01))


def test_every_benchmark_of_the_table_is_tried(run_all):
    assert set(SMALLEST) == set(run_all.NAMES)
