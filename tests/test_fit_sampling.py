"""Sampling through the command line: a strategy trains, says what it does, and a mistake is told."""

import json

import numpy as np
import orjson
import pytest
from omegaconf import OmegaConf

import offline_lm
from offline_lm import _fit_checks, _fit_train, fit, ingest
from offline_lm.batches import replay as replays
from offline_lm.envs.shop import Site, Task, record

SMALL = [
    *("model=tiny", "model.stage.tokens=1000", "model.vocab_size=300", "model.width=32", "model.layers=1"),
    *("model.attention_heads=2", "optim.batch_size=40", "optim.warmup=2", "optim.steps=6", "threads=1", "logger=none"),
    *("baselines=false", "json=true"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    episodes = list(record([Task(Site.draw(3), i) for i in range(5)], 4))
    for i, one in enumerate(episodes):
        one["policy_id"] = f"p{i % 2}"
    (folder / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'shop.jsonl'}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


@pytest.fixture
def run(store, capsys, monkeypatch):
    """Run id, what was printed, the replay, the rows of every update and their weights."""
    seen = []
    update = _fit_train.Learner.update

    def spied(self, batch, rows, step):
        seen.append((rows, self.weights))
        update(self, batch, rows, step)

    monkeypatch.setattr(_fit_train.Learner, "update", spied)

    def run(*arguments):
        seen.clear()
        code = fit.main([f"data.store={store}", *SMALL, *arguments])
        said = capsys.readouterr()
        if code:
            return said.err
        with offline_lm.connect(store) as db:
            replay = replays.select(db, where="true", gamma=0.95, truncated="outcome", held_out=0.2, seed=0)
            policy = dict(db.execute("SELECT episode_id, policy_id FROM episodes").fetchall())
        run_id = json.loads(said.out.splitlines()[-1])["run_id"]
        return run_id, said.out, replay, [policy[e] for e in replay.episode_ids], list(seen)

    return run


def episodes_of(replay, rows):
    """int64: the episodes of a batch, again and again where they stand there so often."""
    assert np.isin(rows[0], replay.offsets[:-1])
    return replay.episode_of[rows[np.isin(rows, replay.offsets[:-1])]]


def test_what_is_asked_for_is_what_is_trained_on(run):
    first, _, replay, _, plain = run("algo=q_mc")
    was = replays.episode_batches(replay, 40, 0)
    assert all(np.array_equal(rows, next(was)) and weights is None for rows, weights in plain)

    mix = "data.sampling.mix={p0:0.5,new:{where:\"policy_id = 'p1'\",share:0.5}}"
    _, said, _, policies, mixed = run("algo=iql_lm", "data.sampling.strategy=success", "data.sampling.capacity=12", mix)
    assert "capacity=12: the newest of 16 training episodes, by order of ingest" in said
    for rows, _ in mixed:
        batch = episodes_of(replay, rows)
        assert abs(sum(policies[e] == "p0" for e in batch) - len(batch) / 2) < 1
        assert abs(replay.success[batch].sum() - len(batch) / 2) < 2
    assert len(np.unique(np.concatenate([episodes_of(replay, rows) for rows, _ in mixed]))) <= 12

    # and through the backbone, with the weights of prioritised sampling in the losses
    whole = ("algo=q_mc", "model.train=full", "optim.batch_tokens=2000", "optim.steps=2")
    _, said, _, _, seen = run(*whole, "data.sampling.strategy=td", f"data.sampling.td_run={first}")
    assert f"strategy=td: priorities of {first}" in said
    weight = seen[0][1].numpy()
    trained = weight[~replay.held_out_rows]
    assert weight.max() == 1
    assert 0 < trained.min() < 0.9
    assert (weight[replay.held_out_rows] == 0).all()
    assert not replay.held_out_rows[np.concatenate([rows for rows, _ in seen])].any()


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("strategy", ["recency", "td"], ["newest", None]),
        ("capacity", [None, 1], [0, 1.5, True]),
        ("mix", [None, OmegaConf.create({"a": 1})], ["half", OmegaConf.create({})]),
        ("half_life", [0.5, 3], [0, None]),
        ("td_run", ["latest"], [None, 3]),
        ("alpha", [0, 0.6], [-0.1]),
        ("beta", [0, 1], [1.1, -0.1]),
    ],
)
def test_ranges(key, good, bad):
    ((_, holds, _),) = [rule for rule in _fit_checks.RULES if f"data.sampling.{key}" in rule[2].split()]
    assert all(map(holds, good))
    assert not any(map(holds, bad))


def test_a_source_that_is_not_there_is_told_before_anything_begins(run, store):
    runs = offline_lm.connect(store).execute("SELECT count(*) FROM runs").fetchone()
    error = run("algo=q_mc", "data.sampling.mix={nobody:1}").splitlines()[-1]
    assert error.startswith("error: data.sampling.mix.nobody: no selected episode is of it")
    assert offline_lm.connect(store).execute("SELECT count(*) FROM runs").fetchone() == runs


def test_d3rlpy_takes_no_weights(run):
    assert "data.sampling.beta=1.0: algo=d3rlpy takes no weights" in run("algo=d3rlpy", "data.sampling.strategy=td")
