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
    return {
        "exact": True,
        "source": "made",
        "native_id": "1",
        "steps": [{"source_offset": 7} | s for s in steps],
    } | keys


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
    "export with another key": (exact({"step": 0, "colour": "red"} | STEP), "unknown_key"),
    "export without its source": ({"exact": True, "steps": [{"step": 0} | STEP]}, "missing_key"),
    # what only the store sees
    "temperature in words": (episode(sampling={"temperature": "hot"}), "bad_type"),
    "temperature true": (episode(sampling={"temperature": True}), "bad_type"),
    "sampling seed of 2^63": (episode(sampling={"seed": 2**63}), "int_range"),
}
"""(the line, its reason); the line stands between two good ones."""

EXPORTS: dict[str, tuple[JSON, str]] = {
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
}
"""Lines of an export, which name the file and place that the episode once came from: a refusal names these."""

ACCEPTED: dict[str, tuple[bytes | Any, JSON]] = {
    "unknown keys": (episode(goal="c", colour="red"), {"quality_flags": ["unknown_keys"], "extra": '{"colour":"red"}'}),
    "n_steps differs": (episode(goal="n", n_steps=7), {"n_steps": 1, "quality_flags": ["n_steps_differs"]}),
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
    "null where nothing was logged": (episode(goal=None, seed=None, trial=1), {"goal": None, "seed": None}),
    "escaped null": (episode(goal="a\x00b"), {"goal": "a\x00b"}),
    "a whole surrogate pair": (
        rb'{"goal":"\ud83d\ude00","success":true,"steps":[{"observation":"o","action":"a"}]}',
        {"goal": "\U0001f600"},
    ),
    "a byte order mark within the file": (b"\xef\xbb\xbf" + json.dumps(episode(goal="bom")).encode(), {"goal": "bom"}),
    "64 levels": (episode(extra=json.loads('{"a":' * 62 + "1" + "}" * 62)), {"success": True}),
    "a text that looks like duplicate keys": (episode(goal='{"a": 1, "a": 2}'), {"goal": '{"a": 1, "a": 2}'}),
    "seed of 2^63-1": (episode(seed=2**63 - 1), {"seed": 2**63 - 1}),
    "mixed types in extra": (episode(goal="x", extra={"a": [1, "1", None, {"b": True}]}), {"success": True}),
    "blanks around the record": (b"  " + json.dumps(episode(goal="blank")).encode() + b" \t", {"goal": "blank"}),
}
"""(the line, columns of its row): odd, but nothing is lost or guessed, so it is stored."""


REFUSED = {**LINES, **EXPORTS}


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
        quarantine = db.sql("SELECT * FROM quarantine ORDER BY uri, source_offset").to_arrow_table().to_pylist()
        episodes = db.sql("SELECT * FROM episodes").to_arrow_table().to_pylist()
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
    for name, (line, _) in {**REFUSED, **ACCEPTED}.items():
        if name in EXPORTS:
            line = line | {"uri": f"s3://then/{name}", "sha256": "ab" * 32}
        parts = (good(name, "before"), to_bytes(line) + b"\n", good(name, "after"))
        (folder / "logs" / f"{slug(name)}.jsonl").write_bytes(b"".join(parts))
    return ingest(folder / "store", logs.read("jsonl", folder / "logs"))


