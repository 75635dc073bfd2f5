"""The benchmarks run, at their smallest, and say what DESIGN section 9 asks; `run_all` keeps the README's table."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from offline_lm.envs.exact import End, TextMDP
from offline_lm.ope.credit import Tasks, sample, true_advantages

FOLDER = Path(__file__).parents[1] / "analysis" / "benchmarks"

SMALLEST = {
    "critic_update": "turns=2 rows=ours,offline_archer,floor threads=1",
    "actor_update": "batch=2 data=shop updates=1 layers=1 rows=trl",
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
    if name == "actor_update" and find_spec("trl") is None:  # which nothing else needs
        assert (found["peer"], found["ratio"]) == (None, None)
        assert "no peer" in ran.stderr
        assert found["ours"] > 0
        return
    gain = found["ours"] / found["peer"]  # of a rate; of a time it is the other way round
    assert found["ratio"] in (pytest.approx(gain, rel=0.05, abs=0.01), pytest.approx(1 / gain, rel=0.05, abs=0.01))


def test_every_benchmark_of_the_table_is_tried(run_all):
    assert set(SMALLEST) == set(run_all.NAMES)


# -- gradient_variance, which has no peer ----------------------------------------------------------------------


@pytest.fixture
def variance(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gradient_variance  # pyright: ignore[reportMissingImports]

    return gradient_variance


def tasks_of(moves, limit):
    start = next(iter(moves))
    mdp = TextMDP.explore(
        start, lambda s: (s[0], moves[s]), benchmark="hall", seed=0, number=0, goal="Out.", limit=limit
    )
    return Tasks.stack([mdp], [np.full(mdp.next.shape, 0.5)])


def tabular(states):
    """grad log pi of a softmax over two actions, at even chances: its logits are the weights."""
    out = np.zeros((states, 2, states, 2))
    for s in range(states):
        out[s, :, s] = [[0.5, -0.5], [-0.5, 0.5]]
    return out.reshape(states, 2, -1)


def test_variance_and_bias_of_a_bandit_by_hand(variance):
    tasks = tasks_of({("a",): [("left", End(0.0, 0.0)), ("right", End(1.0, 0.0))]}, limit=1)
    logs = sample(tasks, episodes=1, resamples=400, seed=0)
    length = np.sqrt(1 / 8)  # of the expected gradient, (-1/4, 1/4)
    np.testing.assert_allclose(variance.expected(tabular(1), tasks, 0.9), [-0.25, 0.25])
    true = variance.gradients(tabular(1), logs, true_advantages(logs, tasks, gamma=0.9))
    np.testing.assert_allclose(true, np.broadcast_to([-0.25, 0.25], true.shape))  # whichever action was drawn
    assert variance.spread(true, true, length) == {"variance": 0.0, "bias_squared": 0.0}

    found = variance.spread(variance.gradients(tabular(1), logs, logs.reward), true, length)
    n, p = 400, logs.reward.mean()  # it is (-1/2, 1/2) in a share p of the batches, else 0
    assert found["variance"] == pytest.approx(p * (1 - p) / 2 * n / (n - 1))
    assert found["bias_squared"] == pytest.approx((n * (2 * p - 1) ** 2 - 1) / (n - 1))
    assert variance.spread(0 * true, true, length)["bias_squared"] == pytest.approx(1.0)  # off by the whole length


def test_expected_gradient_is_that_of_batches_in_the_mean(variance):
    tasks = tasks_of(
        {
            ("a",): [("left", End(0.0, 0.0)), ("right", ("b",))],
            ("b",): [("stay", ("b",)), ("door", End(1.0, 0.0))],
        },
        limit=2,
    )
    expected = variance.expected(tabular(2), tasks, 0.5)
    np.testing.assert_allclose(expected, [-0.0625, 0.0625, -0.125, 0.125])  # V_1(b) = 1/2, V_0(a) = 1/8
    logs = sample(tasks, episodes=3, resamples=3000, seed=0)
    found = variance.gradients(tabular(2), logs, true_advantages(logs, tasks, gamma=0.5))
    assert found.shape == (3000, 4)
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (abs(found.mean(axis=0) - expected) < 4 * error + 1e-12).all()


def test_gradient_variance_runs(tmp_path):
    settings = "json=true seeds=0 horizons=1 tasks=1 episodes=4 batches=200 sketch=64"
    command = [sys.executable, str(FOLDER / "gradient_variance.py"), *settings.split(), f"plot={tmp_path / 'v.svg'}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = {(r["baseline"], r["critic"]): r for r in json.loads(ran.stdout.strip().splitlines()[-1])["rows"]}
    assert len(rows) == 8
    assert rows["none", ""]["variance"] == 1.0
    one_step = ("variance", "noise", "bias")  # with a single step V, TD(0) and GAE are one
    assert [rows["TD(0)", "exact"][k] for k in one_step] == pytest.approx([rows["V", "exact"][k] for k in one_step])
    assert rows["TD(0)", "exact"]["bias"] == pytest.approx(0.0, abs=1e-6)
    # the mean of four returns holds a step's own: the gradient is three quarters of what it should be
    assert rows["mean", ""]["bias"] == pytest.approx(0.25, abs=0.06)
    assert "<svg" in (tmp_path / "v.svg").read_text()
