"""Every class of malformed input, from bytes to the table ``quarantine``: its reason, place, hash and excerpt, and that
the good records around it are stored.

All line classes lie in one folder, a file each, and are ingested at once. The classes of whole files (compression,
encodings, things that are no file) follow, then what only a store can refuse, then what must stay small in memory.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import offline_lm
from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs import jsonl
from offline_lm.logs._reasons import REASONS
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Episode, Rejected, Step

JSON = dict[str, Any]
STEP: JSON = {"observation": "page", "action": "click[1]"}
FINAL: JSON = {"observation": "end", "is_final_observation": True}


def episode(*steps: Any, **keys: Any) -> JSON:
    return {"success": True, "steps": list(steps) or [STEP]} | keys


def with_step(**keys: Any) -> JSON:
    """An episode whose second step has these keys too."""
    return episode(STEP, STEP | keys)


def numbered(*indices: Any) -> JSON:
    return episode(*({} if i is None else {"step": i} | STEP for i in indices))


def exact(*steps: JSON, **keys: Any) -> JSON:
    """As an export of a store writes it: taken as it stands, so that only the store's own checks look at it."""
    return {"exact": True, "source": "made", "native_id": "1", "steps": list(steps)} | keys


def nested(depth: int) -> bytes:
    """`depth` levels, the record's own included."""
    inner = b'{"a":' * (depth - 1) + b"1" + b"}" * (depth - 1)
    return b'{"steps":[],"extra":' + inner + b"}"


def text(value: str, encoding: str) -> bytes:
    return value.encode(encoding)


GOOD_TEXT = json.dumps(episode(goal="caf\u00e9"), ensure_ascii=False)