@pytest.mark.parametrize("name", LINES)
def test_a_line(lines, name):
    line, reason = to_bytes(LINES[name][0]), LINES[name][1]
    uri = str(lines.folder / "logs" / f"{slug(name)}.jsonl")
    (row,) = lines.quarantine[uri]
    assert row["reason"] == reason
    assert row["message"]
    assert (row["source_offset"], row["sha256"]) == (len(good(name, "before")), hashlib.sha256(line).hexdigest())
    assert len(row["excerpt"]) <= 200
    assert {e["task_id"] for e in lines.episodes[uri]} == {"before", "after"}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_line_of_an_export(lines, name):
    (row,) = lines.quarantine[f"s3://then/{name}"]
    at = 7 if EXPORTS[name][0]["steps"] else 0
    assert (row["reason"], row["source_offset"], row["sha256"]) == (EXPORTS[name][1], at, "ab" * 32)
    uri = str(lines.folder / "logs" / f"{slug(name)}.jsonl")
    assert {e["task_id"] for e in lines.episodes[uri]} == {"before", "after"}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_line_that_is_stored(lines, name):
    uri = str(lines.folder / "logs" / f"{slug(name)}.jsonl")
    (row,) = [row for row in lines.episodes[uri] if row["task_id"] is None]
    assert {key: row[key] for key in ACCEPTED[name][1]} == ACCEPTED[name][1]
    assert len(lines.episodes[uri]) == 3
    assert uri not in lines.quarantine


def test_the_counts_of_all_lines(lines):
    assert lines.counts["read"] == 3 * (len(REFUSED) + len(ACCEPTED))
    assert lines.counts["accepted"] == 2 * len(REFUSED) + 3 * len(ACCEPTED)
    assert lines.counts["quarantined"] == len(REFUSED)
    assert lines.counts["by_reason"] == Counter(reason for _, reason in REFUSED.values())


# --- whole files --------------------------------------------------------------------------------------------

A, B = good("file", "before"), good("file", "after")
MANY = b"".join(good("file", str(i)) for i in range(2000))


def zst(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


FILES: dict[str, tuple[str, bytes, list[tuple[int, str]], int | None]] = {
    "empty file": ("a.jsonl", b"", [(0, "empty_file")], 0),
    "white space only": ("a.jsonl", b" \n\t\r\n\n", [(0, "empty_file")], 0),
    "byte order mark only": ("a.jsonl", b"\xef\xbb\xbf", [(0, "empty_file")], 0),
    "no newline at the end": ("a.jsonl", A + B[:-1], [], 2),
    "cut in the last line": ("a.jsonl", A + B[:-9], [(len(A), "json_truncated")], 1),
    "Windows line ends": ("a.jsonl", A.replace(b"\n", b"\r\n") + b"{\r\n" + B, [(len(A) + 1, "json_truncated")], 2),
    "old Macintosh line ends": ("a.jsonl", A.replace(b"\n", b"\r") + B, [(0, "trailing_data")], 0),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + A + B, [], 2),
    "UTF-16 file": (
        "a.jsonl",
        (A + B).decode().encode("utf-16"),
        [(0, "utf16"), (2 * len(A) + 1, "utf16"), (2 * len(A + B) + 1, "null_bytes")],
        0,
    ),
    "one array over many lines": (
        "a.jsonl",
        b"[\n" + A[:-1] + b",\n" + B + b"]\n",
        [(0, "json_truncated"), (2, "trailing_data"), (2 + len(A + B) + 1, "json_syntax")],
        1,
    ),
    "gz empty": ("a.jsonl.gz", gzip.compress(b""), [(0, "empty_file")], 0),
    "gz of no bytes": ("a.jsonl.gz", b"", [(0, "empty_file")], 0),
    "gz garbled from the start": ("a.jsonl.gz", b"not gzip at all", [(0, "damaged_file")], 0),
    "gz that is plain text": ("a.jsonl.gz", A + B, [(0, "damaged_file")], 0),
    "gz cut": ("a.jsonl.gz", gzip.compress(MANY)[:-2000], [(-1, "damaged_file")], None),
    "gz without its checksum": ("a.jsonl.gz", gzip.compress(A + B)[:-8], [(len(A + B), "damaged_file")], 2),
    "gz with a wrong checksum": ("a.jsonl.gz", gzip.compress(A + B)[:-8] + bytes(8), [(len(A + B), "damaged_file")], 2),
    "gz with garbage behind": ("a.jsonl.gz", gzip.compress(A + B) + b"garbage", [(len(A + B), "damaged_file")], 2),
    "gz with zeros behind": ("a.jsonl.gz", gzip.compress(A + B) + bytes(512), [], 2),
    "gz of two members": ("a.jsonl.gz", gzip.compress(A) + gzip.compress(B), [], 2),
    "gz members that split a line": ("a.jsonl.gz", gzip.compress(A + B[:9]) + gzip.compress(B[9:]), [], 2),
    "gz whose second member is cut": (
        "a.jsonl.gz",
        gzip.compress(A) + gzip.compress(B)[:-12],
        [(len(A), "damaged_file")],
        1,
    ),
    "zst garbled from the start": ("a.jsonl.zst", b"no zstd at all", [(0, "damaged_file")], 0),
    "zst cut": ("a.jsonl.zst", zst(MANY)[:-300], [(-1, "damaged_file")], None),
    "zst of two frames": ("a.jsonl.zst", zst(A) + zst(B), [], 2),
    "zst garbled inside": ("a.jsonl.zst", zst(A) + b"garbage" + zst(B), [(len(A), "damaged_file")], 1),
}
"""(name, bytes, (offset, reason) of what is refused, episodes stored); -1 and None: wherever it broke."""


