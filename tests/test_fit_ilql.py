"""`fit algo=ilql` through the command line: values in the store, a policy to act with, whatever fits a pass."""

import json
import math

import numpy as np
import orjson
import pytest

import offline_lm
from offline_lm import fit, ingest
from offline_lm.envs.shop import Site, Task, record
from offline_lm.policy import Policy

SMALL = [
    *("algo=ilql", "algo.polyak=0.5", "model=tiny", "model.stage.tokens=0", "model.vocab_size=300"),
    *("model.width=16", "model.layers=1", "model.attention_heads=2", "model.heads.hidden=16", "data.history=1"),
    *("actor.batch_size=8", "actor.warmup=1", "actor.log_every=1", "actor.lr=1e-2", "threads=1", "logger=none"),
    *("baselines=false", "json=true"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ilql")
    episodes = record([Task(Site.draw(3), i) for i in range(3)], 4)
    (folder / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'shop.jsonl'}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


def run(store, capsys, *arguments):
    assert fit.main([f"data.store={store}", *SMALL, *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]


def losses(store, run_id):
    query = "SELECT name, list(value ORDER BY step) FROM metrics WHERE run_id = ? AND name LIKE 'loss/%' GROUP BY name"
    return dict(offline_lm.connect(store).execute(query, [run_id]).fetchall())


def test_it_learns_writes_values_and_acts(store, capsys):
    run_id = run(store, capsys, "actor.steps=12", "actor.batch_size=64")  # every update on all of the training side
    seen = losses(store, run_id)
    assert set(seen) == {"loss/v", "loss/q", "loss/cql", "loss/lm"}
    for name in ("loss/q", "loss/cql", "loss/lm"):
        assert sum(seen[name][-4:]) < sum(seen[name][:4]), name
    db = offline_lm.connect(store)
    assert ("finished", "ilql") in db.execute("SELECT status, algo FROM runs WHERE run_id = ?", [run_id]).fetchall()
    (counts,) = db.execute("SELECT count(*), count(*), count(action) FROM steps").fetchall()
    kept = db.execute("SELECT count(*), count(v), count(q) FROM run_values WHERE run_id = ?", [run_id]).fetchall()
    assert kept == [counts]
    # the logged action's value is one of the candidates'
    differ = """
        SELECT count(*) FROM run_values AS v JOIN candidate_values AS c USING (run_id, episode_id, step)
        WHERE run_id = ? AND c.executed AND (c.q <> v.q OR v.q <> list_min(v.q_ensemble))
    """
    assert db.execute(differ, [run_id]).fetchall() == [(0,)]
    assert db.execute("SELECT count(*) FROM candidate_values WHERE run_id = ?", [run_id]).fetchone() != (0,)

    goal, page, likelihood = db.execute(
        "SELECT s.goal, s.observation, d.value FROM run_values AS s JOIN diagnostics AS d USING (run_id)"
        " WHERE s.step = 0 AND run_id = ? AND d.name = 'logprob_all' AND d.split = 'held_out'"
        " ORDER BY s.episode_id LIMIT 1",
        [run_id],
    ).fetchone() or ("", "", 0.0)
    assert likelihood < 0
    policy = Policy.from_pretrained(store / "runs" / run_id)
    state = {"goal": goal, "observation": page, "candidates": ["back", "click[1]", "buy"]}
    (perturbed,) = policy.logprobs([state])
    assert np.isfinite(perturbed).all()
    assert policy.act(state, temperature=0).action == state["candidates"][int(perturbed.argmax())]
    policy.config["ilql"]["beta"] = 0.0
    (imitates,) = policy.logprobs([state])
    policy.heads = None  # the language model itself
    np.testing.assert_allclose(policy.logprobs([state])[0], imitates, atol=1e-4)
    assert abs(perturbed - imitates).max() > 1e-3


def test_an_update_does_not_depend_on_what_fits_a_pass(store, capsys):
    # a part of 1 token is one state: V of the next turn then always lies in another part
    one, many = (
        losses(store, run(store, capsys, "actor.steps=2", f"actor.row_tokens={n}", "model.target=heads"))
        for n in (100_000, 1)
    )
    for name, values in one.items():
        assert values == pytest.approx(many[name], rel=1e-3), name
        assert all(math.isfinite(x) for x in values)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.heads.loss=hl_gauss", "model.heads.loss=hl_gauss: algo=ilql takes model.heads.loss=mse alone"),
        ("actor.critic=latest", "actor.critic=latest: algo=ilql takes actor.critic=null alone"),
        ("algo.beta=-1", "algo.beta=-1: a number from 0 is wanted"),
    ],
)
def test_a_setting_that_it_does_not_take_is_told(store, capsys, setting, told):
    assert fit.main([f"data.store={store}", *SMALL, setting]) == 2
    assert told in capsys.readouterr().err
