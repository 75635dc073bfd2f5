import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offline_lm.errors import UserError
from offline_lm.logs._labels import Labels
from offline_lm.store import rows
from offline_lm.types import Episode, Label, Step

UNLABELLED = Episode(
    source="chat",
    native_id="1",
    dataset="d",
    task_id="17",
    model="m",
    trial=2,
    quality_flags=("unlabelled", "odd"),
    steps=(
        Step(step=0, observation="a", action="x"),
        Step(step=1, observation="b", action="y"),
        Step(step=2, observation="c", is_final_observation=True),
    ),
)
LOGGED = replace(
    UNLABELLED, steps=tuple(replace(s, reward=float(s.step), reward_source="env") for s in UNLABELLED.steps[:2])
)


def load(path, *table) -> Labels:
    path.write_text("\n".join(map(json.dumps, table)))
    return Labels.load(path)


@pytest.fixture
def labels(tmp_path):
    return lambda *table: load(tmp_path / "labels.jsonl", *table)


def test_a_label_becomes_the_outcome(labels):
    table = labels({"task_id": "17", "trial": 2, "reward": 0.5, "labeler": "ann", "name": "q", "reason": "half"})
    episode = table.apply(UNLABELLED)
    assert [(s.reward, s.reward_source) for s in episode.steps] == [(0.0, "outcome"), (0.5, "outcome"), (None, None)]
    assert (episode.outcome_reward, episode.success, episode.terminated) == (0.5, None, None)
    assert episode.labels == (Label(kind="human", labeler="ann", name="q", value=0.5, reason="half"),)
    assert episode.quality_flags == ("odd",)
    assert (table.matched, table.unmatched) == (1, 0)
    rows.convert(episode, "i")


def test_all_keys_of_a_row_must_match(labels):
    table = labels(
        {"task_id": "17", "model": "other", "reward": 1},
        {"task_id": "17", "model": "m", "seed": 0, "reward": 1},
        {"task_id": 17, "model": None, "trial": "2", "success": True},  # a null key says nothing; 17 is "17"
        {"task_id": "18", "success": False},
    )
    episode = table.apply(UNLABELLED)
    assert (episode.success, episode.outcome_reward, episode.steps[1].reward) == (True, 1.0, 1.0)
    assert (table.matched, table.unmatched) == (1, 3)
    other = replace(UNLABELLED, task_id="19")
    assert table.apply(other) is other
    assert (table.matched, table.unmatched) == (1, 3)


@pytest.mark.parametrize("key", [{"episode_id": rows.episode_id("chat", "d", "1")}, {"native_id": "1", "dataset": "d"}])
def test_identity_is_a_key(labels, key):
    assert labels(key | {"success": 0}).apply(UNLABELLED).outcome_reward == 0.0


def test_a_logged_reward_stands(labels):
    differs = labels({"task_id": "17", "reward": 0}).apply(LOGGED)
    assert differs == replace(
        LOGGED, labels=(Label(kind="human", value=0.0),), quality_flags=("unlabelled", "odd", "label_differs")
    )
    agrees = labels({"task_id": "17", "success": True}).apply(LOGGED)
    assert [s.reward_source for s in agrees.steps] == ["env", "env"]
    assert (agrees.outcome_reward, agrees.success, agrees.quality_flags) == (1.0, True, ("odd",))
    failed = replace(UNLABELLED, success=False)
    assert "label_differs" in labels({"task_id": "17", "success": True}).apply(failed).quality_flags


def test_a_self_report_is_no_reward(labels):
    episode = labels({"task_id": "17", "success": True, "kind": "self"}).apply(UNLABELLED)
    assert (episode.self_reported_success, episode.success, episode.outcome_reward) == (True, None, None)
    assert [s.reward for s in episode.steps] == [None] * 3
    assert episode.quality_flags == ("unlabelled", "odd")