@pytest.mark.parametrize("name", FILES)
def test_a_file(tmp_path, name):
    file, data, refused, stored = FILES[name]
    path = tmp_path / "logs" / file
    path.parent.mkdir()
    path.write_bytes(data)
    got = ingest(tmp_path / "store", logs.read("jsonl", path))
    rows = got.quarantine.get(str(path), [])
    assert [row["reason"] for row in rows] == [reason for _, reason in refused]
    assert all(row["source_offset"] == at for row, (at, _) in zip(rows, refused, strict=True) if at >= 0)
    assert stored is None or got.counts["accepted"] == stored
    assert got.counts["read"] == got.counts["accepted"] + got.counts["quarantined"]
    if stored is None:
        assert 0 < got.counts["accepted"] < 2000


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("gone.jsonl"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_suffix("")), path.symlink_to(path.stem)),
    "a socket": lambda path: _socket(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def _socket(path: Path) -> None:
    import socket

    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is at most 107 bytes long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize("source", [*logs.sources(), "auto"])
@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, name, source):
    folder = tmp_path / "logs"
    folder.mkdir()
    for suffix in (".jsonl", ".json", ".zip", ".parquet", ".txt", ".traj", ".log", ".html", ".pt"):
        NO_FILES[name](folder / f"x{len(list(folder.iterdir()))}{suffix}")
    (folder / "good.jsonl").write_bytes(A)
    try:
        records = list(logs.read(source, folder))
    except UserError:  # the format finds nothing of its own
        return
    reasons = {r.reason for r in records if isinstance(r, Rejected) and r.uri != str(folder / "good.jsonl")}
    assert reasons <= {"unreadable_file", "damaged_file", "pickle_refused"}
    if source in ("jsonl", "auto"):
        assert [r.goal for r in records if isinstance(r, Episode)] == ["good file"]
        assert any(isinstance(r, Rejected) for r in records)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(A)
    (tmp_path / "b.jsonl").write_bytes(B)
    opened = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "a.jsonl":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    refused, read = logs.read("jsonl", tmp_path)
    assert isinstance(refused, Rejected)
    assert (refused.reason, refused.uri) == ("unreadable_file", str(tmp_path / "a.jsonl"))
    assert "Permission denied" in refused.message
    assert isinstance(read, Episode)


def test_a_folder_named_as_a_file(tmp_path):
    (tmp_path / "logs" / "x.jsonl").mkdir(parents=True)
    (tmp_path / "logs" / "x.jsonl" / "in.jsonl").write_bytes(A)
    (tmp_path / "logs" / "y.jsonl").mkdir()
    (tmp_path / "logs" / "z.jsonl").write_bytes(B)
    got = ingest(tmp_path / "store", logs.read("jsonl", tmp_path / "logs"))
    assert (got.counts["accepted"], got.counts["quarantined"]) == (2, 0)