LINES: dict[str, tuple[bytes | Any, str]] = {
    # the text
    "UTF-16 little endian with mark": (b"\xff\xfe" + text(GOOD_TEXT, "utf-16-le"), "utf16"),
    "UTF-16 big endian with mark": (b"\xfe\xff" + text(GOOD_TEXT, "utf-16-be"), "utf16"),
    "UTF-16 little endian": (text(GOOD_TEXT, "utf-16-le"), "utf16"),
    "UTF-16 big endian": (text(GOOD_TEXT, "utf-16-be"), "utf16"),
    "UTF-32 with mark": (text(GOOD_TEXT, "utf-32"), "utf16"),
    "UTF-32 big endian": (text(GOOD_TEXT, "utf-32-be"), "utf16"),
    "latin-1": (text(GOOD_TEXT, "latin-1"), "invalid_utf8"),
    "UTF-8 overlong slash": (b'{"goal": "\xc0\xaf"}', "invalid_utf8"),
    "UTF-8 overlong null": (b'{"goal": "\xc0\x80"}', "invalid_utf8"),
    "UTF-8 sequence cut by the quote": (b'{"goal": "\xe2\x82"}', "invalid_utf8"),
    "UTF-8 continuation alone": (b'{"goal": "\x80"}', "invalid_utf8"),
    "UTF-8 surrogate in bytes": (b'{"goal": "\xed\xa0\x80"}', "invalid_utf8"),
    "UTF-8 above the last character": (b'{"goal": "\xf5\x80\x80\x80"}', "invalid_utf8"),
    "byte 0xff": (b'{"goal": "\xff"}', "invalid_utf8"),
    "raw null in a string": (b'{"goal": "a\x00b"}', "null_bytes"),
    "nulls alone": (bytes(4096), "null_bytes"),
    "nulls after a torn record": (b'{"goal": "a"' + bytes(100), "null_bytes"),
    "nulls after a whole record": (b'{"goal": "a"}' + bytes(100), "null_bytes"),
    "raw tab in a string": (b'{"goal": "a\tb"}', "control_character"),
    "carriage return in a string": (b'{"goal": "a\rb"}', "control_character"),
    "high surrogate alone": (rb'{"goal": "\ud800"}', "lone_surrogate"),
    "low surrogate alone": (rb'{"goal": "\udc00"}', "lone_surrogate"),
    "surrogates in the wrong order": (rb'{"goal": "\ude00\ud83d"}', "lone_surrogate"),
    "lone surrogate in a key": (rb'{"\ud800": 1}', "lone_surrogate"),
    "escape of one byte": (rb'{"goal": "\x41"}', "bad_escape"),
    "escape cut short": (rb'{"goal": "\u00"}', "bad_escape"),
    "Windows path": (rb'{"goal": "C:\logs"}', "bad_escape"),
    # JSON
    "cut in an array": (b'{"steps": [', "json_truncated"),
    "cut in a string": (b'{"goal": "Buy a m', "json_truncated"),
    "cut after a colon": (b'{"goal":', "json_truncated"),
    "cut in an escape": (b'{"goal": "\\', "json_truncated"),
    "one bracket": (b"{", "json_truncated"),
    "bare words": (b"Traceback (most recent call last):", "json_syntax"),
    "trailing comma": (b'{"goal": "a",}', "json_syntax"),
    "comment": (b'// episodes of today {"goal": "a"}', "json_syntax"),
    "leading zero": (b'{"seed": 01}', "json_syntax"),
    "no colon": (b'{"goal" "a"}', "json_syntax"),
    "key without quotes": (b'{goal: "a"}', "json_syntax"),
    "two records run together": (b'{"goal": "a"}{"goal": "b"}', "trailing_data"),
    "array of records on a line, and more": (b"[{}] [{}]", "trailing_data"),
    "Python's single quotes": (b"{'goal': 'a'}", "python_literal"),
    "Python's True": (b'{"success": True}', "python_literal"),
    "Python's None": (b'{"goal": None}', "python_literal"),
    "numpy's nan": (b'{"outcome_reward": nan}', "python_literal"),
    "NaN": (b'{"outcome_reward": NaN}', "json_number"),
    "Infinity": (b'{"outcome_reward": Infinity}', "json_number"),
    "-Infinity": (b'{"outcome_reward": -Infinity}', "json_number"),
    "1e999": (b'{"outcome_reward": 1e999}', "json_number"),
    "-1e999": (b'{"outcome_reward": -1e999}', "json_number"),
    "integer of 5000 digits": (b'{"outcome_reward": ' + b"9" * 5000 + b"}", "json_number"),
    "integer of 5000 digits as seed": (b'{"seed": ' + b"9" * 5000 + b"}", "json_number"),
    "duplicate key": (b'{"success": true, "success" : false}', "duplicate_key"),
    "duplicate key below": (b'{"steps": [{"reward": 1, "reward": 0}]}', "duplicate_key"),
    "duplicate key in an unknown one": (b'{"steps": [], "mine": {"a": [{"b": 1, "b": 2}]}}', "duplicate_key"),
    "duplicate key by an escape": (rb'{"goal": "a", "\u0067oal": "b"}', "duplicate_key"),
    "duplicate key beside an integer of 4500 digits": (b'{"a": 1, "a": ' + b"1" * 300 + b"}", "duplicate_key"),
    "65 levels": (nested(65), "too_deep"),
    "1025 levels": (nested(1025), "too_deep"),
    "100000 levels": (nested(100_000), "too_deep"),
    "100000 brackets": (b"[" * 100_000, "too_deep"),
    "100000 brackets in text of messages": (with_step(messages="[" * 100_000), "too_deep"),
    # the record
    "a list": (b"[]", "not_an_object"),
    "a number": (b"7", "not_an_object"),
    "a string": (b'"episode"', "not_an_object"),
    "null": (b"null", "not_an_object"),
    "true": (b"true", "not_an_object"),
    "an empty object": (b"{}", "missing_key"),
    "no steps key": ({"success": True}, "missing_key"),
    "steps null": ({"steps": None}, "missing_key"),
    "steps an object": ({"steps": {"0": STEP}}, "wrong_type"),
    "steps a string": ({"steps": json.dumps([STEP])}, "wrong_type"),
    "zero steps": ({"steps": []}, "no_steps"),
    "only a final observation": (episode(FINAL), "no_steps"),
    "a step null": (episode(STEP, None), "wrong_type"),
    "a step a string": (episode(STEP, "click[1]"), "wrong_type"),
    "a step without observation": (episode(STEP, {"action": "a"}), "missing_observation"),
    "a step without action": (episode(STEP, {"observation": "o"}), "missing_action"),
    "observation null": (episode({"observation": None, "action": "a"}), "missing_observation"),
    # step numbers
    "step number missing": (numbered(0, 1, 3), "missing_steps"),
    "step number twice": (numbered(0, 1, 1), "duplicate_step"),
    "step numbers go back": (numbered(0, 1, 2, 0), "step_order"),
    "step numbers backwards": (numbered(2, 1, 0), "step_order"),
    "step number negative": (numbered(-1, 0), "negative_step"),
    "step number a float": (numbered(0, 1.0), "wrong_type"),
    "step number a string": (numbered("0", "1"), "wrong_type"),
    "step number true": (numbered(False, True), "wrong_type"),
    "step number over 64 bits": (b'{"steps": [{"step": 99999999999999999999}]}', "out_of_range"),
    # rewards
    "reward a string": (with_step(reward="0.5"), "wrong_type"),
    "reward true": (with_step(reward=True), "wrong_type"),
    "reward a list": (with_step(reward=[1]), "wrong_type"),
    "reward an object": (with_step(reward={"value": 1}), "wrong_type"),
    "rewards of mixed types": (episode(STEP | {"reward": 0}, STEP | {"reward": "0"}), "wrong_type"),
    "rewards that sum to infinity": ({"steps": [STEP | {"reward": 1e308}] * 2}, "json_number"),
    "reward source unknown": (with_step(reward_source="guess"), "bad_value"),
    "reward after done": (episode(STEP | {"terminated": True}, STEP | {"reward": 1}), "steps_after_end"),
    "final observation with a reward": (episode(STEP, FINAL | {"reward": 1}), "final_observation_acts"),
    # ends
    "terminated before the end": (episode(STEP | {"terminated": True}, STEP), "steps_after_end"),
    "truncated before the end": (episode(STEP | {"truncated": True}, STEP, STEP), "steps_after_end"),
    "ends that differ": (episode(STEP | {"terminated": False}, terminated=True), "end_conflict"),
    "truncations that differ": (episode(STEP | {"truncated": True}, truncated=False), "end_conflict"),
    "terminated a number": (episode(terminated=1), "wrong_type"),
    "two final observations": (episode(STEP, FINAL, final_observation="end"), "two_final_observations"),
    "final observation in the middle": (episode(STEP, FINAL, STEP), "final_observation_not_last"),
    "final observation acts": (episode(STEP, STEP | FINAL), "final_observation_acts"),
    "final observation a number": (episode(final_observation=3), "wrong_type"),
    "final observation empty": (episode(final_observation={}), "missing_observation"),
    # types and values
    "goal a number": (episode(goal=3), "wrong_type"),
    "goal a list": (episode(goal=["Buy"]), "wrong_type"),
    "success a string": (episode(success="yes"), "wrong_type"),
    "success a number": (episode(success=1), "wrong_type"),
    "seed a float": (episode(seed=1.5), "wrong_type"),
    "seed of 2^63": (episode(seed=2**63), "out_of_range"),
    "seed of -2^63-1": (episode(seed=-(2**63) - 1), "out_of_range"),
    "seed of 2^99": (episode(seed=2**99), "out_of_range"),
    "n_steps negative": (episode(n_steps=-1), "wrong_type"),
    "episode_id a number": (episode(episode_id=7), "wrong_type"),
    "extra a list": (episode(extra=[1]), "wrong_type"),
    "time in words": (episode(started_at="yesterday"), "bad_time"),
    "time of a 13th month": (episode(started_at="2026-13-01T00:00:00Z"), "bad_time"),
    "time before the calendar": (with_step(ts_start="0001-01-01T00:00:00+23:59"), "bad_time"),
    "time a number": (episode(started_at=1763717400), "wrong_type"),
    "end_reason unknown": (episode(end_reason="bored"), "bad_value"),
    "policy_kind unknown": (episode(policy_kind="robot"), "bad_value"),
    "observation_kind unknown": (with_step(observation_kind="pixels"), "bad_value"),
    "label of an unknown kind": (episode(labels=[{"kind": "oracle"}]), "bad_value"),
    "label without a kind": (episode(labels=[{"value": 1}]), "missing_key"),
    "label with another key": (episode(labels=[{"kind": "judge", "score": 1}]), "unknown_key"),
    # candidates and tokens
    "candidates an object": (with_step(candidates={"a": 1}), "wrong_type"),
    "candidate a number": (with_step(candidates=["a", 4]), "wrong_type"),
    "candidate without action": (with_step(candidates=[{"score": 1}]), "missing_key"),
    "candidate with another key": (with_step(candidates=[{"action": "a", "q": 1}]), "unknown_key"),
    "candidate of an unknown source": (with_step(candidates=[{"action": "a", "source": "luck"}]), "bad_value"),
    "two candidates executed": (with_step(candidates=[{"action": "a", "executed": True}] * 2), "two_executed"),
    "probability of a candidate for its logarithm": (
        with_step(candidates=[{"action": "a", "logprob": 0.5}]),
        "logprob_above_zero",
    ),
    "log-probability above 0": (with_step(behavior_logprob=0.3), "logprob_above_zero"),
    "log-probability of a token above 0": (with_step(response_logprobs=[-1, 0.1]), "logprob_above_zero"),
    "tokens and log-probabilities differ in number": (
        with_step(response_token_ids=[1, 2], response_logprobs=[-1]),
        "length_mismatch",
    ),
    "token id negative": (with_step(prompt_token_ids=[1, -2]), "negative_token_id"),
    "token id a string": (with_step(prompt_token_ids=[1, "2"]), "wrong_type"),
    "token id a float": (with_step(prompt_token_ids=[1.5]), "wrong_type"),
    "messages an object": (episode({"messages": {"role": "user"}, "action": "a"}), "wrong_type"),
    "message without role": (episode({"messages": [{}], "action": "a"}), "wrong_type"),
    "messages as text that is cut": (episode({"messages": '[{"role"', "action": "a"}), "json_truncated"),
    # what only the store sees: exports, which are taken as they stand, and structs inside columns
    "export without steps": (exact(), "no_steps"),
    "export with a step without action": (exact({"step": 0, "observation": "o"}), "no_action"),
    "export with a step without observation": (exact({"step": 0, "action": "a"}), "no_observation"),
    "export with a gap": (exact({"step": 0} | STEP, {"step": 2} | STEP), "step_order"),
    "export with a negative step": (exact({"step": -1} | STEP), "step_order"),
    "export with steps after the end": (
        exact({"step": 0, "terminated": True} | STEP, {"step": 1} | STEP),
        "step_after_end",
    ),
    "export whose final observation acts": (
        exact({"step": 0} | STEP, {"step": 1, "is_final_observation": True} | STEP),
        "final_observation",
    ),
    "export with another key": (exact({"step": 0, "colour": "red"} | STEP), "unknown_key"),
    "export without its source": ({"exact": True, "steps": [{"step": 0} | STEP]}, "missing_key"),
    "temperature in words": (episode(sampling={"temperature": "hot"}), "bad_type"),
    "temperature true": (episode(sampling={"temperature": True}), "bad_type"),
    "sampling seed of 2^63": (episode(sampling={"seed": 2**63}), "int_range"),
}
"""(the line, its reason); the line stands between two good ones."""

