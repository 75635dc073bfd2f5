import json
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest

from offline_lm import cli, export, logs
from offline_lm.store import Store, rows
from offline_lm.store.episodes import read_episodes
from offline_lm.types import Episode, Label, Rejected, Step

EPISODES = [
    Episode(
        source="chat",
        native_id="1",
        dataset="d",
        task_id="mug, red",
        goal="Buy a mug",
        success=True,
        outcome_reward=1.0,
        labels=(Label(kind="human", value=1.0),),
        extra={"k": [1, None]},
        uri="log.json",
        steps=(
            Step(
                step=0,
                observation="home\0",
                action="click[4]",
                reward=0.0,
                screenshot={"sha256": "ab", "status": "stored"},
            ),
            Step(step=1, observation="mug", response="I buy.\nclick[buy]", action="click[buy]", reward=1.0),
            Step(step=2, observation="thanks", is_final_observation=True),
        ),
    ),
    # An outcome without an end, and steps that `jsonl` by itself would refuse or complete.
    Episode(
        source="webarena",
        native_id="2",
        outcome_reward=0.0,
        truncated=True,
        seed=5,
        parent_episode_id=rows.episode_id("chat", "d", "1"),
        steps=(Step(step=0, observation_error="timeout", response="?", action_args={"a": {"b": 1}}),),
    ),
]
FORMATS = ["jsonl", *(format_ for format_ in ("minari", "datasets") if find_spec(format_))]
SOURCES = {"jsonl": "jsonl", "minari": "minari", "datasets": "hf_datasets"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store = Store.create(tmp_path / "store")
    heads, steps = rows.arrow([rows.convert(episode, "i") for episode in EPISODES])
    store.append("steps", pa.Table.from_batches([steps]))
    store.append("episodes", pa.Table.from_batches([heads]))

    def run(*argv):
        code = cli.run("export", export.export, list(argv))
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("format_", FORMATS)
def test_what_was_exported_is_read_back_whole(run, tmp_path, format_):
    code, out, err = run(f"format={format_}", "output=out-v0", "json=true")
    assert code == 0, err
    *_, words, last = out.splitlines()
    counts = json.loads(last)
    filled = counts.pop("filled")
    picture = "steps.screenshot (the picture; its hash is kept)"
    assert counts == {"format": format_, "episodes": 2, "steps": 3, "output": "out-v0", "lost": {picture: 1}}
    assert words.startswith("3 steps of 2 episodes written to out-v0. lost, by episodes (")
    if format_ == "minari":
        assert filled == {
            **{"steps.terminated": 2, "steps.truncated": 2, "final_observation": 1},
            **{"steps.action": 1, "steps.observation": 1, "steps.reward": 1},
        }
    else:
        assert filled == {}
    back = list(logs.read(SOURCES[format_], tmp_path / "out-v0"))
    assert back == list(read_episodes(Store.open("store"))) == EPISODES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-v0", "store"]


@pytest.mark.parametrize("format_", FORMATS)
def test_auto_knows_it(run, tmp_path, format_):
    assert run(f"format={format_}", "output=out-v0")[0] == 0
    assert [e.native_id for e in logs.read("auto", tmp_path / "out-v0") if isinstance(e, Episode)] == ["1", "2"]


@pytest.mark.parametrize("format_", ["chat", "adp"])
def test_formats_that_lose_say_what(run, tmp_path, format_):
    pytest.importorskip(f"offline_lm.logs.{format_}")
    code, out, _ = run(f"format={format_}", "output=out.jsonl", "json=true")
    assert code == 0
    counts = json.loads(out.splitlines()[-1])
    assert (counts["episodes"], counts["steps"]) == (2, 3)
    assert counts["lost"]
    assert all(0 < count <= 2 for count in counts["lost"].values())
    back = list(logs.read(format_, Path("out.jsonl")))
    assert [len([s for s in e.steps if s.action or s.response]) for e in back if isinstance(e, Episode)] == [2, 1]


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (["where=success"], ["1"]),
        (["where=task_id = 'mug, red' OR n_steps IN (7, 8)"], ["1"]),
        (["sql=SELECT episode_id FROM steps WHERE reward > 0.5;"], ["1"]),
        (["sql=SELECT episode_id FROM episodes -- all", "where=seed = 5"], ["2"]),
        (["sql=SELECT parent_episode_id FROM episodes"], ["1"]),
    ],
)
def test_selection(run, given, ids):
    assert run("output=out.jsonl", *given)[0] == 0
    assert [json.loads(line)["native_id"] for line in Path("out.jsonl").read_text().splitlines()] == ids


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["output=x", "format=csv"], "there are jsonl, chat, adp, minari, datasets"),
        (["output=x", "where=colour = 1"], "no condition on the view episodes"),
        (["output=x", "sql=SELECT 1, 2"], "no condition on the view episodes"),
        (["output=x", "where=false"], "no episode of store is selected"),
        (["output=store"], "is a folder: name a file"),
        (["output=store", "format=datasets"], "exists: name a new folder"),
        (["output=no/x"], "its folder does not exist"),
        (["output=x", "store=nowhere"], "no store at"),
        ([], "output= must be given"),
    ],
)
def test_mistakes_write_nothing(run, tmp_path, argv, message):
    code, _, err = run(*argv)
    assert code == 2
    assert message in err
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("format_", FORMATS)
def test_what_fails_midway_leaves_nothing(run, tmp_path, monkeypatch, format_):
    def broken(store, where):
        yield EPISODES[0]
        raise OSError("the disk is gone")

    monkeypatch.setattr(export, "read_episodes", broken)
    code, _, err = run("output=x", f"format={format_}")
    assert code == 2
    assert "output=x cannot be written: the disk is gone" in err
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(("format_", "module"), [("minari", "minari"), ("datasets", "datasets")])
def test_a_missing_extra_is_named(run, monkeypatch, format_, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    code, _, err = run("output=x", f"format={format_}")
    assert code == 2
    assert f"pip install 'offline_lm[{format_}]'" in err


def test_a_damaged_line_is_rejected(run, tmp_path):
    run("output=out.jsonl")
    first, second = (json.loads(line) for line in Path("out.jsonl").read_text().splitlines())
    bad = [
        first | {"colour": 1},
        {k: v for k, v in second.items() if k != "native_id"},
        second | {"steps": [{"step": "0"}]},
    ]
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    items = logs.read("jsonl", Path("bad.jsonl"))
    assert [item.reason for item in items if isinstance(item, Rejected)] == ["unknown_key", "missing_key", "wrong_type"]