def test_folders_that_hold_each_other(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "log.jsonl").write_bytes(A)
    assert len(list(logs.read("jsonl", tmp_path))) == 1
    assert len(list(logs.read("auto", tmp_path))) == 1


# --- Parquet, and what only a store can refuse --------------------------------------------------------------

TALK = [{"role": "user", "content": "Buy"}, {"role": "assistant", "content": "ok"}]


def parquet(path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist([{"id": str(i), "messages": TALK, "reward": 1.0} for i in range(50)]), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("cut", lambda data: data[:-100]),
        ("of no bytes", lambda data: b""),
        ("without its end", lambda data: data[:-4]),
        ("a footer length beyond the file", lambda data: data[:-8] + b"\xff\xff\xff\x7f" + data[-4:]),
        ("garbled pages", lambda data: data[:4] + bytes(200) + data[204:]),
        ("a garbled footer", lambda data: data[:-300] + bytes(100) + data[-200:]),
        ("another format", lambda data: b"PK\x03\x04" + data),
    ],
)
def test_a_torn_parquet_file(tmp_path, name, mend):
    path = tmp_path / "logs" / "a.parquet"
    path.parent.mkdir()
    path.write_bytes(mend(parquet(path)))
    got = ingest(tmp_path / "store", logs.read("chat", path))
    assert set(got.counts["by_reason"]) <= {"damaged_file", "empty_file"}
    assert got.counts["quarantined"] >= 1 or name == "another format"


def test_the_same_record_twice_is_one_and_an_id_with_other_content_is_refused(tmp_path):
    lines_ = [episode(episode_id="1", goal="a"), episode(episode_id="1", goal="a"), episode(episode_id="1", goal="b")]
    path = tmp_path / "logs" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"".join(to_bytes(line) + b"\n" for line in lines_))
    got = ingest(tmp_path / "store", logs.read("jsonl", path))
    assert (got.counts["accepted"], got.counts["duplicates"], got.counts["quarantined"]) == (1, 1, 1)
    (row,) = got.quarantine[str(path)]
    assert (row["reason"], row["sha256"]) == ("id_conflict", hashlib.sha256(to_bytes(lines_[2])).hexdigest())


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"reward": float("nan")}, "non_finite"),
        ({"progress": float("inf")}, "non_finite"),
        ({"observation": "\ud800"}, "lone_surrogate"),
        ({"observation": b"bytes"}, "bad_type"),
        ({"reward": 10**400}, "int_range"),
        ({"source_offset": 2**70}, "int_range"),
        ({"action_args": {"a": object()}}, "bad_type"),
        ({"step": "0"}, "step_order"),
    ],
)
def test_an_episode_that_no_adapter_should_make(tmp_path, step, reason):
    bad = Episode(source="x", native_id="1", uri="u", sha256="ab", steps=(Step(**{"step": 0} | STEP | step),))
    fine = Episode(source="x", native_id="2", uri="u", steps=(Step(step=0, observation="o", action="a"),))
    got = ingest(tmp_path / "store", iter((bad, fine)))
    assert (got.counts["by_reason"], got.counts["accepted"]) == ({reason: 1}, 1)
    (row,) = got.quarantine["u"]
    assert (row["reason"], row["sha256"]) == (reason, "ab")


