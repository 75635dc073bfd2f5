"""The line format: what is accepted and how it is completed; every class of malformed line, and its
reason."""

import gzip
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.logs import _files
from offline_lm.types import Candidate, Episode, Rejected, Step

STEP = {"observation": "page", "action": "click[1]"}


def read(source, path) -> Iterator[Any]:
    return logs.read(source, path)


def write(tmp_path, *lines, name="log.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def one(tmp_path, line):
    (record,) = read("jsonl", write(tmp_path, line))
    return record


def episode(tmp_path, **keys):
    record = one(tmp_path, {"steps": [STEP, STEP, STEP]} | keys)
    assert isinstance(record, Episode), record
    return record


def rewards(record):
    return [step.reward for step in record.steps]


def test_example_of_the_design(tmp_path):
    step = {"observation": "o", "action": "click[4]", "reward": 0.67, "candidates_complete": True}
    step["candidates"] = [{"action": "click[4]", "logprob": -0.5, "source": "sampled"}, "back"]
    line = {"task_id": "shop/17", "goal": "Buy", "policy_id": "eps", "success": True, "terminated": True}
    got = one(tmp_path, line | {"steps": [step], "final_observation": "done"})
    first, final = got.steps
    assert first.candidates == (
        Candidate(action="click[4]", logprob=-0.5, source="sampled"),
        Candidate(action="back"),
    )
    assert first.reward == 0.67
    assert first.terminated is True
    assert first.truncated is None
    assert (final.step, final.is_final_observation, final.observation) == (1, True, "done")
    assert final.action is None
    assert final.reward is None
    assert (got.task_id, got.dataset, got.outcome_reward, got.success) == ("shop/17", "log", 0.67, True)
    assert got.quality_flags == ()


def test_one_outcome_goes_to_the_last_action_and_is_not_counted_twice(tmp_path):
    got = episode(tmp_path, outcome_reward=0.67, final_observation="end")
    assert rewards(got) == [0.0, 0.0, 0.67, None]
    assert [s.reward_source for s in got.steps] == [None, None, "outcome", None]
    assert (got.terminated, got.truncated) == (True, False)
    both = episode(tmp_path, outcome_reward=2.0, steps=[STEP | {"reward": 0.5}, STEP | {"reward": 1.5}])
    assert rewards(both) == [0.5, 1.5]
    assert both.outcome_reward == 2.0


@pytest.mark.parametrize(("success", "reward"), [(True, 1.0), (False, 0.0)])
def test_success_alone_is_a_reward(tmp_path, success, reward):
    got = episode(tmp_path, success=success)
    assert rewards(got) == [0.0, 0.0, reward]
    assert got.outcome_reward == reward


def test_reward_on_the_last_step_only_is_the_outcome(tmp_path):
    got = episode(tmp_path, steps=[STEP, STEP, STEP | {"reward": 1}])
    assert rewards(got) == [0.0, 0.0, 1.0]
    assert type(got.steps[2].reward) is float
    assert got.outcome_reward == 1.0


def test_a_reward_missing_among_others_stays_null(tmp_path):
    got = episode(tmp_path, steps=[STEP | {"reward": 1}, STEP, STEP | {"reward": 1}])
    assert rewards(got) == [1.0, None, 1.0]
    assert got.outcome_reward is None
    assert got.quality_flags == ("missing_rewards",)


def test_unlabelled_stays_null_and_self_report_is_no_reward(tmp_path):
    got = episode(tmp_path, self_reported_success=True, labels=[{"kind": "self", "value": 1.0}])
    assert rewards(got) == [None, None, None]
    assert got.quality_flags == ("unlabelled",)
    assert (got.outcome_reward, got.success, got.terminated) == (None, None, None)


def test_a_repeated_observation_keeps_its_own_reward(tmp_path):
    got = episode(tmp_path, steps=[STEP | {"reward": 0}, STEP | {"reward": 1}, STEP | {"reward": 0}])
    assert rewards(got) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({"success": False, "max_steps": 3}, (False, True, "step_limit")),
        ({"success": False, "max_steps": 4}, (True, False, None)),
        ({"success": False, "end_reason": "time_limit"}, (False, True, "time_limit")),
        ({"success": True, "end_reason": "agent_stop"}, (True, False, "agent_stop")),
        ({"success": True, "end_reason": "agent_error"}, (None, None, "agent_error")),
        ({"success": True, "truncated": True}, (None, True, None)),
        ({"success": True, "terminated": False, "truncated": True}, (False, True, None)),
        ({}, (None, None, None)),
    ],
)
def test_how_it_ended(tmp_path, keys, ends):
    got = episode(tmp_path, **keys)
    assert (got.terminated, got.truncated, got.end_reason) == ends
    assert (got.steps[-1].terminated, got.steps[-1].truncated) == ends[:2]
    assert (got.steps[0].terminated, got.steps[0].truncated) == (None, None)


