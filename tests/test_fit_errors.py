"""A user's mistake ends each command that trains or reads with exit code 2 and one line that names it."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from offline_lm import _fit_checks, cli, fit, ingest, paths, query, score
from offline_lm.store import Store

SMALL = ("optim.steps=2", "baselines=false", "logger=none", "threads=1")
TINY = ("model=tiny", "model.stage.tokens=200", "model.vocab_size=300", "model.width=32")
TINY += ("model.layers=1", "model.attention_heads=2")


def _log(file):
    with file.open("w") as log:
        for i in range(4):
            steps = [{"observation": f"page {i}", "action": "click[1]"}, {"observation": f"item {i}", "action": "buy"}]
            episode = {"task_id": f"shop/{i}", "goal": f"Buy mug {i}", "success": i % 2 == 0, "terminated": True}
            log.write(json.dumps({**episode, "steps": steps}) + "\n")
    return file


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run("ingest", ingest.ingest, [f"path={_log(tmp_path / 'log.jsonl')}", "store=store"]) == 0
    return Store.open("store")


@pytest.fixture
def mistake(capfd):
    """The one line that a command says about a mistake, after it exited with 2."""

    def mistake(main, *argv):
        capfd.readouterr()
        assert main(argv) == 2
        lines = capfd.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:]
        assert not any("Traceback" in line for line in lines)
        return errors[0]

    return mistake


def test_the_good_case_is_good(store):
    assert fit.main([*SMALL, *TINY]) == 0


def test_an_unknown_algorithm_lists_the_known(store, mistake):
    error = mistake(fit.main, "algo=foo")
    assert error.startswith("error: no algo=foo; there are ")
    for file in (paths.CONF / "algo").glob("*.yaml"):
        assert file.stem in error


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (fit.main, ("data.store=nowhere",)),
        (query.main, ("SELECT 1", "store=nowhere")),
        (score.main, ("run=r1", "input=log.jsonl", "output=out.jsonl", "store=nowhere")),
    ],
)
def test_a_missing_store(store, mistake, main, argv):
    error = mistake(main, *argv)
    assert "no store at" in error
    assert "offline_lm.ingest" in error
    assert not Path("nowhere").exists()


def test_an_empty_store(store, mistake):
    Store.create("empty")
    error = mistake(fit.main, "data.store=empty", *SMALL)
    assert "holds no episodes" in error
    assert "offline_lm.ingest" in error
    assert Store.open("empty").files("runs") == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("site = 'nope'", "selects none of the store's 4 episodes"),
        ("sight = 'nope'", "sight"),
        ("selec (", "selec ("),
        ("goal::INT = 3", "goal::INT"),
    ],
)
def test_a_filter_that_selects_nothing(store, mistake, where, message):
    error = mistake(fit.main, f'data.where="{where}"', *SMALL)
    assert "data.where=" in error
    assert message in error


def test_a_log_without_rewards(store, mistake, tmp_path):
    line = {"goal": "x", "steps": [{"observation": "x", "action": "a"}, {"observation": "y", "action": "b"}]}
    (tmp_path / "blind.jsonl").write_text(json.dumps(line) + "\n")
    assert cli.run("ingest", ingest.ingest, ["path=blind.jsonl", "store=blind", "mode=strict"]) == 0
    assert "no reward" in mistake(fit.main, "data.store=blind", *SMALL)


@pytest.mark.parametrize("table", ["steps", "episodes"])
@pytest.mark.parametrize("damage", ["page", "footer"])
def test_a_corrupt_file_of_the_store_is_named(store, mistake, table, damage):
    (file,) = store.files(table)
    data = Path(file).read_bytes()
    if damage == "page":  # every column chunk, under a footer that stands
        group = pq.ParquetFile(file).metadata.row_group(0)
        chunks = [group.column(i) for i in range(group.num_columns)]
        end = min(max(c.data_page_offset + c.total_compressed_size for c in chunks), len(data) - 8)
        broken = data[:4] + b"\xff" * (end - 4) + data[end:]
    else:
        broken = data[: len(data) // 2]
    Path(file).write_bytes(broken)
    assert os.path.basename(file) in mistake(fit.main, *SMALL, *TINY)


@pytest.mark.parametrize("path", ["/nowhere", "no/such/folder", "."])
def test_a_model_path_with_no_model(store, mistake, monkeypatch, path):
    error = mistake(fit.main, "model=hf", f"model.path={path}", *SMALL)
    assert f"model.path={path}" in error
    assert "config.json" in error


def test_a_model_must_be_named(store, mistake):
    assert "model.path= must be given" in mistake(fit.main, "model=hf", *SMALL)


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (query.main, ("analysis/decisive_steps.sql", "run=nope")),
        (score.main, ("run=nope", "input=log.jsonl", "output=out.jsonl")),
    ],
)
def test_a_run_that_does_not_exist(store, mistake, main, argv):
    assert "offline_lm.fit" in mistake(main, *argv)  # there are none yet
    store.append("runs", [{"run_id": "r1", "status": "finished"}])
    error = mistake(main, *argv)
    assert "no run `nope`" in error
    assert "r1 (finished)" in error


def test_sql_with_an_error(store, mistake):
    assert "line 1, column 8" in mistake(query.main, "SELECT nope FROM episodes")


@pytest.mark.parametrize(
    "argument",
    [
        "algoo=iql_lm",
        "optim.stepz=3",
        "algo.tau=2",
        "algo.tau=1",
        "algo.gamma=some",
        "algo.gamma=1.01",
        "algo.polyak=-1",
        "baselines=some",
        "data.held_out=2",
        "data.held_out=some",
        "data.history=-1",
        "data.max_tokens=1e3",
        "data.resident=maybe",
        "data.truncated=maybe",
        "device=abacus",
        "device=cuda:99",
        "model.attention_heads=3",
        "model.dtype=int8",
        "model.heads.loss=l3",
        "model.stage.goal_swap=-1",
        "model.stage.goals_per_page=1",
        "model.stage.tokens=-1",
        "model.train=some",
        "optim.batch_size=0",
        "optim.lr=nan",
        "optim.steps=0",
        "optim.precision=int8",
        "optim.steps=true",
        "run_dir=log.jsonl",
        "run_dir=log.jsonl/below",
        "seed=some",
        "seed=-1",
        "heads_seed=-1",
        "threads=0",
        "threads=two",
    ],
)
def test_values_out_of_range(store, mistake, argument):
    assert argument.partition("=")[0] in mistake(fit.main, *SMALL, *TINY, argument)
    assert store.files("runs") == []  # said before anything began


def test_an_argument_that_the_algorithm_does_not_take(store, mistake):
    error = mistake(fit.main, *SMALL, *TINY, "algo=q_mc", "+algo.beta=1")
    assert error.startswith("error: algo: ")
    assert "'beta'" in error


def test_every_key_that_is_checked_is_in_the_configuration():
    known = {key for model in ("reader", "tiny") for key in cli._keys("fit", f"model={model}")}
    checked = {key for _, _, keys in _fit_checks.RULES for key in keys.split()}
    assert checked <= known


def test_the_good_ends_of_ranges_are_taken(store):
    ends = ("algo.gamma=1", "algo.polyak=1", "data.held_out=0", "data.history=0", "model.heads.loss=hl_gauss")
    assert fit.main([*SMALL, *TINY, *ends, "run_dir=kept/here", "device=cpu"]) == 0
    (folder,) = Path("kept/here").iterdir()
    assert (folder / "critic.json").is_file()
