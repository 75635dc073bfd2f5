"""`fit algo=archer` through the command line, and a store that grows while actors train."""

import json
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import load_file

import offline_lm
from offline_lm import _fit_updates, cli, fit, ingest
from offline_lm._fit_archer import actions_of
from offline_lm._fit_growth import Growing
from offline_lm.batches import replay as replays
from offline_lm.envs.exact import End, Move, TextMDP, record
from offline_lm.envs.shop import Site, Task
from offline_lm.envs.shop import record as record_shop
from offline_lm.models import acting
from offline_lm.models.critic import Critic
from offline_lm.policy import Policy, end_of
from offline_lm.store import Store

SMALL = [
    *("model=tiny", "model.stage.tokens=0", "model.vocab_size=300", "data.history=0"),
    *("model.width=32", "model.layers=1", "model.attention_heads=2", "model.heads.hidden=32"),
    *("optim.batch_size=64", "optim.warmup=2", "optim.steps=20", "threads=1", "logger=none", "baselines=false"),
    *("actor.steps=6", "actor.batch_size=32", "actor.warmup=1", "actor.log_every=1", "json=true"),
]


def ingested(folder, name, episodes):
    (folder / f"{name}.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / name}.jsonl", f"store={folder / 'store'}"]) == 0
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ingested(
        tmp_path_factory.mktemp("archer"), "shop", record_shop([Task(Site.draw(3), i) for i in range(4)], 4)
    )


def run(store, capsys, *arguments):
    capsys.readouterr()
    assert fit.main([f"data.store={store}", *SMALL, *arguments]) == 0
    told = capsys.readouterr().out
    return {**json.loads(told.splitlines()[-1]), "told": told}


def metrics(store, run_id, name):
    query = "SELECT value FROM metrics WHERE run_id = ? AND name = ? ORDER BY step"
    return [value for (value,) in offline_lm.connect(store).execute(query, [run_id, name]).fetchall()]


def test_critic_and_actor_are_of_one_run(store, capsys):
    done = run(store, capsys, "algo=archer", "actor.rounds=2")
    run_id = done["run_id"]
    assert done["critic_run"] == run_id
    assert "exactly, over all candidates, at" in done["told"]
    assert np.isfinite([done["metrics"][k] for k in ("logprob_all", "start_logprob_all", "entropy", "v_rmse")]).all()
    assert len(metrics(store, run_id, "round/q_actor")) == 2
    assert len(metrics(store, run_id, "loss/clone")) == 0
    assert len(metrics(store, run_id, "loss/actor")) == 6
    db = offline_lm.connect(store)
    ((steps, valued),) = db.execute(
        "SELECT (SELECT count(*) FROM steps), count(v) FROM run_values WHERE run_id = ?", [run_id]
    ).fetchall()
    assert steps == valued
    page, action, q = db.execute(
        "SELECT s.observation, c.action, c.q FROM candidate_values AS c JOIN steps AS s USING (episode_id, step)"
        " WHERE run_id = ? LIMIT 1", [run_id]
    ).fetchone() or ("", "", 0)  # fmt: skip
    ((goal,),) = db.execute("SELECT goal FROM run_values WHERE run_id = ? AND observation = ? LIMIT 1", [run_id, page]
                            ).fetchall()  # fmt: skip
    state = {"goal": goal, "observation": page, "candidates": [action, "back"]}
    (score,) = Critic.from_pretrained(store / "runs" / run_id).score([state])
    assert (score.q or [None])[0] == pytest.approx(q, abs=1e-4)
    assert Policy.from_pretrained(store / "runs" / run_id).act(state, temperature=0).action in state["candidates"]