def test_rows_that_agree_and_rows_that_do_not(labels):
    judged = {"task_id": "17", "kind": "judge"}
    episode = labels(judged | {"success": True}, {"model": "m", "reward": 1}, {"model": "m", "reward": 1}).apply(
        UNLABELLED
    )
    assert [label.kind for label in episode.labels] == ["judge", "human"]
    with pytest.raises(UserError, match=r"byte 0 and .*byte 35 disagree on episode '1' .*success False"):
        labels({"task_id": "17", "success": True}, {"model": "m", "success": False}).apply(UNLABELLED)


TABLE = [
    {"task_id": "17", "trial": 2, "success": True, "score": 0.5, "reason": 'so, "yes"'},
    {"task_id": "18", "trial": None, "success": None, "score": None, "reason": None},
]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet", "by_task.json"])
def test_files(tmp_path, name):
    path = tmp_path / name
    if name == "t.jsonl":
        path.write_text("\n".join(map(json.dumps, TABLE)))
    elif name == "t.json":
        path.write_text(json.dumps(TABLE, indent=1))
    elif name == "t.csv":
        path.write_text(
            '\ufefftask_id,trial,success,score,reason,other\r\n17,2,True,0.5,"so, ""yes""",x\r\n18,,,,,\r\n'
        )
    elif name == "t.parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), path)
    else:
        path.write_text(json.dumps({row["task_id"]: row for row in TABLE}))
    (row,) = Labels.load(path).rows  # a row without an outcome is not labelled yet
    assert (row.key, row.reward, row.success) == ((("task_id", "17"), ("trial", 2)), 0.5, True)
    assert row.label == Label(kind="human", value=0.5, reason='so, "yes"')


def test_an_object_by_task(tmp_path):
    table = load(tmp_path / "t.json", {"17": 0.25, "18": True, "19": {"success": False, "kind": "env"}})
    assert [(row.key, row.reward, row.success) for row in table.rows] == [
        ((("task_id", "17"),), 0.25, None),
        ((("task_id", "18"),), None, True),
        ((("task_id", "19"),), None, False),
    ]
    (row,) = load(tmp_path / "t.json", {"task_id": "17", "reward": 1}).rows  # one row, not an object by task
    assert row.reward == 1.0


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("t.jsonl", '{"reward": 1}', "byte 0: the row names no episode"),
        ("t.jsonl", '{"task_id": "1"}\n{"task_id": "2"}', "holds no label"),
        ("t.jsonl", "", "holds no label"),
        ("t.csv", "task_id,who\n1,me\n", "holds no label"),
        ("t.csv", "who,success\nme,true\n", "line 2: the row names no episode"),
        ("t.csv", "task_id,success\n1,perhaps\n", "line 2: success is 'perhaps'; it must be true or false"),
        ("t.csv", "task_id,reward\n1,nan\n", "reward is 'nan'; it must be a finite number"),
        ("t.csv", "task_id,seed,reward\n1,1.5,1\n", "seed is '1.5'; it must be a whole number"),
        ("t.csv", b"task_id,reward\n\xff,1\n", "cannot be read as CSV"),
        ("t.csv", 'task_id,reward\n"1,1\n', "cannot be read as CSV"),
        ("t.jsonl", '{"task_id": ["1"], "reward": 1}', "task_id is .* it must be text"),
        ("t.jsonl", '{"task_id": "1", "reward": 1, "score": 0}', "reward and score differ"),
        ("t.jsonl", '{"task_id": "1", "reward": 1, "kind": "god"}', "kind is 'god'"),
        ("t.jsonl", '{"task_id": "1", "rew', "byte 0: .*was the file cut"),
        ("t.jsonl", "[1]", "a row is an object"),
        ("t.json", '{"17": "yes"}', "key '17': no label"),
        ("t.parquet", "PAR1", "cannot be read as Parquet"),
        ("t.txt", "", "its name must end in one of .jsonl"),
    ],
)
def test_mistakes_name_file_and_place(tmp_path, name, text, told):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=told) as raised:
        Labels.load(path)
    assert name in str(raised.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        Labels.load(tmp_path / "none.csv")