def test_end_flags_of_the_last_step_are_the_episodes(tmp_path):
    got = episode(tmp_path, steps=[STEP | {"reward": 0}, STEP | {"reward": 0, "truncated": True}])
    assert got.truncated is True
    assert got.terminated is None


def test_unknown_keys_are_kept_and_flagged(tmp_path):
    got = episode(tmp_path, success=True, colour="red", extra={"a": 1}, steps=[STEP | {"mood": 3}])
    assert got.extra == {"a": 1, "colour": "red"}
    assert got.steps[0].extra == {"mood": 3}
    assert got.quality_flags == ("unknown_keys",)


def test_tokens_messages_and_times(tmp_path):
    step = {
        "messages": [{"role": "user", "content": "hé"}],
        "response": "go",
        "ts_start": "2026-11-21T09:30:00",
    }
    step |= {"response_token_ids": [1, 2], "response_logprobs": [-0.1, 0]}
    got: Any = episode(tmp_path, success=True, steps=[step]).steps[0]
    assert json.loads(got.messages) == step["messages"]
    assert got.response_token_ids == (1, 2)
    assert got.response_logprobs == (-0.1, 0.0)
    assert got.ts_start.isoformat() == "2026-11-21T09:30:00+00:00"
    assert got.action is None


def test_offsets_hashes_and_blank_lines(tmp_path):
    line = json.dumps({"success": True, "steps": [STEP]}).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + line, b"", b"  ", b"{", line)
    first, bad, second = read("jsonl", path)
    assert first.steps[0].source_offset == 3
    assert bad.offset == 3 + len(line) + 1 + 1 + 3
    assert bad.sha256 == hashlib.sha256(b"{").hexdigest()
    assert (bad.excerpt, bad.uri, bad.source) == ("{", str(path), "jsonl")
    assert first.native_id == second.native_id == hashlib.sha256(line).hexdigest()[:32]
    assert path.read_bytes()[second.steps[0].source_offset :].startswith(line)