def test_an_actor_finds_the_better_of_rarely_tried_actions(tmp_path, capsys):
    """One page, three doors: the logs mostly take the one that never pays."""
    doors: list[Move] = [("open red", End(0.0)), ("open green", End(1.0)), ("open blue", End(0.0))]
    task = TextMDP.explore(
        ("hall",), lambda _: ("Three doors.", doors), benchmark="doors", seed=0, number=0, goal="Find the prize.",
        limit=1,
    )  # fmt: skip
    logs = record([replace(task, policies={"behaviour": np.array([[0.7, 0.2, 0.1]])})], 40)
    store = ingested(tmp_path, "doors", logs)
    heads = ["model.layers=2", "optim.steps=120", "optim.lr=3e-3", "algo.critic.polyak=0.1"]
    actor = ["actor.steps=60", "actor.lr=3e-3", "actor.batch_size=24"]
    done = run(store, capsys, "algo=archer", "actor.rounds=3", *heads, *actor)
    state = {"goal": task.goal, "observation": task.pages[0], "candidates": task.actions[0]}

    def likes(run_id):
        return dict(zip(task.actions[0], np.exp(Policy.from_pretrained(store / "runs" / run_id).act(state).logprobs),
                        strict=True))  # fmt: skip

    assert likes(done["run_id"])["open green"] > 0.8
    first, *_, last = metrics(store, done["run_id"], "round/q_actor")
    assert first < 0.4 < 0.8 < last  # at first it clones the logs, which take the green door one time in eight
    query = "SELECT action, avg(q) FROM candidate_values WHERE run_id = ? GROUP BY action"
    q = dict(offline_lm.connect(store).execute(query, [done["run_id"]]).fetchall())
    assert q == pytest.approx({"open red": 0, "open green": 1, "open blue": 0}, abs=0.05)


def test_responses_are_drawn_where_candidates_are_not_known_to_be_complete(tmp_path, capsys):
    episodes = list(record_shop([Task(Site.draw(3), i) for i in range(3)], 2))
    for episode in episodes:
        for step in episode["steps"]:
            step.pop("candidates", None)
            step.pop("candidates_complete", None)
    store = ingested(tmp_path, "shop", episodes)
    done = run(store, capsys, "algo=archer", "actor.rounds=2", "algo.samples=2")
    (line,) = [line for line in done["told"].splitlines() if line.startswith("archer: the actor is valued")]
    assert "over all candidates, at 0 of" in line
    assert "by responses drawn of it at" in line
    assert np.isfinite(metrics(store, done["run_id"], "loss/actor")).all()


def test_what_the_actor_would_do(shop):
    """Exact among complete candidates; else as often as drawn, at first, and never what was logged but not drawn."""
    tokens, model = shop.tokens, shop.model
    asked = np.zeros(len(tokens), bool)
    asked[:6] = tokens.acted[:6]
    whole = np.arange(len(tokens)) % 2 == 0
    samples, end = 3, end_of(shop.tokenizer)[-1]
    known = actions_of(model, tokens, asked, whole, samples, end=end, budget=4096, seed=(0, 1))
    again = actions_of(model, tokens, asked, whole, samples, end=end, budget=4096, seed=(0, 1))
    torch.testing.assert_close(known.probability, again.probability)
    every = np.arange(len(known.proposal))
    logprobs = acting.of_responses(
        known.tokens, every, acting.all_logprobs(model, known.tokens, every, budget=4096)
    )  # fmt: skip
    assert known.drawn == int((asked & ~whole).sum()) > 0
    for n in range(len(tokens)):
        own = slice(known.tokens.branch_ptr[n], known.tokens.branch_ptr[n + 1])
        p = known.probability[own].double().numpy()
        before = tokens.branch_ptr[n + 1] - tokens.branch_ptr[n]
        if not asked[n]:
            assert (p == 0).all()
            assert len(p) == before
        elif whole[n]:
            assert len(p) == before
            expected = np.exp(logprobs[own] - np.logaddexp.reduce(logprobs[own]))
            np.testing.assert_allclose(p, expected, rtol=1e-4)
        else:
            assert p.sum() == pytest.approx(1)
            np.testing.assert_allclose(p * samples, np.round(p * samples), atol=1e-5)  # how often each was drawn
            assert (p[before:] > 0).all()
            # a policy that has moved is followed by importance weights
            moved = logprobs[own] + np.arange(len(p))
            scores = np.exp(moved + known.proposal[own])
            np.testing.assert_allclose(scores, p * samples * np.exp(np.arange(len(p))), rtol=1e-3)


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """A store of three tasks to which, behind the actor's first updates, comes more of them, and a new task."""
    store = ingested(tmp_path, "shop", record_shop([Task(Site.draw(3), i) for i in range(3)], 2))
    seen, train = [], _fit_updates.ActorLearner.train

    def spied(self, db, until):
        whole = train(self, db, until)
        seen.append((self.drawn, until))
        if len(seen) == 2:
            ingested(tmp_path, "more", record_shop([Task(Site.draw(3), i) for i in range(4)], 4))
        return whole

    monkeypatch.setattr(_fit_updates.ActorLearner, "train", spied)
    return store, seen


