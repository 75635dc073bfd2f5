"""Spans of OpenTelemetry as its conventions and exporters write them (no real sample is at hand)."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs import _spans, otel
from offline_lm.logs._adapters import Sample
from offline_lm.store.rows import convert
from offline_lm.types import Episode, Rejected

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ASKED = {"role": "user", "parts": [{"type": "text", "content": "Weather in Paris?"}]}
CALLED = {
    "role": "assistant",
    "parts": [{"type": "tool_call", "id": "call_1", "name": "get_weather", "arguments": {"location": "Paris"}}],
    "finish_reason": "tool_call",
}
GIVEN = {"role": "tool", "parts": [{"type": "tool_call_response", "id": "call_1", "response": "rainy, 57°F"}]}
SAID = {"role": "assistant", "parts": [{"type": "text", "content": "It rains."}], "finish_reason": "stop"}


def any_value(value: Any) -> Any:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [any_value(item) for item in value]}}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": [{"key": k, "value": any_value(v)} for k, v in value.items()]}}
    return {"stringValue": value}


def attributes(**given):
    return [{"key": key, "value": any_value(value)} for key, value in given.items()]


def span(id_, start, *, parent="", name="s", trace=TRACE, events=(), status=None, **given):
    made = {"traceId": trace, "spanId": id_, "parentSpanId": parent, "name": name, "kind": 3}
    times = {"startTimeUnixNano": str(start * 10**9), "endTimeUnixNano": str((start + 1) * 10**9)}
    said = [{"name": n, "attributes": attributes(**a)} for n, a in events]
    return made | times | {"attributes": attributes(**given), "events": said, "status": status or {}}


def chat(id_, start, inputs, outputs, **more):
    given: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "gpt-4",
        "gen_ai.response.model": "gpt-4-0613",
    }
    given |= {"gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 5, "gen_ai.request.temperature": 0.5}
    for key, value in (("input", inputs), ("output", outputs)):
        if value is not None:
            given[f"gen_ai.{key}.messages"] = json.dumps(value)
    return span(id_, start, **(given | more))


def tool(id_, start, **more):
    given = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "get_weather",
        "gen_ai.tool.call.id": "call_1",
    }
    given |= {"gen_ai.tool.call.arguments": '{"location": "Paris"}', "gen_ai.tool.call.result": "rainy, 57°F"}
    return span(id_, start, **(given | more))


def batch(*spans):
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {"name": "x"}, "spans": list(spans)}]}]}


RUN = [
    span("a0", 1, name="invoke_agent", **{"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "helper"}),
    chat("a1", 2, [ASKED], [CALLED], parent="a0"),
    tool("a2", 3, parent="a0"),
    chat("a3", 4, [ASKED, CALLED, GIVEN], [SAID], parent="a0"),
]


def read(tmp_path, *lines, name="traces.jsonl", **options) -> list[Any]:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return list(logs.read("otel", path, **options))


def one(tmp_path, *spans, **options) -> Episode:
    (episode,) = read(tmp_path, batch(*spans), **options)
    assert isinstance(episode, Episode), episode
    convert(episode, "i")
    return episode


def said(step):
    return [(m["role"], m["content"]) for m in json.loads(step.messages or "")]


def test_a_conversation_of_genai(tmp_path):
    got = one(tmp_path, *RUN)
    assert (got.native_id, got.dataset, got.goal) == (TRACE, "traces", "Weather in Paris?")
    assert (got.model, got.agent, got.policy_kind) == ("gpt-4-0613", "helper", "llm")
    assert (got.tokens_in, got.tokens_out, got.cost_usd, got.duration_s) == (20, 10, None, 3.0)
    assert got.sampling == {"temperature": 0.5}
    assert (got.terminated, got.truncated, got.success, got.outcome_reward) == (None, None, None, None)
    assert got.quality_flags == ("unlabelled",)
    first, second = got.steps
    assert said(first) == [("user", "Weather in Paris?")]
    assert (first.action, first.action_args) == ('get_weather(location="Paris")', {"location": "Paris"})
    assert said(second) == [("tool", "rainy, 57°F")]
    assert (second.action, second.reward) == ("It rains.", None)
    assert first.extra is not None
    assert first.extra["tools"][0]["result"] == "rainy, 57°F"
    assert first.ts_start is not None
    assert first.ts_start.isoformat() == "1970-01-01T00:00:02+00:00"


def test_any_order_over_lines(tmp_path):
    other = [chat("b1", 9, [ASKED], [SAID], trace="ff")]
    straight = one(tmp_path, *RUN)
    got = read(tmp_path, *(batch(s) for s in [RUN[3], other[0], RUN[2], RUN[0], RUN[1], RUN[3]]))
    assert [e.native_id for e in got] == [TRACE, "ff"]
    assert [s.action for s in got[0].steps] == [s.action for s in straight.steps]
    assert [s.messages for s in got[0].steps] == [s.messages for s in straight.steps]


def test_tools_after_the_last_call_are_the_final_observation(tmp_path):
    got = one(tmp_path, *RUN[:3])
    assert [s.is_final_observation for s in got.steps] == [False, True]
    assert said(got.steps[1]) == [("tool", "rainy, 57°F")]


def test_errors(tmp_path):
    broken = tool("a2", 3, status={"code": 2, "message": "no such city"}, parent="a0")
    failed = chat("a3", 4, [ASKED], None, status={"code": "STATUS_CODE_ERROR", "message": "overloaded"})
    first, second = one(tmp_path, RUN[0], RUN[1], broken, failed).steps
    assert (first.action_error, first.action_valid) == ("no such city", None)
    assert (second.action, second.action_valid, second.action_error) == ("", False, "overloaded")


def test_system_instructions_reasoning_pictures(tmp_path):
    shown = {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "iVBORw0KGgo="}
    asked = {"role": "user", "parts": [{"type": "text", "content": "see"}, shown]}
    thought = {"role": "assistant", "parts": [{"type": "reasoning", "content": "hm"}, SAID["parts"][0]]}
    system = json.dumps([{"type": "text", "content": "Be brief."}])
    (episode,) = read(tmp_path, batch(chat("a1", 1, [asked], [thought], **{"gen_ai.system_instructions": system})))
    (step,) = episode.steps
    assert said(step)[0] == ("system", "Be brief.")
    assert said(step)[1][1].startswith("see\n[image ")
    assert step.screenshot["status"] == "ok"
    assert (step.action, step.thought) == ("It rains.", "hm")


def test_prompt_that_starts_anew(tmp_path):
    new = {"role": "user", "parts": [{"type": "text", "content": "summary"}]}
    got = one(tmp_path, chat("a1", 1, [ASKED], [SAID]), chat("a2", 2, [new], [SAID]))
    assert said(got.steps[1]) == [("user", "summary")]
    assert got.steps[1].extra is not None
    assert got.steps[1].extra["context_reset"] is True


def test_conversation_or_trace(tmp_path):
    spans = [chat("a", 1, [ASKED], [SAID], trace=t, **{"gen_ai.conversation.id": "conv"}) for t in ("t1", "t2")]
    assert [e.native_id for e in read(tmp_path, batch(*spans))] == ["conv"]
    assert [e.native_id for e in read(tmp_path, batch(*spans), by="trace")] == ["t1", "t2"]
    with pytest.raises(UserError, match="by=day"):
        read(tmp_path, batch(*spans), by="day")


def test_evaluations_are_labels(tmp_path):
    scores = [
        ("Relevance", 4.0, "relevant", "to the point"),
        ("env_reward", 1.0, "pass", ""),
    ]
    events = [
        ("gen_ai.evaluation.result", {f"gen_ai.evaluation.{k}": v for k, v in zip(keys, score, strict=True)})
        for score in scores
        for keys in [("name", "score.value", "score.label", "explanation")]
    ]
    got = one(tmp_path, chat("a1", 1, [ASKED], [SAID], events=events))
    assert [(x.kind, x.name, x.value, x.reason) for x in got.labels] == [
        ("judge", "Relevance", 4.0, "relevant: to the point"),
        ("env", "env_reward", 1.0, "pass"),
    ]
    assert (got.outcome_reward, got.success) == (None, None)
    lone = span("e", 1, events=events)
    (rejected,) = read(tmp_path, batch(lone))
    assert rejected.reason == "outcome_only"


def test_log_records(tmp_path):
    """Content and scores as events of their own, in the same file as the spans."""
    content = {"gen_ai.input.messages": json.dumps([ASKED]), "gen_ai.output.messages": json.dumps([SAID])}
    score = {"gen_ai.evaluation.name": "Relevance", "gen_ai.evaluation.score.value": 1}
    records = [
        {"eventName": "gen_ai.client.inference.operation.details", "attributes": attributes(**content)},
        {"eventName": "gen_ai.evaluation.result", "attributes": attributes(**score)},
        {"body": {"stringValue": "an ordinary line"}},
    ]
    records = [r | {"traceId": TRACE, "spanId": "a1", "timeUnixNano": "5"} for r in records]
    held = {"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}
    (got,) = read(tmp_path, held, batch(chat("a1", 1, None, None)))
    assert isinstance(got, Episode)
    assert (got.steps[0].action, said(got.steps[0])) == ("It rains.", [("user", "Weather in Paris?")])
    assert [x.name for x in got.labels] == ["Relevance"]


def test_older_events(tmp_path):
    calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    events = [
        ("gen_ai.system.message", {"content": "Be brief."}),
        ("gen_ai.user.message", {"content": "Go"}),
        ("gen_ai.choice", {"index": 0, "finish_reason": "tool_calls", "message": json.dumps({"tool_calls": calls})}),
    ]
    (step,) = one(tmp_path, chat("a1", 1, None, None, events=events)).steps
    assert said(step) == [("system", "Be brief."), ("user", "Go")]
    assert (step.action, step.action_args) == ("f(a=1)", {"a": 1})
    older = [
        ("gen_ai.content.prompt", {"gen_ai.prompt": json.dumps([{"role": "user", "content": "Go"}])}),
        ("gen_ai.content.completion", {"gen_ai.completion": json.dumps([{"role": "assistant", "content": "ok"}])}),
    ]
    (step,) = one(tmp_path, chat("a1", 1, None, None, events=older)).steps
    assert (said(step), step.action) == ([("user", "Go")], "ok")


def test_openllmetry(tmp_path):
    given = {"llm.request.type": "chat", "gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "Go"}
    given |= {"gen_ai.completion.0.role": "assistant", "gen_ai.completion.0.tool_calls.0.name": "f"}
    given |= {"gen_ai.completion.0.tool_calls.0.arguments": '{"a": 1}', "gen_ai.request.model": "m"}
    (step,) = one(tmp_path, span("a", 1, **given)).steps
    assert (said(step), step.action) == ([("user", "Go")], "f(a=1)")


def openinference(start, asked, **answer):
    given = {"openinference.span.kind": "LLM", "llm.model_name": "m", "llm.token_count.prompt": 7}
    given |= {"llm.invocation_parameters": '{"temperature": 0, "max_tokens": 9}', "session.id": "sess"}
    for i, (role, content) in enumerate(asked):
        given |= {f"llm.input_messages.{i}.message.role": role, f"llm.input_messages.{i}.message.content": content}
    given |= {f"llm.output_messages.0.message.{key}": value for key, value in answer.items()}
    return span(f"s{start}", start, **given)


def test_openinference(tmp_path):
    call = {"tool_calls.0.tool_call.function.name": "f", "tool_calls.0.tool_call.function.arguments": '{"a": 1}'}
    spans = [
        openinference(1, [("user", "Go")], role="assistant", **call),
        span("t", 2, **{"openinference.span.kind": "TOOL", "tool.name": "f", "output.value": "done"}),
        openinference(3, [("user", "Go"), ("assistant", ""), ("tool", "done")], role="assistant", content="ok"),
        span("e", 4, **{"openinference.span.kind": "EVALUATOR", "annotations.0.annotation.name": "good"}),
        openinference(5, [("user", "judge")], role="assistant", content="bad") | {"parentSpanId": "e"},
    ]
    got = one(tmp_path, *spans)
    assert (got.native_id, got.model, got.tokens_in, got.extra["traces"]) == ("sess", "m", 14, [TRACE])
    assert [s.action for s in got.steps] == ["f(a=1)", "ok"]  # the evaluator's own call is none
    assert said(got.steps[1]) == [("tool", "done")]
    assert got.sampling == {"temperature": 0, "max_tokens": 9}
    assert [x.name for x in got.labels] == ["good"]


def test_hidden_and_missing_content(tmp_path):
    hidden = openinference(1, [("user", "__REDACTED__")], role="assistant", content="__REDACTED__")
    for made in (hidden, chat("a", 1, None, None), span("t", 1, **{"gen_ai.operation.name": "execute_tool"})):
        (got,) = read(tmp_path, batch(made))
        assert isinstance(got, Rejected)
        assert got.reason == "no_content"
        assert "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=true" in got.message


def test_hidden_prompts(tmp_path):
    got = one(tmp_path, openinference(1, [("user", "__REDACTED__")], role="assistant", content="ok"))
    assert got.quality_flags == ("unlabelled", "no_observations")
    assert (got.steps[0].messages, got.steps[0].action, got.goal) == ("[]", "ok", None)


def test_call_reported_twice(tmp_path):
    inner = chat("a2", 2, [ASKED], [SAID], parent="a1")
    assert len(one(tmp_path, chat("a1", 1, [ASKED], [SAID]), inner).steps) == 1


def test_tools_without_a_model(tmp_path):
    got = one(tmp_path, tool("a", 1), tool("b", 2))
    assert got.quality_flags == ("unlabelled", "no_model_calls")
    assert [s.observation for s in got.steps] == ["", "rainy, 57°F", "rainy, 57°F"]
    assert [s.action for s in got.steps] == ['get_weather(location="Paris")'] * 2 + [None]


def test_console_exporter(tmp_path):
    """Objects of several lines, one after another."""
    spans = [
        {
            "name": "chat gpt-4",
            "context": {"trace_id": "0xabc", "span_id": f"0x{i}", "trace_state": "[]"},
            "kind": "SpanKind.CLIENT",
            "parent_id": None,
            "start_time": f"2025-01-01T00:00:0{i}.000000Z",
            "end_time": f"2025-01-01T00:00:0{i}.500000Z",
            "status": {"status_code": "UNSET"},
            "attributes": {
                "gen_ai.operation.name": "chat",
                "gen_ai.input.messages": json.dumps([ASKED]),
                "gen_ai.output.messages": json.dumps([SAID]),
            },
            "events": [],
            "links": [],
            "resource": {"attributes": {}, "schema_url": ""},
        }
        for i in (1, 2)
    ]
    path = tmp_path / "console.json"
    path.write_text("\n".join(json.dumps(s, indent=4) for s in spans))
    assert otel.detect(Sample(path)) == "OpenTelemetry spans"
    (got,) = logs.read("auto", path)
    assert isinstance(got, Episode)
    assert (got.source, got.native_id, len(got.steps), got.duration_s) == ("otel", "abc", 2, 1.5)


def test_detection(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(batch(*RUN), indent=1))
    assert otel.detect(Sample(path)) == "resourceSpans of OTLP"
    assert len(list(logs.read("auto", path))) == 1


def test_bad_line_is_quarantined_and_said_of_the_rest(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(batch(RUN[1])) + '\n{"resourceSpans": [{"scope\n')
    refused, got = logs.read("otel", path)
    assert isinstance(refused, Rejected)
    assert refused.reason == "json_truncated"
    assert isinstance(got, Episode)
    assert got.quality_flags == ("unlabelled", "spans_lost")


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(_spans, "MAX_HELD", 1000)
    (got,) = read(tmp_path, *(batch(s) for s in RUN))
    assert isinstance(got, Rejected)
    assert (got.reason, got.offset) == ("too_many_spans", 0)
    monkeypatch.setattr(_spans, "MAX_HELD", 10**6)
    monkeypatch.setattr(_spans, "MAX_EPISODE", 1000)
    (got,) = read(tmp_path, *(batch(s) for s in RUN))
    assert got.reason == "too_large"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ([], "not_an_object"),
        ({"a": 1}, "missing_key"),
        ({"resourceSpans": 3}, "wrong_type"),
        (batch(7), "wrong_type"),
        (batch({"spanId": "a", "attributes": []}), "missing_key"),
        (batch(chat("a", 1, [ASKED], [SAID]) | {"startTimeUnixNano": "soon"}), "bad_value"),
        (batch(chat("a", 1, [ASKED], [SAID]) | {"startTimeUnixNano": "99999999999999999999"}), "out_of_range"),
        (batch(chat("a", 1, [3], [SAID])), "wrong_type"),
        (batch(chat("a", 1, [{"role": "user", "content": 5}], [SAID])), "wrong_type"),
        (batch(span("a", 1)), "no_steps"),
    ],
)
def test_rejected(tmp_path, made, reason):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([made], indent=1) if made == [] else json.dumps(made, indent=1))
    if made == []:
        path.write_text("[[]]")
    (got,) = logs.read("otel", path)
    assert isinstance(got, Rejected)
    assert got.reason == reason


def jsonish():
    words = st.sampled_from(
        ["role", "content", "parts", "type", "text", "message", "tool_calls", "function", "name", "0"]
    )
    leaf = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | words
    return st.recursive(leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(words, x, max_size=3), max_leaves=8)


KEYS = ["gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.system_instructions", "llm.input_messages.0.message"]
KEYS += [
    "llm.output_messages.0.message.contents",
    "gen_ai.tool.call.arguments",
    "annotations.0",
    "gen_ai.prompt.0.role",
]
KEYS += ["gen_ai.usage.input_tokens", "session.id", "llm.cost.total", "llm.invocation_parameters", "gen_ai.choice"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), jsonish(), max_size=4), st.sampled_from(["chat", "execute_tool", "x"]))
def test_any_attributes(tmp_path, given_, kind):
    raw = {"trace_id": "t", "span_id": "s", "name": "n", "attributes": {"gen_ai.operation.name": kind} | given_}
    raw["events"] = [{"name": key, "attributes": given_} for key in ("gen_ai.choice", "gen_ai.user.message")]
    for found in read(tmp_path, raw):
        assert isinstance(found, Rejected | Episode)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3000), st.binary(max_size=5))
def test_any_bytes(tmp_path, at, noise):
    data = json.dumps(batch(*RUN)).encode()
    at %= len(data)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data[:at] + noise + data[at + len(noise) :])
    otel.detect(Sample(path))
    for found in logs.read("otel", path):
        assert isinstance(found, Rejected) or convert(found, "i")