def test_excerpts_hold_no_secret_and_only_what_can_be_printed(tmp_path):
    key = "sk-" + "Ab1" * 16
    path = tmp_path / "logs" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"goal": "Authorization: Bearer ' + key.encode() + b'", \x1b[31m\xff\n')
    got = ingest(tmp_path / "store", logs.read("jsonl", path))
    (row,) = got.quarantine[str(path)]
    assert key not in str(row)
    assert row["excerpt"].startswith('{"goal": "Authorization')
    assert row["excerpt"].isprintable()


# --- what must stay small -----------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
from pathlib import Path
from offline_lm import logs
from offline_lm.store import Store
from offline_lm.store.ingest import add

counts = add(Store.create(Path(sys.argv[1])), logs.read(sys.argv[2], Path(sys.argv[3])))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)
print(counts["accepted"], *counts["by_reason"], round(peak))
"""


def _one_long_line() -> bytes:
    return to_bytes(episode({"observation": "y" * (65 << 20), "action": "a"})) + b"\n" + A


def _a_long_page() -> bytes:
    page = "".join(f"[{i}] link 'Item {i}' price ${i}.99\n" for i in range(200_000))
    return to_bytes(episode({"observation": (page * 10)[: 50 << 20], "action": "a"}, goal="long")) + b"\n" + A


def _wide_parquet() -> bytes:
    """A few kilobytes that stand for a row of a gigabyte: a million references to one text."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), [TALK[0]["content"] * 400])
    row = pa.ListArray.from_arrays([0, 1_000_000], column)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"messages": row}), sink)
    return sink.getvalue().to_pybytes()


BIG: dict[str, tuple[str, str, Callable[[], bytes], str]] = {
    "a line of 65 MB": ("jsonl", "a.jsonl", _one_long_line, "1 too_large"),
    "a page of 50 MB": ("jsonl", "a.jsonl", _a_long_page, "2"),
    "a gz of 1 GB of zeros": ("jsonl", "a.jsonl.gz", lambda: gzip.compress(bytes(16 << 20)) * 64, "0 too_large"),
    "a zst of 1 GB of zeros": ("jsonl", "a.jsonl.zst", lambda: zst(bytes(16 << 20)) * 64, "0 too_large"),
    "a gz of 640 MB that is one value": (
        "chat",
        "a.json.gz",
        lambda: gzip.compress(bytes(16 << 20)) * 40,
        "0 too_large",
    ),
    "a gz of 256 MB of brackets": ("adp", "a.json.gz", lambda: gzip.compress(b"[" * (16 << 20)) * 16, "0 too_large"),
    "a Parquet row of 1 GB": ("chat", "a.parquet", _wide_parquet, "0 too_large"),
}


@pytest.mark.parametrize("name", BIG)
def test_memory_stays_bounded(tmp_path, name):
    source, file, data, told = BIG[name]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / file).write_bytes(data())
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "store"), source, str(tmp_path / "logs")]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    counts, peak = made.stdout.strip().rsplit(" ", 1)
    assert counts == told
    assert int(peak) < 1500


# --- the catalogue ------------------------------------------------------------------------------------------


def _is_reason(assigned: ast.Assign) -> bool:
    return [getattr(target, "id", None) for target in assigned.targets] == ["reason"]


def _codes(file: Path) -> Iterator[str]:
    """Every reason code that a module raises or returns."""

    def texts(node: ast.expr | None) -> Iterator[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.IfExp):
            yield from (*texts(node.body), *texts(node.orelse))

    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):  # the kinds of Damaged
            yield from (t for a in node.body if isinstance(a, ast.Assign) and _is_reason(a) for t in texts(a.value))
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            given = {k.arg: k.value for k in node.keywords}
            if name in ("Bad", "Invalid"):
                yield from texts(given.get("reason", node.args[0] if node.args else None))
            elif name == "Rejected":
                yield from texts(given.get("reason"))
            elif name == "_refused" and len(node.args) == 3:
                yield from texts(node.args[1])


def test_every_code_is_in_the_catalogue_and_no_other():
    package = Path(offline_lm.__file__).parent
    files = [*(package / "logs").glob("*.py"), package / "store" / "rows.py", package / "store" / "ingest.py"]
    raised = {code for file in files for code in _codes(file)}
    assert raised == set(REASONS)
    assert all(code == code.lower() and code.replace("_", "").isalnum() for code in REASONS)
    assert all(told[-1] in ".?" and "\n" not in told and 20 < len(told) <= 120 for told in REASONS.values())


def test_there_are_enough_classes():
    assert len(REFUSED) + len(FILES) + len(NO_FILES) + len(BIG) >= 60
