"""Suite `policies`: estimates of hand-made logs by hand; what the logs lack is said; and from logs to regrets."""

import json
import math

import numpy as np
import orjson
import pytest

from offline_lm import evaluate
from offline_lm.envs import shop
from offline_lm.ope import estimators
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Candidate, Episode, Step

N = 12
GAMMA = 0.5


def make(folder, *, behaviour=True, complete=True, candidates=True, runs=("r",), gammas=(GAMMA,), held_out=range(4, N)):
    """Episodes of two steps, a choice of `go` (b = 0.75) and `stop` at each; only the last step earns. Q is drawn."""
    store = Store.create(folder)
    rng = np.random.default_rng(0)
    offered = (Candidate(action="go"), Candidate(action="stop")) if candidates else None
    log, done = [], []
    for i in range(N):
        a = rng.random(2) < 0.75
        done.append((a, float(a.all())))
        steps = [
            Step(
                step=t, observation=f"page {i} {t}", action="go" if a[t] else "stop", candidates=offered,
                candidates_complete=complete, reward=float(t and a.all()),
                behavior_logprob=math.log(0.75 if a[t] else 0.25) if behaviour else None,
            )
            for t in range(2)
        ]  # fmt: skip
        log.append(Episode(source="jsonl", native_id=str(i), task_id=f"t{i}", goal="g", steps=tuple(steps),
                           success=bool(a.all()), terminated=True))  # fmt: skip
    assert add(store, log)["accepted"] == N
    with store.connect() as db:
        ids = dict(db.sql("SELECT provenance.native_id, episode_id FROM episodes").fetchall())
    q = {run: rng.random((N, 2, 2)) for run in runs}
    values, scored = [], []
    for run in runs:
        for i in range(N):
            split = "held_out" if i in held_out else "train"
            for t in range(2):
                at = {"run_id": run, "episode_id": ids[str(i)], "step": t}
                values.append({**at, "split": split, "v": 0.5, "q": 0.5})
                executed = 0 if done[i][0][t] else 1
                scored += [
                    {**at, "candidate": c, "q": q[run][i, t, c], "executed": c == executed}
                    for c in range(2 if candidates else 0)
                ]
    store.append("values", values)
    if scored:
        store.append("candidate_values", scored)
    config = [json.dumps({"algo": {"gamma": g}, "data": {"truncated": "outcome"}}) for g in gammas]
    store.append(
        "runs",
        [{"run_id": r, "status": "finished", "algo": "q_mc", "seed": 0, "config": c}
         for r, c in zip(runs, config, strict=True)],
    )  # fmt: skip
    return store, done, q


def judged(store, capsys, *arguments, runs="[r]", code=0):
    given = [f"runs={runs}", f"store={store.url}", "policies.fqe=false", "policies.truth=false", *arguments]
    assert evaluate.main(["suite=policies", "json=true", *given]) == code
    out = capsys.readouterr()
    return json.loads(out.out.splitlines()[-1]) if code == 0 else out.err


def test_estimates_are_those_of_the_hand_made_logs(tmp_path, capsys):
    store, done, q = make(tmp_path / "store")
    (run,) = judged(store, capsys, "policies.temperatures=[0,0.5]", "policies.resamples=50")["runs"]
    assert (run["episodes"], run["gamma"]) == (N - 4, GAMMA)
    assert run["mean_return"]["value"] == pytest.approx(np.mean([GAMMA * won for _, won in done[4:]]))
    ratio, dr, first = [], [], []
    for (a, won), x in zip(done[4:], q["r"][4:], strict=True):
        e = np.exp(x / 0.5)
        pi = e / e.sum(axis=1, keepdims=True)
        did = np.where(a, 0, 1)
        w = np.cumprod(pi[[0, 1], did] / np.where(a, 0.75, 0.25))
        v = (pi * x).sum(axis=1)
        ratio.append(w[-1] * GAMMA * won)
        dr.append(v[0] + w[0] * (0 - x[0, did[0]]) + GAMMA * (w[0] * v[1] + w[1] * (won - x[1, did[1]])))
        first.append(v[0])
    found = run["policies"]["softmax-0.5"]
    assert found["estimates"]["pdis"]["value"] == pytest.approx(np.mean(ratio))
    assert found["estimates"]["dr"]["value"] == pytest.approx(np.mean(dr))
    assert found["estimates"]["dm"]["value"] == pytest.approx(np.mean(first))
    assert found["estimates"]["fqe"]["reason"] == "policies.fqe=false"
    assert 1 < found["ess"] < N - 4
    greedy = run["policies"]["greedy"]["estimates"]
    weight = [np.prod([x[t].argmax() == (0 if a[t] else 1) for t in range(2)]) / np.prod(np.where(a, 0.75, 0.25))
              for (a, _), x in zip(done[4:], q["r"][4:], strict=True)]  # fmt: skip
    assert greedy["is"]["value"] == pytest.approx(
        np.mean([w * GAMMA * won for w, (_, won) in zip(weight, done[4:], strict=True)])
    )
    with store.connect() as db:
        rows = db.sql('FROM diagnostics SELECT name, "group", value, low, high, n, suite, split').fetchall()
    table = {row[:2]: row[2:] for row in rows}
    for group, policy in run["policies"].items():
        for name, each in policy["estimates"].items():
            assert table[name, group] == (each["value"], each["low"], each["high"], N - 4, "policies", "held_out")
        assert table["ess", group][0] == policy["ess"]
    assert table["mean_return", "behaviour"][0] == run["mean_return"]["value"]


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [({"behaviour": False}, "16 of 16 judged steps have no behavior_logprob"),
     ({"complete": None}, "16 of 16 judged steps have candidates that are not known to be complete")],
)  # fmt: skip
def test_what_the_logs_lack_is_said(tmp_path, capsys, lacks, reason):
    store, _, _ = make(tmp_path / "store", **lacks)
    (run,) = judged(store, capsys, "policies.temperatures=[0.5]", "policies.resamples=10")["runs"]
    found = run["policies"]["softmax-0.5"]["estimates"]
    assert found["dm"]["value"] > 0  # needs neither
    for name in ("is", "wis", "pdis", "wpdis", "dr", "wdr", "magic"):
        assert found[name]["value"] is None or np.isnan(found[name]["value"])
        assert reason in found[name]["reason"]
    with store.connect() as db:
        asked = "SELECT value, json_extract_string(extra, 'reason') FROM diagnostics WHERE name = 'dr'"
        ((value, told),) = db.sql(asked).fetchall()
    assert value is None
    assert reason in told
    assert run["mean_return"]["value"] > 0


