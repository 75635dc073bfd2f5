"""source=auto: the smallest log of every format is that format's and no other's; what is no log is nobody's."""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs import Part, format_of, recognise
from offline_lm.logs._adapters import Sample
from offline_lm.types import Rejected

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
STEP = {"observation": "page", "action": "click[1]"}
TIMES = {"startTime": "2025-01-01T00:00:01.000Z", "endTime": "2025-01-01T00:00:02.000Z"}
SPAN = {"traceId": "4bf9", "spanId": "a0", "name": "chat", "attributes": [], "startTimeUnixNano": "1"}
TURN = {"action": "ls", "observation": "a", "response": "ls", "thought": "t", "state": "{}"}
ROLLOUT = {"trace_id": "7", "index": 0, "prompt": "Find", "html": "<p>", "response": "do()", "target": "Find"}
MOVE = {"observation": "a", "next_observation": "b", "action": "c", "reward": 0, "done": True, "trajectory_reward": 1}
VISIT = {"page": "index", "url": "http://shop/fixed_1", "goal": {"instruction_text": "a mug"}}
RUN_RENDER = "<body><pre>task_id: 1\n</pre><div class='state_obv'><pre>[1] RootWebArea</pre><div></body>"
LATS = "".join(
    f"2023-10-10 01:48:25,478 - INFO - {line}\n"
    for line in ("Iteration 1...", "PROMPT: \nWebShop \nInstruction:  \na red mug \n[Search] \n\nAction: \n")
)
REACT = "-----------------\n0\nAction: reset\nObservation: \nWebshop \nInstruction:  \na mug \n[Search] \n\n"


def _zip(**members: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "."), text)
    return sink.getvalue()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


