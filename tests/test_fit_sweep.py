"""Settings trained at once: each is the run that it would have been alone."""

import json

import orjson
import pytest
import yaml

import offline_lm
from offline_lm import fit, ingest
from offline_lm.envs.shop import Site, Task, record

SMALL = [
    *("model=tiny", "model.stage.tokens=4000", "model.vocab_size=400"),
    *("model.width=32", "model.layers=1", "model.attention_heads=2"),
    *("optim.batch_size=64", "optim.warmup=2", "optim.steps=30", "optim.log_every=10", "threads=1", "logger=none"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    episodes = record([Task(Site.draw(3), i) for i in range(6)], 4)
    (folder / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'shop.jsonl'}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


@pytest.fixture
def run(store, capsys):
    def run(*arguments):
        assert fit.main([f"data.store={store}", *SMALL, "json=true", *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_every_combination_is_the_run_that_it_would_be_alone(store, run):
    swept = "sweep={seed:[0,5],algo:{tau:[0.9],gamma:[0.9,0.95]},optim.lr:[0.0005,0.001]}"
    done = run("algo=iql_lm", swept)
    assert done["run_id"] == done["sweep"][0]["run_id"]
    assert [each["swept"] for each in done["sweep"]] == [
        {"seed": seed, "algo.tau": 0.9, "algo.gamma": gamma, "optim.lr": lr}
        for seed in (0, 5) for gamma in (0.9, 0.95) for lr in (0.0005, 0.001)
    ]  # fmt: skip
    for which in (0, 7):  # the first, and one whose seed, loss and returns are its own
        together, swept = done["sweep"][which], done["sweep"][which]["swept"]
        alone = run(
            "algo=iql_lm", f"heads_seed={swept['seed']}", f"algo.tau={swept['algo.tau']}",
            f"algo.gamma={swept['algo.gamma']}", f"optim.lr={swept['optim.lr']}",
            f"baselines={'true' if which == 0 else 'false'}",
        )  # fmt: skip
        ids, db = [together["run_id"], alone["run_id"]], offline_lm.connect(store)
        compared, furthest, returns = db.execute(
            "SELECT count(*), max(greatest(abs(a.v - b.v), abs(a.q - b.q), abs(a.td_error - b.td_error))),"
            " max(abs(a.return - b.return))"
            " FROM run_values AS a JOIN run_values AS b USING (episode_id, step) WHERE a.run_id = ? AND b.run_id = ?",
            ids,
        ).fetchone() or (0, 0, 0)
        assert compared > 100
        assert furthest < 1e-5
        assert returns == 0
        configs = db.execute("SELECT config::JSON FROM runs WHERE run_id IN (?, ?) AND status = 'finished'", ids)
        first, second = ({**json.loads(c), "baselines": 0, "json": 0} for (c,) in configs.fetchall())
        assert first == second
        assert yaml.safe_load((store / "runs" / ids[0] / "config.yaml").read_text())["heads_seed"] in (0, 5)
        own = together["baselines"]["iql_lm"]
        assert own == pytest.approx(alone["baselines"]["iql_lm"], abs=1e-5, nan_ok=True)
        if which == 0:  # its optimiser is the configuration's, which the baseline has
            assert together["baselines"] == {
                name: pytest.approx(row, abs=1e-5, nan_ok=True) for name, row in alone["baselines"].items()
            }


def test_each_setting_leaves_all_that_a_run_leaves(store, run):
    done = run("algo=iql_lm", "sweep={algo.tau:[0.6,0.8],model.heads.hidden:[8,16]}")
    ids = [each["run_id"] for each in done["sweep"]]
    assert len(set(ids)) == 4
    db = offline_lm.connect(store)
    for run_id, hidden in zip(ids, (8, 16, 8, 16), strict=True):
        critic = offline_lm.Critic.from_pretrained(store / "runs" / run_id)
        assert critic.heads.options["hidden"] == hidden
        for table in ("metrics", '"values"', "candidate_values", "diagnostics"):
            (rows,) = db.execute(f"SELECT count(*) FROM {table} WHERE run_id = ?", [run_id]).fetchone() or (0,)
            assert rows > 0, table
    steps = "SELECT step FROM metrics WHERE run_id = ? AND name = ? ORDER BY step"
    assert [db.execute(steps, [i, "loss/v"]).fetchall() for i in ids] == [[(10,), (20,), (30,)]] * 4
    # the baseline is trained once, and stands in every report
    assert [len(db.execute(steps, [i, "q_mc/loss/q"]).fetchall()) for i in ids] == [3, 0, 0, 0]
    assert len({json.dumps(each["baselines"]["q_mc"]) for each in done["sweep"]}) == 1
    assert len({each["metrics"]["v_rmse"] for each in done["sweep"]}) == 4


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("sweep={data.where:[a]}", "sweep.data.where: what all settings share"),
        ("sweep={optim.steps:[1,2]}", "sweep.optim.steps: what all settings share"),
        ("sweep={algo.beta:[1]}", "sweep.algo.beta: no such key"),
        ("sweep={algo.tau:0.9}", "sweep.algo.tau=0.9: a list"),
        ("sweep={algo.tau:[]}", "sweep.algo.tau=[]: a list"),
        ("sweep={algo.tau:[0.5,2]}", "algo.tau=2"),
        ("sweep={seed:[0,some]}", "heads_seed=some"),
        ("sweep=3", "sweep: lists by key"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_begins(store, capsys, sweep, said):
    before = offline_lm.connect(store).execute("SELECT count(*) FROM runs").fetchall()
    assert fit.main([f"data.store={store}", *SMALL, sweep]) == 2
    assert said in capsys.readouterr().err
    assert offline_lm.connect(store).execute("SELECT count(*) FROM runs").fetchall() == before


def test_a_sweep_through_the_backbone_is_refused(store, capsys):
    assert fit.main([f"data.store={store}", *SMALL, "sweep={seed:[0,1]}", "model.train=full"]) == 2
    assert "model.train=full: a sweep shares features" in capsys.readouterr().err


def test_heads_train_in_bfloat16_to_nearly_the_same_values(store, run):
    ids = [run("algo=iql_lm", f"optim.precision={p}", "baselines=false")["run_id"] for p in ("float32", "bfloat16")]
    furthest, spread = offline_lm.connect(store).execute(
        "SELECT max(greatest(abs(a.v - b.v), abs(a.q - b.q))), max(a.q) - min(a.q)"
        " FROM run_values AS a JOIN run_values AS b USING (episode_id, step) WHERE a.run_id = ? AND b.run_id = ?",
        ids,
    ).fetchone() or (0, 0)
    assert 0 < furthest < max(0.02, 0.05 * spread)
