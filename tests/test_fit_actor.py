"""Actors through the command line: a critic first, advantages out of the store, a policy saved and read back."""

import json

import numpy as np
import orjson
import pytest
from safetensors.torch import load_file

import offline_lm
from offline_lm import fit, ingest, query
from offline_lm.envs.shop import Site, Task, record
from offline_lm.policy import Policy

SMALL = [
    *("model=tiny", "model.stage.tokens=4000", "model.vocab_size=400"),
    *("model.width=32", "model.layers=1", "model.attention_heads=2"),
    *("optim.batch_size=64", "optim.warmup=2", "optim.steps=30", "threads=1", "logger=none", "baselines=false"),
    *("actor.steps=8", "actor.batch_size=64", "actor.warmup=1"),
]
CRITICS = {"best_of_n": "iql_lm", "awr": "iql_lm", "reinforce": "iql_lm", "ppo": "iql_lm", "archer_ppo": "iql_lm"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("actor")
    episodes = record([Task(Site.draw(3), i) for i in range(6)], 4)
    (folder / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'shop.jsonl'}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


def run(store, capsys, *arguments):
    capsys.readouterr()
    assert fit.main([f"data.store={store}", *SMALL, "json=true", *arguments]) == 0
    told = capsys.readouterr().out
    return {**json.loads(told.splitlines()[-1]), "told": told}


@pytest.fixture(scope="module")
def critic(store):
    assert fit.main([f"data.store={store}", *SMALL, "algo=iql_lm"]) == 0
    db = offline_lm.connect(store)
    ((run_id,),) = db.execute("SELECT run_id FROM runs WHERE status = 'finished'").fetchall()
    return run_id


@pytest.mark.parametrize(
    "algo",
    ["bc", "filtered_bc", "awr", "reinforce", "ppo", "archer_ppo", "grpo", "gigpo", "best_of_n", "algo.variant=gspo"],
)
def test_every_actor_trains_and_is_read_back(store, critic, capsys, algo):
    chosen = [f"algo={algo}"] if "=" not in algo else ["algo=grpo", algo]
    asked = [f"actor.critic={critic}"] if algo in CRITICS else []
    done = run(store, capsys, *chosen, *asked)
    assert done["steps"] == 8
    assert done["critic_run"] == (critic if asked else None)
    assert np.isfinite([done["metrics"][k] for k in ("logprob_all", "entropy")]).all()
    policy = Policy.from_pretrained(store / "runs" / done["run_id"])
    state = {"goal": "Buy a mug", "observation": "Welcome", "candidates": ["click[a]", "search[mug]", "click[a]"]}
    a, b, same = policy.logprobs([state])[0]
    assert a == same != b
    assert max(a, b) < 0
    choice = policy.act(state, temperature=0)
    assert choice.action == ("click[a]" if a > b else "search[mug]")


def test_a_critic_is_trained_first_where_none_is_named(store, capsys):
    done = run(store, capsys, "algo=awr", "algo.critic.tau=0.6")
    db = offline_lm.connect(store)
    runs = db.execute("SELECT run_id, algo, status FROM runs ORDER BY started_at DESC LIMIT 2").fetchall()
    assert runs == [(done["run_id"], "awr", "finished"), (done["critic_run"], "iql_lm", "finished")]
    assert db.execute("SELECT count(*) FROM values WHERE run_id = ?", [done["critic_run"]]).fetchall() != [(0,)]


def test_cloning_makes_what_was_logged_likelier(store, capsys):
    done = run(store, capsys, "algo=bc", "actor.steps=40", "actor.lr=3e-3")
    assert done["metrics"]["logprob_all"] > done["metrics"]["start_logprob_all"] + 5


def test_parts_of_a_batch_have_the_gradient_of_the_whole(store, critic, capsys):
    """One update of 8 forward passes and one of a single pass end in the same weights."""
    for algo in ("ppo", "grpo"):
        asked = [
            f"algo={algo}",
            f"actor.critic={critic}",
            "actor.steps=1",
            "actor.clone_first=0",
            "actor.weight_decay=0",
        ]
        runs = [run(store, capsys, *asked, f"actor.row_tokens={n}")["run_id"] for n in (256, 1_000_000)]
        db = offline_lm.connect(store)
        norms = [
            db.execute("SELECT value FROM metrics WHERE run_id = ? AND name = 'actor_grad_norm'", [r]).fetchall()[0][0]
            for r in runs
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        few, one = (load_file(store / "runs" / r / "actor" / "model.safetensors") for r in runs)
        assert max((few[k] - one[k]).abs().max() for k in few) < 1e-5


def test_ratios_begin_at_one_and_are_cached(store, critic, capsys):
    asked = ["algo=ppo", f"actor.critic={critic}", "actor.steps=1", "actor.clone_first=0"]
    done = run(store, capsys, *asked)
    assert "actor.behaviour=logged" not in done["told"]
    assert "as it is now" in done["told"]
    assert done["metrics"]["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert done["metrics"]["ess"] == pytest.approx(1, abs=1e-4)
    files = sorted((store / "cache" / "logprobs").iterdir())
    run(store, capsys, *asked)
    assert sorted((store / "cache" / "logprobs").iterdir()) == files != []


def test_logs_without_log_probabilities_say_so(store, capsys):
    assert fit.main([f"data.store={store}", *SMALL, "algo=grpo", "actor.behaviour=logged"]) == 2
    assert "actor.behaviour=start computes them" in capsys.readouterr().err


def test_an_actor_goes_on_from_another(store, capsys):
    first = run(store, capsys, "algo=bc", "actor.steps=20", "actor.lr=3e-3")
    second = run(store, capsys, "algo=filtered_bc", f"actor.path=run:{first['run_id']}")
    assert second["metrics"]["start_logprob_all"] == pytest.approx(first["metrics"]["logprob_all"], abs=1e-3)
    assert fit.main([f"data.store={store}", *SMALL, "algo=bc", "actor.path=run:nothing"]) == 2


def test_groups_that_say_nothing_raise_an_alarm(tmp_path, capsys):
    episodes = list(record([Task(Site.draw(3), i) for i in range(6)], 1))
    (tmp_path / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={tmp_path / 'shop.jsonl'}", f"store={tmp_path / 'store'}"]) == 0
    done = run(tmp_path / "store", capsys, "algo=grpo")
    assert done["metrics"]["silent_groups"] == 1.0
    assert [alarm["name"] for alarm in done["alarms"]] == ["silent_groups"]
    assert f"ALARM: {done['alarms'][0]['sentence']}" in done["told"]
    capsys.readouterr()
    asked = ["analysis/alarms.sql", f"run={done['run_id']}", f"store={tmp_path / 'store'}", "format=json"]
    assert query.main(asked) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["critic"], row["alarm"], row["value"], row["threshold"]) == ("grpo", "silent_groups", 1.0, 0.95)
    assert row["sentence"] == done["alarms"][0]["sentence"]


def test_an_actor_is_not_swept(store, capsys):
    assert fit.main([f"data.store={store}", *SMALL, "algo=bc", "sweep={seed:[0,1]}"]) == 2
    assert "--multirun" in capsys.readouterr().err


def test_the_latest_critic_is_the_newest_run_with_values(store, critic, capsys):
    newer = run(store, capsys, "algo=iql_lm", "algo.tau=0.6")["run_id"]
    assert run(store, capsys, "algo=bc", "actor.steps=1")["critic_run"] is None  # an actor's run, finished last
    assert run(store, capsys, "algo=awr", "actor.critic=latest", "actor.steps=1")["critic_run"] == newer != critic


def test_latest_without_any_values_is_told(tmp_path, capsys):
    (tmp_path / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in record([Task(Site.draw(3), 0)], 2)))
    assert ingest.main([f"path={tmp_path / 'shop.jsonl'}", f"store={tmp_path / 'store'}"]) == 0
    assert fit.main([f"data.store={tmp_path / 'store'}", *SMALL, "algo=awr", "actor.critic=latest"]) == 2
    assert "actor.critic=latest: no finished run has values" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["run:nothing", "/no/such/folder"])
def test_a_policy_to_begin_with_is_looked_for_before_the_critic_trains(store, capsys, path):
    db = offline_lm.connect(store)
    before = db.execute("SELECT count(*) FROM runs").fetchall()
    assert fit.main([f"data.store={store}", *SMALL, "algo=awr", f"actor.path={path}"]) == 2
    told = capsys.readouterr().err
    assert "no run `nothing`" in told or "actor.path=/no/such/folder: no causal language model" in told
    assert offline_lm.connect(store).execute("SELECT count(*) FROM runs").fetchall() == before


def test_a_critic_without_these_steps_is_refused(store, capsys):
    assert fit.main([f"data.store={store}", *SMALL, "algo=awr", "actor.critic=nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
