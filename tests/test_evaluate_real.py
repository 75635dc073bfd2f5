"""Suite `real`: critics and baselines at the same steps of the same held-out episodes, on values made by hand."""

import gzip
import json

import numpy as np
import pytest

from offline_lm import evaluate, paths, query
from offline_lm._evaluate_real import MOMENTS, _report, judge, judged_steps
from offline_lm.errors import UserError
from offline_lm.ope.diagnostics import auc, brier, calibration_error
from offline_lm.ope.ranking import within_task_auc
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Candidate, Episode, Step

TRAIN = [(f"old{i // 4}", n, won) for i, (n, won) in enumerate([(1, 1), (2, 0), (3, 1), (4, 0), (5, 1), (6, 0)] * 4)]
HELD_OUT = [(f"new{i // 4}", n, won) for i, (n, won) in enumerate([(1, 1), (2, 0), (4, 1), (5, 0), (8, 1), (3, 0)] * 2)]


def make(folder, train=TRAIN, held_out=HELD_OUT, *, source="jsonl", candidates=False):
    """A store, and by (episode, step) the V and Q of its run, which are drawn. A word of each page tells the end."""
    store = Store.create(folder)
    rng = np.random.default_rng(0)
    values, told = [], {}
    for split, episodes in (("train", train), ("held_out", held_out)):
        log = []
        for i, (task, n, won) in enumerate(episodes):
            page = f"page of {task} {'foul' if i % 2 else 'fair'}"
            offered = (Candidate(action="go"), Candidate(action="stop")) if candidates else None
            steps = [Step(step=t, observation=page, action="go", candidates=offered) for t in range(n)]
            steps.append(Step(step=n, observation="the end", is_final_observation=True))
            log.append(
                Episode(source=source, native_id=f"{split}{i}", task_id=task, goal="g", steps=tuple(steps),
                        success=bool(won), terminated=True)
            )  # fmt: skip
        assert add(store, log)["accepted"] == len(log)
        with store.connect() as db:
            ids = dict(db.sql("SELECT provenance.native_id, episode_id FROM episodes").fetchall())
        for i, (_, n, _) in enumerate(episodes):
            for t in range(n + 1):
                v, q = (float(x) for x in rng.integers(0, 9, 2) / 8)
                told[ids[f"{split}{i}"], t] = v, q
                row = {"run_id": "r", "episode_id": ids[f"{split}{i}"], "step": t, "split": split, "v": v}
                values.append(row if t == n else row | {"q": q})
    store.append("values", values)
    store.append("runs", [{"run_id": "r", "status": "finished", "algo": "iql_lm", "model": "tiny", "seed": 0}])
    return store, told


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("real") / "store")


def columns_of(store):
    with store.connect() as db:
        return judged_steps(db, "r")


def test_steps_are_those_of_their_moments(made):
    store, told = made
    columns = columns_of(store)
    lengths = {
        "first": [0] * 6,
        "quarter": [0, 0, 0, 1, 1, 2],
        "middle": [0, 1, 1, 2, 2, 4],
        "last": [0, 1, 2, 3, 4, 7],
    }
    assert set(columns["moment"]) == set(lengths) == set(MOMENTS)
    for moment, steps in lengths.items():  # of episodes of 1, 2, 3, 4, 5 and 8 decisions; the final observation is none
        here = columns["moment"] == moment
        by_length = dict(zip(columns["n_decisions"][here], columns["step"][here], strict=True))
        assert [by_length[n] for n in (1, 2, 3, 4, 5, 8)] == steps
        assert here.sum() == len(HELD_OUT)
    for episode, step, v, q in zip(*(columns[name] for name in ("episode_id", "step", "v", "q")), strict=True):
        assert (v, q) == told[episode, step]
    assert np.isnan(columns["q_max"]).all()  # these logs have no candidates


def test_baselines_by_hand(made):
    columns = columns_of(made[0])
    assert columns["constant"] == pytest.approx(0.5)
    for position, rate in {0: (12 + 2.5) / 29, 1: (8 + 2.5) / 25, 2: (8 + 2.5) / 21, 4: (4 + 2.5) / 13, 7: 0.5}.items():
        here = columns["step"] == position  # of training episodes of 1 to 6 steps, in which odd lengths win
        assert here.any()
        assert columns["position"][here] == pytest.approx(rate)


