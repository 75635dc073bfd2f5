"""The main job, whole and small: logs in, a critic trained, values out in SQL."""

import json
import os
import signal
import subprocess
import sys
import time

import orjson
import pytest

import offline_lm
from offline_lm import fit, ingest
from offline_lm.envs.shop import Site, Task, record

SMALL = [
    *("model=tiny", "model.stage.tokens=4000", "model.vocab_size=400"),
    *("model.width=32", "model.layers=1", "model.attention_heads=2"),
    *("optim.batch_size=64", "optim.warmup=2", "threads=1", "logger=none"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    episodes = record([Task(Site.draw(3), i) for i in range(6)], 4)
    (folder / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'shop.jsonl'}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


def run(store, capsys, *arguments):
    assert fit.main([f"data.store={store}", *SMALL, "optim.steps=30", "json=true", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_values_stand_beside_the_steps_and_are_the_critics(store, capsys):
    done = run(store, capsys, "algo=iql_lm")
    assert set(done["baselines"]) == {"iql_lm", "q_mc", "position_only", "constant"}
    db = offline_lm.connect(store)
    (counts,) = db.execute("SELECT count(*), count(*), count(action) FROM steps").fetchall()
    assert db.execute("SELECT count(*), count(v), count(q) FROM latest_values").fetchall() == [counts]
    # a final observation has a value, and neither action nor advantage
    assert db.execute("SELECT count(q), count(advantage) FROM latest_values WHERE is_final_observation").fetchall() == [
        (0, 0)
    ]
    assert db.execute("SELECT count(*) FROM latest_values WHERE abs(advantage - (q - v)) > 1e-9").fetchall() == [(0,)]
    # the values are those of the saved critic
    goal, page, episode, value = db.execute(
        "SELECT goal, observation, episode_id, v FROM latest_values WHERE step = 0 ORDER BY episode_id LIMIT 1"
    ).fetchone() or ("", "", "", 0)
    candidates = db.execute(
        "SELECT action, q FROM candidate_values WHERE run_id = ? AND episode_id = ? AND step = 0 ORDER BY candidate",
        [done["run_id"], episode],
    ).fetchall()
    critic = offline_lm.Critic.from_pretrained(store / "runs" / done["run_id"])
    state = {"goal": goal, "observation": page, "candidates": [action for action, _ in candidates]}
    (score,) = critic.score([state])
    assert score.v == pytest.approx(value, abs=1e-5)
    assert score.q == pytest.approx([q for _, q in candidates], abs=1e-5)
    # and the TD errors are those of the macro
    (apart,) = db.execute(
        "SELECT count(*) FROM td_residuals(?, 0.95) JOIN run_values USING (episode_id, step)"
        " WHERE run_id = ? AND coalesce(abs(td_residual - td_error) > 1e-6, td_error IS NOT NULL)",
        [done["run_id"], done["run_id"]],
    ).fetchone() or (None,)
    assert apart == 0


def test_another_algorithm_reuses_backbone_and_features(store, capsys):
    first = run(store, capsys, "algo=q_mc")
    cached = sorted(p.name for kind in ("backbones", "tokens", "features") for p in (store / "cache" / kind).iterdir())
    second = run(store, capsys, "algo=critic_mc", "baselines=false")
    again = sorted(p.name for kind in ("backbones", "tokens", "features") for p in (store / "cache" / kind).iterdir())
    assert cached == again
    assert first["run_id"] != second["run_id"]
    db = offline_lm.connect(store)
    counts = "SELECT count(v) > 0, count(q), count(advantage) > 0 FROM run_values WHERE run_id = ?"
    assert db.execute(counts, [second["run_id"]]).fetchall() == [(True, 0, True)]


def test_the_same_seed_gives_the_same_values(store, capsys):
    runs = [run(store, capsys, "algo=q_mc", "baselines=false")["run_id"] for _ in range(2)]
    db = offline_lm.connect(store)
    (apart,) = db.execute(
        "SELECT count(*) FROM run_values AS a JOIN run_values AS b USING (episode_id, step)"
        " WHERE a.run_id = ? AND b.run_id = ? AND (a.v <> b.v OR a.q <> b.q)",
        runs,
    ).fetchone() or (None,)
    assert apart == 0


@pytest.mark.parametrize("loss", ["mse", "hl_gauss"])
def test_backbone_and_heads_can_be_trained_together(store, capsys, loss):
    done = run(store, capsys, "model.train=full", f"model.heads.loss={loss}", "baselines=false", "optim.steps=4")
    assert done["steps"] == 4
    assert offline_lm.connect(store).execute(
        "SELECT status FROM runs WHERE run_id = ?", [done["run_id"]]
    ).fetchall() == [("finished",)]


def test_interrupting_leaves_a_usable_run(store):
    command = [sys.executable, "-m", "offline_lm.fit", f"data.store={store}", *SMALL, "optim.steps=1000000"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "baselines=false"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert process.stderr is not None
    shown, deadline = "", time.monotonic() + 120
    while " v=" not in shown and time.monotonic() < deadline:  # losses are logged: updates are under way
        shown = (shown + process.stderr.read(64))[-200:]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, shown + err
    assert "interrupted after" in out
    db = offline_lm.connect(store)
    run_id, status = db.execute("SELECT run_id, status FROM runs ORDER BY started_at DESC LIMIT 1").fetchone() or (
        "",
        "",
    )
    assert status == "interrupted"
    (scored,) = db.execute("SELECT count(v) FROM run_values WHERE run_id = ?", [run_id]).fetchone() or (0,)
    assert scored > 100
    assert offline_lm.Critic.from_pretrained(store / "runs" / run_id).config["has_q"]