ACCEPTED: dict[str, tuple[bytes | Any, JSON]] = {
    "unknown keys": (episode(colour="red"), {"quality_flags": ["unknown_keys"], "extra": '{"colour":"red"}'}),
    "n_steps differs": (episode(n_steps=7), {"n_steps": 1, "quality_flags": ["n_steps_differs"]}),
    "success without reward": (
        episode(STEP | {"reward": 0.0}, STEP | {"reward": 0.0}),
        {"quality_flags": ["success_without_reward"], "outcome_reward": 0.0},
    ),
    "no reward anywhere": ({"steps": [STEP]}, {"quality_flags": ["unlabelled"], "outcome_reward": None}),
    "a reward missing among others": (
        episode(*[STEP | {"reward": r} for r in (1, None, 1)]),
        {"quality_flags": ["missing_rewards"], "outcome_reward": None},
    ),
    "a limit marked as done": (
        episode(terminated=True, end_reason="step_limit"),
        {"quality_flags": ["limit_marked_terminated"]},
    ),
    "null where nothing was logged": (episode(goal=None, seed=None, labels=None), {"goal": None, "seed": None}),
    "escaped null": (episode(goal="a\x00b"), {"goal": "a\x00b"}),
    "a whole surrogate pair": (rb'{"goal":"\ud83d\ude00","success":true,"steps":[{"observation":"o","action":"a"}]}',
                               {"goal": "\U0001f600"}),  # fmt: skip
    "a byte order mark within the file": (b"\xef\xbb\xbf" + json.dumps(episode(goal="bom")).encode(), {"goal": "bom"}),
    "64 levels": (episode(extra=json.loads('{"a":' * 62 + "1" + "}" * 62)), {"success": True}),
    "a text that looks like duplicate keys": (episode(goal='{"a": 1, "a": 2}'), {"goal": '{"a": 1, "a": 2}'}),
    "seed of 2^63-1": (episode(seed=2**63 - 1), {"seed": 2**63 - 1}),
    "mixed types in extra": (episode(extra={"a": [1, "1", None, {"b": True}]}), {"success": True}),
    "blanks around the record": (b"  " + json.dumps(episode(goal="blank")).encode() + b" \t", {"goal": "blank"}),
}
"""(the line, columns of its row): odd, but nothing is lost or guessed, so it is stored."""


