"""Every algorithm through the command line: values come out, the critic is usable, and its settings are checked."""

import dataclasses
import importlib
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import yaml

import offline_lm
from offline_lm import fit, ingest
from offline_lm._fit_train import target_rate
from offline_lm.envs.shop import Site, Task, record
from offline_lm.paths import CONF

SMALL = [
    *("model=tiny", "model.stage.tokens=3000", "model.vocab_size=400"),
    *("model.width=32", "model.layers=1", "model.attention_heads=2"),
    *("optim.batch_size=64", "optim.warmup=2", "optim.steps=20", "optim.log_every=1", "threads=1", "logger=none"),
    *("baselines=false", "json=true"),
]
ALL = sorted(file.stem for file in (CONF / "algo").glob("*.yaml"))
ACTORS = {"archer", "archer_ppo", "awr", "bc", "best_of_n", "filtered_bc", "gigpo", "grpo", "ilql", "ppo", "reinforce"}
ALGOS = [name for name in ALL if name not in {"d3rlpy", *ACTORS}]  # test_fit_actor, _archer, _ilql have the others
OF_STATES = {"critic_mc", "critic_td"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    episodes = record([Task(Site.draw(3), i) for i in range(5)], 4)
    (folder / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'shop.jsonl'}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


def run(store, capsys, *arguments):
    assert fit.main([f"data.store={store}", *SMALL, *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]


def values(store, run_id):
    query = "SELECT v, q FROM run_values WHERE run_id = ? ORDER BY episode_id, step"
    return offline_lm.connect(store).execute(query, [run_id]).fetchall()


def losses(store, run_id, name):
    query = "SELECT value FROM metrics WHERE run_id = ? AND name = ? ORDER BY step"
    return [value for (value,) in offline_lm.connect(store).execute(query, [run_id, name]).fetchall()]


@pytest.mark.parametrize("loss", ["mse", "hl_gauss"])
@pytest.mark.parametrize("algo", ALGOS)
def test_every_algorithm_learns_and_writes_values(store, capsys, algo, loss):
    run_id = run(store, capsys, f"algo={algo}", f"model.heads.loss={loss}", "algo.polyak=0.01")
    rows = values(store, run_id)
    assert all(math.isfinite(v) for v, _ in rows)
    assert any(q is not None for _, q in rows) == (algo not in OF_STATES)
    for name in ("loss/v", *(["loss/q"] if algo not in OF_STATES else [])):
        seen = losses(store, run_id, name)
        assert sum(seen[-5:]) < sum(seen[:5]), name
    critic = offline_lm.Critic.from_pretrained(store / "runs" / run_id)
    (score,) = critic.score([{"goal": "Buy a mug", "observation": "a page", "candidates": ["back", "buy"]}])
    assert math.isfinite(score.v)
    assert (score.q is None) == (algo in OF_STATES)


@pytest.mark.parametrize("name", ["IQL", "CQL"])
def test_an_algorithm_of_d3rlpy_writes_into_the_same_tables(store, capsys, name):
    pytest.importorskip("d3rlpy")
    run_id = run(store, capsys, "algo=d3rlpy", f"algo.name={name}", "optim.steps=10", "optim.batch_size=16")
    logged = offline_lm.connect(store).execute("SELECT DISTINCT algo FROM runs WHERE run_id = ?", [run_id]).fetchall()
    assert logged == [("d3rlpy",)]
    rows = values(store, run_id)
    assert len({q for _, q in rows}) > len(rows) / 2
    assert all(math.isfinite(v) for v, _ in rows)
    # the saved critic is d3rlpy's networks
    goal, page, value = offline_lm.connect(store).execute(
        "SELECT r.goal, r.observation, r.v FROM run_values AS r WHERE run_id = ? AND r.step = 0"
        " ORDER BY episode_id LIMIT 1",
        [run_id],
    ).fetchone() or ("", "", 0)
    (score,) = offline_lm.Critic.from_pretrained(store / "runs" / run_id).score([{"goal": goal, "observation": page}])
    assert score.v == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("algo", ["q_learning", "cql_lm"])
def test_candidates_are_there_also_where_the_backbone_is_trained(store, capsys, algo):
    few = ("model.train=full", "optim.batch_tokens=4000", "optim.steps=2")
    run_id = run(store, capsys, f"algo={algo}", *few)
    assert all(math.isfinite(v) for v, _ in values(store, run_id))


def test_critic_first_is_monte_carlo_and_then_the_algorithm(store, capsys):
    monte_carlo, never = (run(store, capsys, f"algo={algo}") for algo in ("q_mc", "sarsa"))
    always, half = (run(store, capsys, "algo=sarsa", f"optim.critic_first={share}") for share in (1.0, 0.5))
    assert values(store, always) == values(store, monte_carlo)
    of = {run_id: losses(store, run_id, "loss/q") for run_id in (monte_carlo, never, half)}
    assert of[half][:10] == of[monte_carlo][:10]
    assert of[half][10:] != of[monte_carlo][10:]
    assert of[half][0] != of[never][0]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("algo=critic_td algo.lam=1.5", "algo.lam=1.5: a number from 0 to 1 is wanted"),
        ("algo=critic_td algo.n_step=0", "algo.n_step=0: a whole number from 1 is wanted"),
        ("algo=sarsa algo.n_step=2.5", "algo.n_step=2.5: a whole number from 1 is wanted"),
        ("algo=cql_lm algo.alpha=-1", "algo.alpha=-1: a number from 0 is wanted"),
        ("algo=cql_lm algo.base=dqn", "algo.base=dqn: iql or q_learning is wanted"),
        ("algo=weighted_iql algo.weight=-0.1", "algo.weight=-0.1: a number from 0 is wanted"),
        ("algo=d3rlpy algo.name=DQN", "algo.name=DQN: one of IQL, CQL, AWAC"),
        ("algo=d3rlpy model.train=full", "model.train=full: algo=d3rlpy takes model.train=heads alone"),
        ("algo=sarsa optim.critic_first=2", "optim.critic_first=2: a number from 0 to 1 is wanted"),
    ],
)
def test_a_setting_out_of_range_is_told(store, capsys, setting, told):
    assert fit.main([f"data.store={store}", *setting.split()]) == 2
    assert told in capsys.readouterr().err