# What a folder holds, by format: (the file or folder to recognise, {file: JSON value, text or bytes}). The first of a
# format is the usual one.
SMALLEST: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "adp": [("sample_std.json", {"sample_std.json": [
        {"id": "1", "content": [{"class_": "text_observation", "content": "hi", "source": "user"}], "details": {}}]})],
    "agentlab": [
        ("run", {"run/exp_args.pkl": b"\x80", "run/step_0.pkl.gz": gzip.compress(b"\x80")}),
        ("study", {"study/study.pkl.gz": gzip.compress(b"\x80"), "study/1/exp_args.pkl": b"\x80"}),
    ],
    "alfworld": [("traj.json", {"traj.json": {"metadata": {"environment": "alfworld"}, "trajectory": {"steps": []}}})],
    "atif": [
        ("trajectory.json", {"trajectory.json": {"schema_version": "ATIF-v1.4", "agent": {}, "steps": [
            {"step_id": 1, "source": "user", "message": "hi"}]}}),
        ("trial", {"trial/agent/trajectory.json": {"schema_version": "ATIF-v1.4", "steps": []},
                   "trial/verifier/reward.txt": "1", "trial/result.json": {"task_name": "t", "trial_name": "t__1"}}),
    ],
    "browser_use": [
        ("history.json", {"history.json": {"history": [
            {"model_output": None, "result": [], "state": {"url": "u"}, "metadata": None}]}}),
        ("talk", {"talk/conversation_1.txt": " system \nYou are\n", "talk/current_state_1.html": "<p>"}),
        ("steps", {"steps/meta.json": {"id": "1"}, "steps/tool_schema.json": [], "steps/step_001/messages.json": TALK}),
    ],
    "chat": [
        ("talk.jsonl", {"talk.jsonl": {"messages": TALK}}),
        ("alone.jsonl", {"alone.jsonl": json.dumps(TALK) + "\n" + json.dumps(TALK) + "\n"}),
        ("sharegpt.json", {"sharegpt.json": [{"conversations": SHAREGPT}]}),
        ("trl.jsonl", {"trl.jsonl": {"prompt": TALK[:1], "completion": TALK[1:]}}),
        ("talk.parquet", {"talk.parquet": _parquet([{"messages": TALK}])}),
    ],
    "hf_datasets": [("saved", {"saved/dataset_info.json": {}, "saved/state.json": {"_data_files": []},
                               "saved/data-00000-of-00001.arrow": b"\xff\xff\xff\xff"})],
    "intercode": [("ic.json", {"ic.json": {"0": {"query": "q", "turn_history": {}, "summary": {}}}})],
    "jsonl": [("mine.jsonl", {"mine.jsonl": {"steps": [STEP]}})],
    "langfuse": [
        ("observations.jsonl", {"observations.jsonl": {"id": "g", "traceId": "t", "type": "GENERATION", "name": "g",
                                                       "input": TALK[:1], "output": TALK[1]} | TIMES}),
        ("scores.jsonl", {"scores.jsonl": {"id": "s", "traceId": "t", "name": "n", "value": 1, "dataType": "NUMERIC"}}),
        ("trace.json", {"trace.json": {"id": "t", "observations": [{"id": "g", "type": "GENERATION"}]}}),
    ],
    "minari": [("data", {"data/main_data.hdf5": b"\x89HDF\r\n\x1a\n", "data/metadata.json": {"data_format": "hdf5"}})],
    "miniwob_demos": [
        ("demo.json", {"demo.json": {"utterance": "Click", "states": [], "rawReward": 1, "reward": 0.5}}),
        ("demo.json.gz", {"demo.json.gz": gzip.compress(b'{"utterance": "u", "states": [], "rawReward": 1}')}),
    ],
    "online_mind2web": [("task/result.json", {"task/result.json": {"task_id": "1", "task": "t", "action_history": []},
                                              "task/trajectory/0_screenshot.png": b"\x89PNG\r\n\x1a\n"})],
    "openhands": [("output.jsonl", {"output.jsonl": {"instance_id": "a", "history": [], "test_result": {}}})],
    "otel": [
        ("traces.jsonl", {"traces.jsonl": {"resourceSpans": [{"scopeSpans": [{"spans": [SPAN]}]}]}}),
        ("spans.jsonl", {"spans.jsonl": SPAN}),
        ("console.json", {"console.json": {"name": "chat", "context": {"span_id": "0x1"}, "attributes": {}}}),
    ],
    "playwright_trace": [("trace.zip", {"trace.zip": _zip(trace__trace='{"type": "context-options", "version": 8}')})],
    "reflexion": [("env_results_trial_0.json", {"env_results_trial_0.json": [
        {"name": "env_0", "memory": [], "is_success": False, "skip": False}]})],
    "swe_agent": [("run.traj", {"run.traj": {"environment": "swe_main", "trajectory": [TURN], "info": {}}})],
    "tapeagents": [("tape.json", {"tape.json": {"metadata": {"id": "t1"}, "context": None, "steps": [
        {"kind": "task", "metadata": {}, "task": "Buy"}]}})],
    "webarena": [("results", {"results/render_1.html": RUN_RENDER, "results/config.json": {"task_id": 1},
                              "results/log_1.log": "2023-09-24 16:32:00,509 - INFO - [Result] (PASS) 1.json\n"})],
    "webarena_verified": [("107", {"107/agent_response.json": {"status": "SUCCESS"}, "107/eval_result.json": {},
                                   "107/network.har": {"log": {}}})],
    "webcanvas": [("out.json", {"out.json": [{"task_name": "t", "task_status": "limit", "step_list": []}]})],
    "webrl": [
        ("rollout", {"rollout/traces/7.jsonl": ROLLOUT, "rollout/actions/7.json": {"task_id": 7, "score": 1}}),
        ("7.jsonl", {"7.jsonl": ROLLOUT}),
        ("moves.jsonl", {"moves.jsonl": json.dumps([MOVE])}),
        ("moves.pt", {"moves.pt": b"\x80\x02]q\x00."}),
    ],
    "webshop_human": [("session.jsonl", {"session.jsonl": VISIT})],
    "webshop_lats": [("run.log", {"run.log": LATS})],
    "webshop_react": [("run.txt", {"run.txt": REACT})],
    "webvoyager": [("taskShop--3", {"taskShop--3/interact_messages.json": TALK})],
}  # fmt: skip
ONE_BY_ONE = [(source, i) for source, made in SMALLEST.items() for i in range(len(made))]


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = value if isinstance(value, bytes | str) else json.dumps(value)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def claims(path: Path) -> list[str]:
    """Every format that `auto` would ask and that claims the path; general ones only if no other does."""
    formats = [format_of(name) for name in logs.sources()]
    specific = [form.name for form in formats if not form.general and form.detect(Sample(path))]
    return specific or [form.name for form in formats if form.general and form.detect(Sample(path))]


def test_every_format_is_here():
    assert sorted(SMALLEST) == logs.sources()


@pytest.mark.parametrize(("source", "i"), ONE_BY_ONE)
def test_a_format_claims_its_own_and_no_other_does(tmp_path, source, i):
    path, files = SMALLEST[source][i]
    write(tmp_path, files)
    assert claims(tmp_path / path) == [source]
    found = recognise(Sample(tmp_path / path), [format_of(name) for name in logs.sources()])
    assert found is not None
    assert found.name == source


def test_all_of_them_side_by_side(tmp_path):
    for source, i in ONE_BY_ONE:
        write(tmp_path / f"{source}-{i}", SMALLEST[source][i][1])
    found = [part for part in logs.parts("auto", tmp_path) if isinstance(part, Part)]
    got = {(part.source, part.path.relative_to(tmp_path).parts[0]) for part in found}
    assert got == {(source, f"{source}-{i}") for source, i in ONE_BY_ONE}
    assert [part for part in logs.parts("auto", tmp_path) if isinstance(part, Rejected)] == []


def test_in_one_folder_the_files_are_told_apart(tmp_path):
    """The format of the last file of a suffix is asked first: it must not take its neighbours'."""
    want = {}
    for source, i in ONE_BY_ONE:
        path, files = SMALLEST[source][i]
        if list(files) == [path] and source not in (
            "online_mind2web",
            "reflexion",
            "webcanvas",
        ):  # known by their names
            name = f"{i}-{source}-{path}"
            write(tmp_path, {name: files[path]})
            want[name] = source
    assert len(want) > 25
    assert {part.path.name: part.source for part in logs.parts("auto", tmp_path) if isinstance(part, Part)} == want


