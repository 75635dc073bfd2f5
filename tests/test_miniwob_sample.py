"""The recorded sample of real browser runs: what it holds, and that a browser gives it again."""

import gzip
import json
import os
from collections import Counter, defaultdict

import numpy as np
import orjson
import pytest

from offline_lm import collect, ingest, paths
from offline_lm.envs import miniwob
from offline_lm.store import Store

FOLDER = paths.CONF.parent / "datasets" / "miniwob"


@pytest.fixture(scope="module")
def episodes():
    if not FOLDER.is_dir():
        pytest.skip("not a checkout: the wheel does not hold the samples")
    with gzip.open(FOLDER / "sample.jsonl.gz", "rb") as file:
        return [orjson.loads(line) for line in file]


def test_it_holds_what_its_card_says(episodes):
    assert len(episodes) == 840
    assert len({e["task_id"] for e in episodes}) == 28
    won = defaultdict(list)
    for e in episodes:
        won[e["policy_id"]].append(e["success"])
    assert {name: (len(w), sum(w)) for name, w in won.items()} == {
        "scripted-eps0.3": (280, 229), "scripted-eps0.6": (280, 178), "random": (280, 89),
    }  # fmt: skip
    assert Counter(e["end_reason"] for e in episodes) == {"env_done": 830, "step_limit": 10}
    assert sum(len([s for s in e["steps"] if not s["is_final_observation"]]) for e in episodes) == 2060
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8e6


def test_candidates_are_whole_and_their_probabilities_are_those_of_the_policy(episodes):
    for e in episodes:
        for step in e["steps"]:
            if step["is_final_observation"]:
                continue
            p = np.exp([c.get("logprob", -np.inf) for c in step["candidates"]])
            (chosen,) = [c for c in step["candidates"] if c["executed"]]
            assert step["candidates_complete"]
            assert p.sum() == pytest.approx(1)
            assert chosen["action"] == step["action"]
            assert chosen["logprob"] == step["behavior_logprob"]


def test_ingest_takes_all_of_it(episodes, tmp_path, capsys):
    assert ingest.main([f"path={FOLDER}", f"store={tmp_path / 'store'}", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["accepted"], told["duplicates"], told["quarantined"]) == (840, 0, 0)


@pytest.mark.browser
@pytest.mark.skipif(
    not miniwob.default_folder().is_dir(), reason="no pages: python -m offline_lm.collect fetch=miniwob"
)
def test_a_browser_gives_it_again(episodes, tmp_path, monkeypatch, capsys):
    """Pages, clicks and rewards of the first seed of some tasks, random clicks included."""
    pytest.importorskip("playwright")
    monkeypatch.chdir(tmp_path)
    tasks = ("click-button", "click-tab-2-easy", "enter-text", "navigate-tree")
    asked = ["env=miniwob", "policy=random", f"tasks=[{','.join(tasks)}]", "episodes=4", "store=again"]
    assert collect.main([*asked, f"sandbox={str(os.geteuid() != 0).lower()}", "json=true"]) == 0
    with Store.open("again").connect() as db:
        played = db.execute(
            "SELECT e.task_id, s.step, s.observation, s.action, s.reward"
            " FROM episodes e JOIN steps s USING (episode_id) ORDER BY ALL"
        ).fetchall()
    names = {f"miniwob/random/0/all/{task}/0" for task in tasks}
    recorded = sorted(
        (e["task_id"], s["step"], s["observation"], s.get("action"), s.get("reward"))
        for e in episodes
        if e["native_id"] in names
        for s in e["steps"]
    )
    assert played == recorded