def test_targets_follow_as_fast_as_values_must_travel():
    def of(lengths, updates, *links, **most):
        offsets = np.r_[0, np.cumsum(lengths)]
        acted = np.ones(offsets[-1], bool)
        held_out = np.zeros(len(lengths), bool)
        held_out[-1] = True  # does not count
        replay: Any = SimpleNamespace(acted=acted, offsets=offsets, held_out=held_out)
        return target_rate(replay, updates, *links, **most)

    assert of([15] * 20 + [500], 1500) == pytest.approx(0.01)
    assert of([100] * 20 + [1], 1500) == pytest.approx(100 / 1500)
    assert of([1] * 20, 1500) == 0.005
    assert of([900] * 20, 1500) == 0.1
    # ilql's travel a token at a time: two of each turn
    assert of([10] * 20 + [500], 1000, np.full(700, 2)) == pytest.approx(0.02)
    assert of([900] * 20, 1500, np.full(18_000, 2), most=0.5) == 0.5


@pytest.mark.parametrize("algo", ALL)
def test_each_yaml_names_every_setting_of_its_algorithm(algo):
    """What is not there cannot be set on the command line."""
    settings = yaml.safe_load((CONF / "algo" / f"{algo}.yaml").read_text())
    settings.pop("defaults", None)  # a critic of its own
    module, _, name = settings.pop("_target_").rpartition(".")
    algo = getattr(importlib.import_module(module), name)
    assert set(settings) == {field.name for field in dataclasses.fields(algo)}
