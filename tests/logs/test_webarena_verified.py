"""WebArena-Verified: an outcome and no steps; each task is quarantined, with the outcome in the message."""

import json
from typing import Any

import pytest

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs._adapters import Sample


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, value in files.items():
        path = folder / {"answer": "agent_response.json", "result": "eval_result.json", "har": "network.har"}[name]
        path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def records(path) -> list[Any]:
    return list(logs.read("webarena_verified", path))


def read(path):
    return [(r.reason, r.message.partition(",")[0]) for r in records(path)]


def test_outcomes(tmp_path):
    result = {"task_id": 7, "status": "success", "score": 1.0}
    write(tmp_path / "a" / "7", answer={}, result=result, har={})
    write(tmp_path / "a" / "8", answer={}, har={})
    write(tmp_path / "a" / "9", answer={}, result=b"{")
    write(tmp_path / "a" / "10", answer={}, result=result | {"score": None})
    assert [reason for reason, _ in read(tmp_path)] == ["missing_key", "outcome_only", "no_steps", "json_truncated"]
    assert "webarena task 7: success" in [message for _, message in read(tmp_path)]
    detect = logs.format_of("webarena_verified").detect
    assert detect(Sample(tmp_path / "a" / "7"))
    assert detect(Sample(tmp_path / "a")) is None
    with pytest.raises(UserError, match="holds no folder"):
        read(tmp_path / "a" / "7" / "network.har")


def test_the_real_tasks(shared_data):
    found = records(shared_data / "webarena-verified")
    assert [(r.reason, r.message.partition(", no")[0]) for r in found] == [
        ("outcome_only", "webarena task 107: failure, score 0"),
        ("outcome_only", "webarena task 108: success, score 1"),
    ]
