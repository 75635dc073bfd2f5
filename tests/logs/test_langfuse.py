"""Langfuse exports, as its field reference has them (no real sample is at hand)."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs import langfuse
from offline_lm.logs._adapters import Sample
from offline_lm.store.rows import convert
from offline_lm.types import Episode, Rejected

CALL = {"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"q": "mug"}'}}
ASKED = [{"role": "system", "content": "You shop."}, {"role": "user", "content": "Buy a mug"}]
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND = {"role": "tool", "tool_call_id": "c", "content": "3 mugs"}


def row(id_, kind, second, given=None, made=None, **more):
    """As the API gives it."""
    times = {"startTime": f"2025-01-01T00:00:{second:02}.000Z", "endTime": f"2025-01-01T00:00:{second + 1:02}.000Z"}
    return {"id": id_, "traceId": "t", "type": kind, "name": id_, "input": given, "output": made} | times | more


USAGE = {"usageDetails": {"input": 10, "output": 2, "total": 12}, "costDetails": {"total": 0.25}, "model": "gpt-x"}
RUN = [
    row("shopper", "AGENT", 1),
    row("g1", "GENERATION", 2, ASKED, CALLED, parentObservationId="shopper", **USAGE),
    row("search", "TOOL", 3, {"q": "mug"}, "3 mugs", parentObservationId="shopper"),
    row("g2", "GENERATION", 4, [*ASKED, CALLED, FOUND], {"role": "assistant", "content": "Done."}, **USAGE),
]
SCORES = [
    {
        "id": "s1",
        "traceId": "t",
        "name": "helpful",
        "value": 0.5,
        "dataType": "NUMERIC",
        "source": "EVAL",
        "comment": "ok",
    },
    {"id": "s2", "traceId": "t", "name": "env", "value": 1, "dataType": "NUMERIC", "source": "API"},
    {"id": "s3", "traceId": "t", "name": "good", "value": 1, "stringValue": "True", "source": "ANNOTATION"},
]
SCORES = [score | {"dataType": "NUMERIC"} for score in SCORES]


def snake(value):
    """As the blob export writes it: names in snake case, input and output as text, another form of times."""
    names = {"traceId": "trace_id", "startTime": "start_time", "endTime": "end_time", "model": "provided_model_name"}
    names |= {"parentObservationId": "parent_observation_id", "usageDetails": "usage_details"}
    made = {names.get(key, key): item for key, item in value.items()}
    for key in ("input", "output"):
        made[key] = None if made[key] is None else made[key] if isinstance(made[key], str) else json.dumps(made[key])
    for key in ("start_time", "end_time"):
        made[key] = made[key].replace("T", " ").replace("Z", "000")
    return made | {"cost_details": {"total": "0.25"}}


def read(tmp_path, *lines, name="observations.jsonl", **options) -> list[Any]:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return list(logs.read("langfuse", path, **options))


def check(got: Any) -> None:
    assert isinstance(got, Episode), got
    convert(got, "i")
    assert (got.native_id, got.goal, got.model, got.agent) == ("t", "Buy a mug", "gpt-x", "shopper")
    assert (got.tokens_in, got.tokens_out, got.cost_usd, got.duration_s) == (20, 4, 0.5, 3.0)
    assert (got.outcome_reward, got.success, got.terminated) == (None, None, None)
    first, second = got.steps
    assert [m["role"] for m in json.loads(first.messages or "")] == ["system", "user"]
    assert (first.action, first.action_args) == ('search(q="mug")', {"q": "mug"})
    assert [m["content"] for m in json.loads(second.messages or "")] == ["3 mugs"]
    assert second.action == "Done."
    assert first.extra is not None
    assert first.extra["tools"] == [
        {"span": "search", "name": "search", "id": None, "arguments": {"q": "mug"}, "result": "3 mugs"}
    ]


def test_lines_of_the_api(tmp_path):
    (got,) = read(tmp_path, *RUN[::-1])
    check(got)
    assert got.quality_flags == ("unlabelled",)


def test_blob_export(tmp_path):
    (got,) = read(tmp_path, *map(snake, RUN))
    check(got)


def test_array(tmp_path):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(RUN, indent=1))
    assert langfuse.detect(Sample(path)) == "Langfuse observations (AGENT)"
    (got,) = logs.read("auto", path)
    check(got)


@pytest.mark.parametrize("nested", [True, False])
def test_downloaded_trace(tmp_path, nested):
    trace = {"id": "t", "name": "shop", "timestamp": "2025-01-01T00:00:00Z"}
    whole = {"trace": trace} if nested else trace
    path = tmp_path / "trace-t.json"
    path.write_text(json.dumps(whole | {"observations": RUN, "scores": SCORES}))
    assert langfuse.detect(Sample(path)) == "a trace of Langfuse with its observations"
    (got,) = logs.read("auto", path)
    check(got)
    assert isinstance(got, Episode)
    assert [(x.kind, x.name, x.value, x.reason) for x in got.labels] == [
        ("judge", "helpful", 0.5, "ok"),
        ("env", "env", 1.0, None),
        ("human", "good", 1.0, "True"),
    ]


def test_session(tmp_path):
    lines = [item | {"sessionId": "s", "traceId": t, "id": item["id"] + t} for t in ("a", "b") for item in RUN]
    (got,) = read(tmp_path, *lines)
    assert (got.native_id, got.extra["traces"], len(got.steps)) == ("s", ["a", "b"], 4)
    assert [e.native_id for e in read(tmp_path, *lines, by="trace")] == ["a", "b"]
    with pytest.raises(UserError, match="by=day"):
        read(tmp_path, *lines, by="day")


def test_errors(tmp_path):
    failed = row("g1", "GENERATION", 2, ASKED, None, level="ERROR", statusMessage="overloaded")
    (got,) = read(tmp_path, failed)
    assert (got.steps[0].action, got.steps[0].action_valid, got.steps[0].action_error) == ("", False, "overloaded")


def test_evaluators_are_left_out(tmp_path):
    judge = row("e", "EVALUATOR", 7)
    inner = row("g9", "GENERATION", 8, ASKED, "bad", parentObservationId="e")
    (got,) = read(tmp_path, *RUN, judge, inner)
    assert len(got.steps) == 2


def test_shapes_of_input_and_output(tmp_path):
    choices = {"choices": [{"message": {"role": "assistant", "content": "ok"}}]}
    shapes = [("Go", "ok"), ({"messages": [{"role": "user", "content": "Go"}]}, choices), ('"Go"', {"content": "ok"})]
    for asked, made in shapes:
        (got,) = read(tmp_path, row("g", "GENERATION", 1, asked, made))
        assert got.steps[0].action == "ok"
        assert json.loads(got.steps[0].messages)[0]["content"].strip('"') == "Go"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([SCORES[0]], "outcome_only"),
        ([{"id": "t", "timestamp": "2025-01-01 00:00:00.000000", "name": "x"}], "no_steps"),
        ([row("a", "SPAN", 1)], "no_steps"),
        ([row("g", "GENERATION", 1)], "no_content"),
        ([row("g", "DANCE", 1)], "bad_value"),
        ([row("g", "GENERATION", 1) | {"traceId": None}], "missing_key"),
        ([row("g", "GENERATION", 1) | {"startTime": "noon"}], "bad_value"),
        ([row("g", "GENERATION", 1) | {"startTime": 5}], "bad_value"),
        ([row("g", "GENERATION", 1, [3], "x")], "wrong_type"),
        ([{"observations": [4]}], "wrong_type"),
        ([{"a": 1}], "missing_key"),
        ([3], "not_an_object"),
    ],
)
def test_rejected(tmp_path, lines, reason):
    (got,) = read(tmp_path, *lines)
    assert isinstance(got, Rejected)
    assert got.reason == reason


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3000), st.binary(max_size=5))
def test_any_bytes(tmp_path, at, noise):
    data = "\n".join(json.dumps(item) for item in [*RUN, *SCORES]).encode()
    at %= len(data)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data[:at] + noise + data[at + len(noise) :])
    langfuse.detect(Sample(path))
    for found in logs.read("langfuse", path):
        assert isinstance(found, Rejected) or convert(found, "i")