def test_folders_and_compression(tmp_path):
    line = json.dumps({"success": True, "steps": [STEP]}).encode() + b"\n"
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "sub" / "c.jsonl.zst").write_bytes(pa.compress(line, codec="zstd", asbytes=True))
    (tmp_path / "a.jsonl").write_bytes(line)
    (tmp_path / "notes.txt").write_text("not a log")
    assert [record.dataset for record in read("jsonl", tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize("cut", ["gz", "zst"])
def test_a_torn_compressed_file_ends_in_one_rejected(tmp_path, cut):
    lines = b"".join(json.dumps({"success": True, "steps": [STEP], "seed": i}).encode() + b"\n" for i in range(999))
    whole = gzip.compress(lines) if cut == "gz" else pa.compress(lines, codec="zstd", asbytes=True)
    path = tmp_path / f"torn.jsonl.{cut}"
    path.write_bytes(whole[: len(whole) // 2])
    records = list(read("jsonl", path))
    assert records[-1].reason in ("damaged_file", "json_truncated")
    assert sum(isinstance(record, Rejected) for record in records) == 1
    path.write_bytes(b"no such format")
    assert [record.reason for record in read("jsonl", path)] == ["damaged_file"]


def test_a_line_over_the_limit_is_rejected_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_files.lines, "__defaults__", (1000,))
    long = json.dumps({"goal": "x" * 5000, "steps": [STEP]}).encode()
    bad, good = read("jsonl", write(tmp_path, long, {"success": True, "steps": [STEP]}))
    assert (bad.reason, bad.sha256) == ("too_large", hashlib.sha256(long).hexdigest())
    assert good.steps[0].source_offset == len(long) + 1


def lab(*steps, **keys):
    return {"success": True, "steps": list(steps) or [STEP]} | keys


MALFORMED = {
    "cut": (b'{"steps": [', "json_truncated", "cut"),
    "bare text": (b"hello", "json_syntax", "not JSON"),
    "two values": (b"{} {}", "trailing_data", "one record a line"),
    "NaN": (b'{"outcome_reward": NaN}', "json_number", "null"),
    "infinity": (b'{"outcome_reward": -Infinity}', "json_number", "null"),
    "1e999": (b'{"outcome_reward": 1e999}', "json_number", "null"),
    "not UTF-8": (b'{"goal": "\xff"}', "invalid_utf8", "byte 10"),
    "raw null byte": (b'{"goal": "\x00"}', "null_bytes", "zero bytes"),
    "lone surrogate": (b'{"goal": "\\ud800"}', "lone_surrogate", "surrogate"),
    "deep": (b"[" * 5000, "too_deep", "64"),
    "fairly deep": (b'{"extra": ' + b'{"a":' * 70 + b"1" + b"}" * 71, "too_deep", "64"),
    "duplicate key": (b'{"success": true, "success" : false}', "duplicate_key", "'success'"),
    "duplicate key below": (
        b'{"steps": [{"reward": 1, "a": "\\":", "reward": 1}]}',
        "duplicate_key",
        "'reward'",
    ),
    "a list": ([lab()], "not_an_object", "object"),
    "a number": (b"7", "not_an_object", "object"),
    "no steps key": ({"success": True}, "missing_key", "steps"),
    "steps no list": (lab(steps={"0": STEP}), "wrong_type", "steps must be a list"),
    "steps empty": (lab(steps=[]), "no_steps", "at least one"),
    "only a final observation": (
        lab({"observation": "o", "is_final_observation": True}),
        "no_steps",
        "steps",
    ),
    "step no object": (lab(STEP, "click"), "wrong_type", r"steps[1] must be an object"),
    "no observation": (lab({"action": "a"}), "missing_observation", "steps[0]"),
    "no action": (lab(STEP, {"observation": "o"}), "missing_action", "steps[1]"),
    "reward text": (lab(STEP, STEP | {"reward": "0.5"}), "wrong_type", "steps[1].reward is a string ('0.5')"),
    "reward bool": (lab(STEP | {"reward": True}), "wrong_type", "steps[0].reward"),
    "reward list": (lab(STEP | {"reward": [1]}), "wrong_type", "steps[0].reward is a list"),
    "success text": (
        lab(success="yes"),
        "wrong_type",
        "success is a string ('yes'); it must be true or false",
    ),
    "success number": (lab(success=1), "wrong_type", "success"),
    "seed float": (lab(seed=1.5), "wrong_type", "seed"),
    "seed 2^63": (lab(seed=2**63), "out_of_range", "seed"),
    "seed 2^99": (lab(seed=2**99), "out_of_range", "seed"),
    "goal number": (lab(goal=3), "wrong_type", "goal is a number (3)"),
    "bad time": (lab(started_at="yesterday"), "bad_time", "started_at"),
    "bad end_reason": (lab(end_reason="bored"), "bad_value", "step_limit"),
    "bad policy_kind": (lab(policy_kind="robot"), "bad_value", "scripted"),
    "bad label": (lab(labels=[{"kind": "oracle"}]), "bad_value", "labels[0].kind"),
    "label without kind": (lab(labels=[{"value": 1}]), "missing_key", "labels[0].kind"),
    "candidate number": (lab(STEP | {"candidates": [4]}), "wrong_type", "steps[0].candidates[0]"),
    "candidate without action": (
        lab(STEP | {"candidates": [{"score": 1}]}),
        "missing_key",
        "candidates[0].action",
    ),
    "candidate key": (lab(STEP | {"candidates": [{"action": "a", "q": 1}]}), "unknown_key", "'q'"),
    "two executed": (
        lab(STEP | {"candidates": [{"action": "a", "executed": True}] * 2}),
        "two_executed",
        "executed",
    ),
    "logprob above 0": (lab(STEP | {"behavior_logprob": 0.3}), "logprob_above_zero", "at most 0"),
    "token lengths": (
        lab(STEP | {"response_token_ids": [1, 2], "response_logprobs": [-1]}),
        "length_mismatch",
        "2 response_token_ids and 1",
    ),
    "negative token": (lab(STEP | {"prompt_token_ids": [1, -2]}), "negative_token_id", "prompt_token_ids"),
    "messages no list": (
        lab({"messages": {"role": "user"}, "action": "a"}),
        "wrong_type",
        "steps[0].messages",
    ),
    "message without role": (lab({"messages": [{}], "action": "a"}), "wrong_type", "steps[0].messages[0]"),
    "step index": (lab(STEP | {"step": 0}, STEP | {"step": 0}), "duplicate_step", "steps[1].step is 0, not 1"),
    "steps after done": (lab(STEP | {"terminated": True}, STEP), "steps_after_end", "steps[0]"),
    "ends disagree": (lab(STEP | {"terminated": False}, terminated=True), "end_conflict", "terminated"),
    "final first": (
        lab(STEP | {"is_final_observation": True}, STEP),
        "final_observation_not_last",
        "steps[0]",
    ),
    "final acts": (lab(STEP, STEP | {"is_final_observation": True}), "final_observation_acts", "action"),
    "two finals": (
        lab(STEP, {"observation": "o", "is_final_observation": True}, final_observation="o"),
        "two_final_observations",
        "keep one",
    ),
    "sum overflows": ({"steps": [STEP | {"reward": 1e308}] * 2}, "json_number", "sum"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(tmp_path, name):
    line, reason, message = MALFORMED[name]
    record = one(tmp_path, line)
    assert isinstance(record, Rejected), record
    assert record.reason == reason
    assert message in record.message
    assert len(record.excerpt or "") <= 200
    assert (record.offset, len(record.sha256 or "")) == (0, 64)


def test_colons_in_text_are_no_duplicate_keys(tmp_path):
    text = '":":\\":\\\\": "a" : {"b": 1, "b": 2}'
    assert episode(tmp_path, success=True, goal=text).goal == text


KEYS = st.sampled_from([*Episode.__dataclass_fields__, "final_observation", "max_steps", "n_steps", "episode_id"])
STEP_KEYS = st.sampled_from([*Step.__dataclass_fields__, "odd"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3))
STEPS = st.dictionaries(STEP_KEYS, VALUES, max_size=4).map(lambda keys: {"observation": "o", "action": "a"} | keys)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    VALUES
    | st.dictionaries(KEYS, VALUES, max_size=4).flatmap(
        lambda keys: st.lists(STEPS, max_size=3).map(lambda steps: keys | {"steps": steps})
    )
)
def test_any_json_is_an_episode_or_rejected(tmp_path, value):
    record = one(tmp_path, value)
    assert isinstance(record, Episode | Rejected)
    if isinstance(record, Episode):
        assert all(step.reward is None or math.isfinite(step.reward) for step in record.steps)
        assert [step.step for step in record.steps] == list(range(len(record.steps)))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 200))
def test_any_bytes_are_episodes_or_rejected(tmp_path, noise, at):
    line = json.dumps(lab(STEP | {"reward": 1.5, "candidates": ["a"]}, final_observation="é")).encode()
    path = write(tmp_path, line[:at] + noise + line[at:])
    assert all(isinstance(record, Episode | Rejected) for record in read("jsonl", path))