def test_a_study_without_episodes_stops_nothing(tmp_path):
    write(tmp_path, {"a/study.pkl.gz": b"\x80", "b.jsonl": {"steps": [STEP]}})
    told = list(logs.read("auto", tmp_path))
    assert [item.reason if isinstance(item, Rejected) else item.source for item in told] == ["unknown_format", "jsonl"]


NO_LOGS: dict[str, bytes] = {
    "empty.json": b"",
    "empty.jsonl": b"",
    "empty.parquet": b"",
    "empty.zip": b"",
    "empty.traj": b"",
    "blank.jsonl": b"\n\n \n",
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "README.md": b"# Logs\n\nAction: reset\nObservation: Webshop\n",
    "notes.txt": b"Instruction: buy a mug\n",
    "server.log": b"2023-10-10 01:48:25,478 - INFO - started\n",
    "noise.json": random.Random(0).randbytes(5000),
    "noise.jsonl": random.Random(1).randbytes(5000),
    "noise.log": random.Random(2).randbytes(5000),
    "noise.zip": b"PK\x03\x04" + random.Random(3).randbytes(500),
    "noise.parquet": b"PAR1" + random.Random(4).randbytes(500) + b"PAR1",
    "noise.jsonl.gz": b"\x1f\x8b" + random.Random(5).randbytes(500),
    "noise.jsonl.zst": b"\x28\xb5\x2f\xfd" + random.Random(6).randbytes(500),
    "cut.json": b'{"messages": [{"role": "us',
    "deep.json": b"[" * 100_000,
    "numbers.json": b"[1, 2, 3]",
    "scalar.json": b"17",
    "null.json": b"null",
    "package.json": b'{"name": "x", "version": "1.0", "dependencies": {}}',
    "tasks.json": b'[{"task_id": "1", "confirmed_task": "Buy a mug", "website": "http://x"}]',
    "empty_steps.json": b'{"steps": [], "history": [], "trajectory": [], "content": []}',
    "wrong_types.json": b'{"steps": 3, "history": "x", "messages": {}, "trajectory": null, "content": 7}',
    "table.csv": b"a,b\n1,2\n",
    "archive.zip": _zip(readme__md="hello"),
    "columns.parquet": _parquet([{"a": 1, "b": "x"}]),
}


@pytest.mark.parametrize("name", NO_LOGS)
def test_what_is_no_log_is_claimed_by_none(tmp_path, name):
    (tmp_path / name).write_bytes(NO_LOGS[name])
    assert claims(tmp_path / name) == []
    assert claims(tmp_path) == []


def test_random_values_under_known_names_are_claimed_by_none_or_one(tmp_path):
    """A file name alone may claim; no name and no keys of one format with values of another type raise."""
    names = {Path(path).name for made in SMALLEST.values() for path, files in made for path in files}
    values = [b"", b"{}", b"[]", b"null", b'{"steps": 1}', b"\xff\xfe\x00", b'[{"a": []}]', b"PK", b"\x80\x02"]
    for i, name in enumerate(sorted(names)):
        for j, value in enumerate(values):
            folder = tmp_path / f"{i}-{j}"
            write(folder, {name: value})
            assert len(claims(folder / name)) <= 1
            assert len(claims(folder)) <= 1


def test_a_path_that_nothing_recognises(tmp_path):
    (tmp_path / "README.md").write_text("# Logs\n")
    for path in (tmp_path, tmp_path / "README.md"):
        with pytest.raises(UserError, match="recognises no log") as told:
            list(logs.read("auto", path))
        assert all(source in str(told.value) for source in logs.sources())
        assert str(path) in str(told.value)


def test_a_path_that_two_formats_recognise(tmp_path):
    """A folder of conversations that also holds WebVoyager's messages."""
    write(tmp_path, {"run/conversation_1.txt": " system \nhi\n", "run/interact_messages.json": TALK})
    told = r"run looks like more than one format: browser_use \(.*conversation_N.*\); webvoyager \(.*\). Name one"
    with pytest.raises(UserError, match=told):
        list(logs.read("auto", tmp_path))


def test_general_formats_give_way(tmp_path):
    """A row of chat messages that a specific format also knows is that format's."""
    row = {"instance_id": "a", "history": [], "test_result": {}, "messages": TALK}
    write(tmp_path, {"output.jsonl": row, "step_001/messages.json": TALK, "meta.json": {"id": "1"}})
    general = format_of("chat")
    detects: Callable[[Sample], str | None] = general.detect
    assert general.general
    assert detects(Sample(tmp_path / "output.jsonl"))
    assert claims(tmp_path / "output.jsonl") == ["openhands"]
    assert claims(tmp_path) == ["browser_use"]  # the folder is claimed whole, so nobody asks about messages.json