def to_bytes(line: bytes | Any) -> bytes:
    return line if isinstance(line, bytes) else json.dumps(line).encode()


def good(name: str, which: str) -> bytes:
    return json.dumps(episode(task_id=which, goal=f"good {name}")).encode() + b"\n"


def slug(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Ingested:
    folder: Path
    counts: JSON
    quarantine: dict[str, list[JSON]]
    """by uri"""
    episodes: dict[str, list[JSON]]


def ingest(store: Path, records: Iterator[Episode | Rejected]) -> Ingested:
    made = Store.create(store)
    counts = add(made, records)
    with made.connect() as db:
        quarantine = db.execute("SELECT * FROM quarantine ORDER BY uri, source_offset").to_arrow_table().to_pylist()
        episodes = db.execute("SELECT * FROM episodes").to_arrow_table().to_pylist()
    result = Ingested(store.parent, counts, {}, {})
    for row in quarantine:
        result.quarantine.setdefault(row["uri"], []).append(row)
    for row in episodes:
        result.episodes.setdefault(row["provenance"]["uri"], []).append(row)
    return result


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Ingested:
    folder = tmp_path_factory.mktemp("dirty")
    (folder / "logs").mkdir()
    for name, (line, _) in {**LINES, **ACCEPTED}.items():
        parts = (good(name, "before"), to_bytes(line) + b"\n", good(name, "after"))
        (folder / "logs" / f"{slug(name)}.jsonl").write_bytes(b"".join(parts))
    return ingest(folder / "store", logs.read("jsonl", folder / "logs"))


@pytest.mark.parametrize("name", LINES)
def test_a_line(lines, name):
    line, reason = to_bytes(LINES[name][0]), LINES[name][1]
    uri = str(lines.folder / "logs" / f"{slug(name)}.jsonl")
    # An export that the store refuses brings the provenance that it says it has, which here is none.
    (row,) = lines.quarantine[uri] if uri in lines.quarantine else lines.quarantine["(no file)"]
    assert row["reason"] == reason
    assert row["message"]
    assert (row["source_offset"], row["sha256"]) == (len(good(name, "before")), hashlib.sha256(line).hexdigest())
    assert len(row["excerpt"]) <= 200
    assert {e["task_id"] for e in lines.episodes[uri]} == {"before", "after"}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_line_that_is_stored(lines, name):
    uri = str(lines.folder / "logs" / f"{slug(name)}.jsonl")
    (row,) = [row for row in lines.episodes[uri] if row["task_id"] is None]
    assert {key: row[key] for key in ACCEPTED[name][1]} == ACCEPTED[name][1]
    assert len(lines.episodes[uri]) == 3
    assert uri not in lines.quarantine


def test_the_counts_of_all_lines(lines):
    assert lines.counts["read"] == 3 * (len(LINES) + len(ACCEPTED))
    assert lines.counts["accepted"] == 2 * len(LINES) + 3 * len(ACCEPTED)
    assert lines.counts["quarantined"] == len(LINES)
    assert lines.counts["by_reason"] == Counter(reason for _, reason in LINES.values())