def test_scores_are_the_table_diagnostics_and_the_sql(made):
    store, _ = made
    judged = judge(store, "r", 50)
    middle = {k: v[judged["columns"]["moment"] == "middle"] for k, v in judged["columns"].items()}
    task = np.unique(middle["task"], return_inverse=True)[1]
    found = judged["logs"]["jsonl"]
    assert (found["episodes"], found["tasks"], found["success"]) == (12, 3, 0.5)
    with store.connect() as db:
        rows = db.sql("SELECT name, \"group\", value, low, high, n FROM diagnostics WHERE suite = 'real'").fetchall()
        sql = query.read_sql("mid_episode_auc.sql")
        asked = db.execute(sql, {"run": "r", "at": 0.5}).fetchall()
    table = {(name, score): (value, low, high, n) for name, score, value, low, high, n in rows}
    by_sql = {row[3]: row[4:] for row in asked if row[0] == "held_out"}
    for score in ("v", "q", "n_gram", "position"):
        own, x, won = found["middle"][score], middle[score], middle["won"]
        assert own["auc"]["value"] == pytest.approx(auc(x, won))
        assert own["within_task_auc"]["value"] == pytest.approx(within_task_auc(x, won, task))
        assert own["brier"] == pytest.approx(brier(x, won))
        assert own["ece"] == pytest.approx(calibration_error(x, won))
        assert own["auc"]["low"] <= own["auc"]["value"] <= own["auc"]["high"]
        assert table["auc_middle", score] == (*(own["auc"][k] for k in ("value", "low", "high")), 12)
        assert table["brier_middle", score] == (own["brier"], None, None, 12)
    for score in ("v", "q"):
        own = found["middle"][score]
        aucs = [pytest.approx(own[metric]["value"]) for metric in ("auc", "within_task_auc")]
        assert by_sql[score] == (12, 3, 3, 0.5, *aucs)
    difference = found["middle"]["v"]["above"]["n_gram"]["auc"]["value"]
    assert difference == pytest.approx(auc(middle["v"], middle["won"]) - auc(middle["n_gram"], middle["won"]))
    assert table["auc_above_n_gram_middle", "v"][0] == difference
    assert set(found["middle"]["q"]["above"]) == {"constant", "position", "n_gram_action"}


def test_baselines_do_not_see_how_held_out_episodes_end(made, tmp_path):
    told = columns_of(made[0])

    def turned(episodes):
        return [(task, n, 1 - won) for task, n, won in episodes]

    names = ("n_gram", "n_gram_action", "position", "constant")
    held_out_turned = columns_of(make(tmp_path / "a", held_out=turned(HELD_OUT))[0])
    train_turned = columns_of(make(tmp_path / "b", train=turned(TRAIN))[0])
    key = [np.lexsort((c["moment"], c["step"], c["episode_id"])) for c in (told, held_out_turned, train_turned)]
    assert (told["won"][key[0]] != held_out_turned["won"][key[1]]).all()
    for name in names:
        assert (told[name][key[0]] == held_out_turned[name][key[1]]).all()
    for name in names[:3]:
        assert (told[name][key[0]] != train_turned[name][key[2]]).any()


def test_n_grams_read_pages(made):
    columns = columns_of(made[0])
    middle = columns["moment"] == "middle"
    for name in ("n_gram", "n_gram_action"):
        assert auc(columns[name][middle], columns["won"][middle]) == 1.0


def test_candidates_give_the_best_of_a_state(tmp_path):
    store, _ = make(tmp_path / "store", candidates=True)
    with store.connect() as db:
        steps = db.sql("SELECT episode_id, step FROM steps WHERE NOT is_final_observation").fetchall()
    store.append(
        "candidate_values",
        [
            {"run_id": run, "episode_id": e, "step": t, "candidate": c, "q": t + c / 2 + shift}
            for e, t in steps
            for c in (1, 0)
            for run, shift in (("r", 0), ("other", 100))
        ],
    )
    columns = columns_of(store)
    assert (columns["q_max"] == columns["step"] + 0.5).all()


