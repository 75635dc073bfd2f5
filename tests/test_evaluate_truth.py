"""The suites with exact truth, whole and small: recorded, fitted, judged, and the rows in the store."""

import json

import pytest

from offline_lm import evaluate
from offline_lm.ope.fixed_points import ALGOS
from offline_lm.store import Store

SMALL = (
    "model=tiny model.vocab_size=400 model.width=32 model.layers=1 model.attention_heads=2 model.stage.tokens=1000"
    " optim.steps=5 optim.batch_size=64 optim.warmup=2 threads=1 logger=none data.history=0"
)


def run(capsys, *arguments):
    assert evaluate.main([*arguments, "json=true"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("suite", "more"), [("shop", ["horizon=7"]), ("fo_maze", []), ("po_maze", [])], ids=lambda x: str(x)
)
def test_a_critic_is_judged_and_the_scores_are_in_the_store(tmp_path, capsys, suite, more):
    few = [f"suite={suite}", "seeds=[3]", "tasks=3", "episodes=2", f"workdir={tmp_path}", f"overrides={SMALL}", *more]
    done = run(capsys, *few, "algos=[sarsa]")
    (row,) = done["runs"]
    assert row["tasks"] == 1
    assert row["optimum"] == pytest.approx({"shop": 1.0, "fo_maze": -6.84, "po_maze": -7.24}[suite], abs=5e-3)
    assert row["greedy"] <= row["optimum"] + 1e-9
    for name in ("kendall", "sign", "rmse_v", "rmse_q", "gap_recovered"):
        assert done["sarsa"][name] == row[name]
    store = Store.open(next(tmp_path.glob(f"{suite}3*.store")))
    with store.connect() as db:
        query = "SELECT name, value FROM diagnostics WHERE run_id = ? AND suite = ?"
        kept = dict(db.execute(query, [row["run_id"], suite]).fetchall())
    assert kept["rmse_q"] == row["rmse_q"]
    again = run(capsys, f"suite={suite}", f"runs={row['run_id']}", f"store={store.url}", *more)
    assert again["runs"][0]["rmse_q"] == pytest.approx(row["rmse_q"])


def test_every_critic_on_tables_is_near_its_fixed_point(capsys):
    done = run(capsys, "suite=mdp", "seeds=[1]", "mdp.processes=2")
    assert set(done["max_error"]) == set(ALGOS)
    assert max(done["max_error"].values()) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["suite=office", "horizon=7"], "horizon=7: suite=shop takes one, a whole number from 5"),
        (["suite=shop", "horizon=4"], "horizon=4: suite=shop takes one"),
        (["suite=mdp", "mdp.processes=0"], "mdp.processes=0: a whole number from 1 is wanted"),
        (["suite=nothing"], "suite=nothing: there are shop, office, fo_maze"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, arguments, told):
    assert evaluate.main([*arguments, f"workdir={tmp_path}"]) == 2
    assert told in capsys.readouterr().err
