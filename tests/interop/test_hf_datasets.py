"""What others see of a dataset that we wrote; that we read all of it back stands in tests/test_export.py."""

import json
import shutil
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.errors import UserError
from offline_lm.logs import _child
from offline_lm.logs import hf_datasets as reader
from offline_lm.store import rows
from offline_lm.types import Candidate, Episode, Rejected, Step

datasets = pytest.importorskip("datasets")

from offline_lm.interop.hf_datasets import write  # noqa: E402

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
EPISODES = [
    Episode(
        source="chat",
        native_id=str(i),
        started_at=NOON,
        sampling={"temperature": 0.5, "beams": i},
        extra={"k": [i]} if i else {},
        steps=(
            Step(
                step=0,
                observation="o" * i,
                action="a",
                ts_start=NOON,
                candidates=(Candidate(action="a", executed=True), Candidate(action="b")),
                prompt_token_ids=(1, 2),
            ),
            Step(step=1, observation="end", is_final_observation=True),
        ),
    )
    for i in range(120)  # more than are held at a time
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "ours"
    write(iter(EPISODES), folder)
    return folder


def test_datasets_opens_it(folder):
    data = datasets.load_from_disk(folder)
    assert len(data) == 120
    row = data[3]
    assert (row["native_id"], row["started_at"], row["reward" if "reward" in row else "success"]) == ("3", NOON, None)
    assert json.loads(row["sampling"]) == {"temperature": 0.5, "beams": 3}
    step = row["steps"][0]
    assert (step["observation"], step["reward"], step["prompt_token_ids"]) == ("ooo", None, [1, 2])
    assert [c["executed"] for c in step["candidates"]] == [True, None]
    assert [p.name for p in folder.parent.iterdir()] == ["ours"]  # the copy beside it is gone


def test_read_back(folder):
    assert list(reader.read(folder)) == EPISODES


def test_shards_and_splits(folder, tmp_path):
    data = datasets.load_from_disk(folder)
    splits = datasets.DatasetDict(
        {"train": data.select(range(5)), "test": data.filter(lambda row: row["native_id"] == "7")}
    )
    splits.save_to_disk(tmp_path / "splits", num_shards={"train": 2, "test": 1})
    assert list(folder.glob("cache-*.arrow"))  # `filter` leaves one, whose rows are not the dataset's
    assert len(list(reader.read(folder))) == 120
    got = [e.native_id for e in reader.read(tmp_path / "splits") if isinstance(e, Episode)]
    assert got == ["7", "0", "1", "2", "3", "4"]  # test before train


def test_rows_of_others(tmp_path):
    """Our `jsonl` keys, as `datasets` makes columns of them: structs filled with nulls."""
    lines = [
        {"id": 1, "success": True, "steps": [{"observation": "o", "action": "a", "target": {"ref": "1", "tag": None}}]},
        {"id": 2, "success": None, "steps": [{"observation": "o", "action": None, "target": None}]},
        {"id": 3, "success": False, "steps": None},
    ]
    datasets.Dataset.from_list(lines).save_to_disk(tmp_path / "theirs")
    first, *others = reader.read(tmp_path / "theirs")
    assert isinstance(first, Episode)
    assert (first.source, first.dataset, first.success, first.outcome_reward) == ("hf_datasets", "theirs", True, 1.0)
    assert (first.extra, first.steps[0].target, first.steps[0].source_offset) == ({"id": 1}, {"ref": "1"}, 0)
    assert rows.convert(first, "i").n_steps == 1
    assert [r.offset for r in others if isinstance(r, Rejected)] == [1, 2]  # the reasons are those of `jsonl`


def _only(path) -> list[str]:
    return [item.reason for item in reader.read(path) if isinstance(item, Rejected)]


def test_damage(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (file,) = copy.glob("data-*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert _only(copy) == ["damaged_file"]
    file.unlink()
    assert _only(copy) == ["unreadable_file"]
    state = copy / "state.json"
    for text, reason in (
        ("{}", "missing_key"),
        ('{"_data_files": [{"filename": "../ours/data-00000-of-00001.arrow"}]}', "bad_value"),
        ('{"_data_files": [3]}', "bad_value"),
        ("{", "json_truncated"),
    ):
        state.write_text(text)
        assert _only(copy) == [reason]
    state.unlink()
    with pytest.raises(UserError, match="holds no saved dataset"):
        list(reader.read(copy))


def test_a_length_that_is_a_lie(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (file,) = copy.glob("data-*.arrow")
    whole = bytearray(file.read_bytes())
    second = whole.index(b"\xff\xff\xff\xff", 4)  # where the record batch begins: a mark, and the length of its head
    whole[second + 4 : second + 8] = (2**31 - 1).to_bytes(4, "little")
    file.write_bytes(whole)
    assert _only(copy) == ["damaged_file"]


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({"extra": ["{"]}, "json_truncated"),
        ({"extra": ["[]"]}, "wrong_type"),
        ({"extra": [b"\xff"]}, "wrong_type"),
        ({"steps": ["x"]}, "wrong_type"),
        ({"seed": [1.5]}, "wrong_type"),
    ],
)
def test_values_of_other_types(folder, tmp_path, column, reason):
    table = pa.table({"steps": [[{"observation": "o", "action": "a"}]]} | column)
    datasets.Dataset(table).save_to_disk(tmp_path / "x")
    assert _only(tmp_path / "x") == [reason]


def test_a_bomb_of_zeros(folder, tmp_path, monkeypatch):
    """A few kilobytes of zstd that stand for more memory than the child may have."""
    monkeypatch.setattr(_child, "MEMORY", 2 << 30)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (file,) = copy.glob("data-*.arrow")
    table = pa.table({"seed": pa.array(np.zeros(300_000_000, np.int64))})  # its pages are never written: no memory
    with pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as sink:
        sink.write_table(table)
    assert file.stat().st_size < 1 << 20
    assert _only(copy) == ["too_large"]


# Few: each starts a process.
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_garbage(folder, tmp_path, data):
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(folder, copy)
    (original,) = folder.glob("data-*.arrow")
    whole = bytearray(original.read_bytes()[:20_000])
    for _ in range(data.draw(st.integers(0, 20))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (copy / original.name).write_bytes(whole)
    assert all(isinstance(item, Episode | Rejected) for item in reader.read(copy))