@pytest.mark.parametrize("algo", ["archer", "grpo"])
def test_replay_grows_while_an_actor_trains(growing, capsys, algo):
    store, seen = growing
    done = run(store, capsys, f"algo={algo}", "actor.rounds=3", "data.held_out=0.4")
    assert "the store has grown: 10 new episodes," in done["told"]
    assert "1 new tasks; 16 episodes together" in done["told"]
    first, last = seen[0][0].replay, seen[-1][0].replay
    assert (len(first.episode_ids), len(last.episode_ids)) == (6, 16)
    held = {t for t, h in zip(first.tasks, first.held_out, strict=True) if h}
    assert len(held) == 1
    assert {t for t, h in zip(last.tasks, last.held_out, strict=True) if h} == held
    counted = {last.episode_of[np.searchsorted(seen[-1][0].tokens.branch_ptr, a, side="right") - 1]
               for a in seen[-1][0].counted}  # fmt: skip
    assert {last.episode_ids[e] for e in counted} - set(first.episode_ids)
    assert not last.held_out[list(counted)].any()
    with Store.open(store, done["run_id"]).connect() as db:  # what the run was trained on
        ((episodes,),) = db.sql("SELECT count(*) FROM episodes").fetchall()
    assert episodes == 16
    if algo == "archer":
        query = "SELECT count(DISTINCT episode_id) FROM run_values WHERE run_id = ?"
        assert offline_lm.connect(store).execute(query, [done["run_id"]]).fetchall() == [(16,)]
        assert metrics(store, done["run_id"], "round/episodes") == [6, 16, 16]


def test_a_store_at_one_version_does_not_grow(tmp_path, capsys):
    store = ingested(tmp_path, "shop", record_shop([Task(Site.draw(3), i) for i in range(3)], 2))
    version = Store.open(store).versions()["episodes"]
    run: Any = SimpleNamespace(row={"store_versions": "{}"})
    with ExitStack() as stack:
        settings = ([], [f"data.version={version}"], ["data.where='trial < 2'"])
        open_, pinned, some = (
            Growing(cli.composed("fit", f"data.store={store}", *own), 0.9, stack) for own in settings
        )
        assert not open_.grew(run)
        ingested(tmp_path, "more", record_shop([Task(Site.draw(3), i) for i in range(3)], 4))
        assert open_.grew(run)
        assert (len(open_.replay.episode_ids), len(pinned.replay.episode_ids)) == (12, 6)
        assert json.loads(run.row["store_versions"])["episodes"] > version
        assert not open_.grew(run)
        assert not pinned.grew(run)
        assert not some.grew(run)  # the new ones are not among the selected
        assert capsys.readouterr().out.count("has grown") == 1


def test_rounds_draw_what_one_would_where_nothing_comes(store, capsys):
    runs = [run(store, capsys, "algo=bc", f"actor.rounds={n}")["run_id"] for n in (1, 4)]
    one, four = (load_file(store / "runs" / r / "actor" / "model.safetensors") for r in runs)
    assert all(torch.equal(one[k], four[k]) for k in one)


def test_batches_behind_a_growth_are_of_their_step(shop):
    """The tenth batch of a larger replay, asked for alone or behind the nine before it."""
    batches = replays.episode_batches(shop.replay, 20, 0)
    tenth = [next(batches) for _ in range(10)][-1]
    np.testing.assert_array_equal(tenth, next(replays.episode_batches(shop.replay, 20, 0, start=9)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["algo=archer", "model.train=lora"], "model.train=lora: algo=archer takes model.train=heads alone"),
        (["algo=archer", "actor.critic=latest"], "actor.critic=latest: algo=archer takes actor.critic=null alone"),
        (["algo=archer", "algo.critic.gamma=0.5"], "algo.critic.gamma=0.5"),
        (["algo=archer", "actor.rounds=0"], "actor.rounds=0: null or a whole number from 1 is wanted"),
        (["algo=awr", "actor.rounds=2"], "actor.rounds=2: algo=awr learns from the values of a run that is done"),
    ],
)
def test_settings_that_do_not_fit_are_told(store, capsys, settings, told):
    assert fit.main([f"data.store={store}", *SMALL, *settings]) == 2
    assert told in capsys.readouterr().err