def test_mistakes_are_named(tmp_path, capsys):
    store, _, _ = make(tmp_path / "a", runs=("r", "s"), gammas=(0.5, 0.9))
    assert "policies.gamma" in judged(store, capsys, runs="[r,s]", code=2)
    done = judged(store, capsys, "policies.gamma=0.7", "policies.resamples=10", runs="[r,s]")
    assert {row["gamma"] for row in done["runs"]} == {0.7}
    assert set(done["selection"]["greedy"]["dm"]) == {"chosen", "regret", "spearman"}
    for setting in ("policies.temperatures=0.1", "policies.temperatures=[-1]", "policies.ridge=0"):
        assert f"{setting}: " in judged(store, capsys, setting, code=2)
    none, _, _ = make(tmp_path / "b", held_out=range(0))
    assert "held out by all" in judged(none, capsys, code=2)
    bare, _, _ = make(tmp_path / "c", candidates=False)
    assert "gave no candidate a Q" in judged(bare, capsys, code=2)
    assert evaluate.main(["suite=policies", f"store={store.url}"]) == 2
    assert "runs=latest" in capsys.readouterr().err


def test_logs_in_a_regret_out(tmp_path, capsys):
    tasks = [shop.Task(shop.Site.draw(0), n) for n in range(5)]
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join(map(orjson.dumps, shop.record(tasks, 4))))
    small = "model=tiny model.vocab_size=400 model.width=32 model.layers=1 model.attention_heads=2"
    small += " model.stage.tokens=2000"
    from offline_lm import fit, ingest

    assert ingest.main(["source=jsonl", f"path={log}", f"store={tmp_path / 'store'}"]) == 0
    options = f"{small} optim.steps=20 optim.batch_size=64 optim.warmup=2 threads=1 logger=none data.held_out=0.4"
    swept = ["algo=q_mc", "sweep={seed:[0,1]}", f"data.store={tmp_path / 'store'}", "baselines=false"]
    assert fit.main([*swept, *options.split()]) == 0
    with Store.open(tmp_path / "store").connect() as db:
        names = [name for (name,) in db.sql("SELECT run_id FROM runs ORDER BY run_id").fetchall()]
    capsys.readouterr()
    given = [f"runs=[{','.join(names)}]", f"store={tmp_path / 'store'}"]
    settings = "resamples=20 fqe_resamples=10 temperatures=[0.05] gamma=0.9 rank=8"
    given += [f"policies.{setting}" for setting in settings.split()]
    assert evaluate.main(["suite=policies", "json=true", *given]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    true = []
    for run in done["runs"]:
        policy = run["policies"]["softmax-0.05"]
        true.append(policy["true_value"])
        assert 0 < policy["true_value"] < 0.2  # of 15 nearly random clicks
        found = policy["estimates"]
        assert found["fqe"]["low"] <= found["fqe"]["high"]
        assert abs(found["fqe"]["value"]) < 1
        assert found["fqe"]["value"] != found["dm"]["value"]
        assert not math.isnan(found["wdr"]["value"])
        assert 1 <= policy["ess"] <= run["episodes"] == 8
    chosen = done["selection"]["softmax-0.05"]
    for name in estimators.MODEL_BASED:
        values = [run["policies"]["softmax-0.05"]["estimates"][name]["value"] for run in done["runs"]]
        assert chosen[name]["chosen"] == done["runs"][int(np.argmax(values))]["run_id"]
        assert chosen[name]["regret"] == pytest.approx(max(true) - true[int(np.argmax(values))])
    with Store.open(tmp_path / "store").connect() as db:
        asked = "SELECT run_id, value, n FROM diagnostics WHERE name = 'regret_dr'"
        assert db.sql(asked).fetchall() == [(chosen["dr"]["chosen"], pytest.approx(chosen["dr"]["regret"]), 2)]