def test_several_sources_are_told_apart(tmp_path):
    store, _ = make(tmp_path / "store")
    other = [Episode(source="chat", native_id=f"c{i}", task_id=f"c{i}", success=i > 2,
                     steps=(Step(step=0, observation="p", action="a"),)) for i in range(8)]  # fmt: skip
    add(store, other)
    with store.connect() as db:
        rows = db.sql("SELECT episode_id, task_id FROM episodes WHERE source = 'chat'").fetchall()
    split = {f"c{i}": "held_out" if i % 2 else "train" for i in range(8)}
    store.append(
        "values", [{"run_id": "r", "episode_id": e, "step": 0, "split": split[t], "v": float(t[1])} for e, t in rows]
    )
    judged = judge(store, "r", 10)
    assert set(judged["logs"]) == {"all", "chat", "jsonl"}
    assert [judged["logs"][part]["episodes"] for part in ("all", "chat", "jsonl")] == [16, 4, 12]
    assert judged["logs"]["chat"]["middle"]["v"]["auc"]["value"] == 1.0
    chat = judged["columns"]["source"] == "chat"
    assert judged["columns"]["constant"][chat] == pytest.approx(0.5)  # c4 and c6 of c0, c2, c4, c6
    has_q = {part: "q" in judged["logs"][part]["middle"] for part in judged["logs"]}
    assert has_q == {"all": False, "chat": False, "jsonl": True}  # this run has no Q of the chats


def test_one_model_is_held_against_another(made, capsys):
    judged = judge(made[0], "r", 50)
    won = judged["columns"]["won"].astype(float)
    tiny, best = ({**judged, "columns": judged["columns"] | {"v": v}} for v in (1 - won, won))
    best["model"] = "reader"
    elsewhere = {**best, "seed": 1}
    done = _report([tiny, best, elsewhere], 50)
    assert [(row["model"], row["seed"], row["score"]) for row in done["models"]] == [
        ("reader", 0, "v"),
        ("reader", 0, "q"),
    ]
    v, q = (row["above"]["tiny"] for row in done["models"])
    assert v["auc"] == {"value": 1, "low": 1, "high": 1}
    assert q["auc"] == {"value": 0, "low": 0, "high": 0}
    printed = capsys.readouterr().out
    assert "reader, v of iql_lm, seed 0, on jsonl: above tiny | within tasks above tiny" in printed
    assert "reader, q of iql_lm, seed 0, on jsonl: not above tiny | within tasks not above tiny" in printed
    (mean,) = (row for row in done["means"] if (row["model"], row["score"]) == ("reader", "v"))
    assert (mean["auc"], mean["auc_std"], mean["auc_runs"]) == (
        tiny["logs"]["jsonl"]["middle"]["v"]["auc"]["value"],
        0,
        2,
    )


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_a_run_with_outcomes_on_one_side_is_refused(tmp_path, side):
    store, _ = make(tmp_path / "store", [] if side == "train" else TRAIN, [] if side == "held_out" else HELD_OUT)
    with pytest.raises(UserError, match="both sides of the split"):
        judge(store, "r", 10)


def test_logs_in_a_judgement_out(tmp_path, capsys):
    with gzip.open(paths.CONF.parent / "datasets" / "shop" / "sample.jsonl.gz", "rb") as sample:
        (tmp_path / "shop.jsonl").write_bytes(b"".join(sample.readlines()[:24]))
    small = "model=tiny model.stage.tokens=2000 model.vocab_size=400 model.width=32 model.layers=1"
    small += " model.attention_heads=2"
    arguments = [
        *("suite=real", f"real.path={tmp_path / 'shop.jsonl'}", f"workdir={tmp_path}", "seeds=[0]", "algos=[q_mc]"),
        *("real.models=['tiny data.history=1']", "real.resamples=20", "json=true"),
        f"overrides={small} optim.steps=5 optim.batch_size=64 optim.warmup=2 threads=1 logger=none data.held_out=0.4",
    ]
    assert evaluate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    done = json.loads(lines[-1])
    (run,) = done["runs"]
    assert (run["model"], run["algo"], run["seed"]) == ("tiny data.history=1", "q_mc", 0)
    middle = run["logs"]["jsonl"]["middle"]
    assert set(middle) == {"v", "q", "q_max", "n_gram", "n_gram_action", "position", "constant"}
    assert middle["constant"]["auc"]["value"] == 0.5
    (said,) = (line for line in lines if line.startswith("v "))
    assert "above" in said or "below" in said
    store = Store.open(tmp_path / "real0")
    again = judge(store, run["run_id"], 20)["logs"]["jsonl"]["middle"]
    assert again["n_gram"] == middle["n_gram"]
