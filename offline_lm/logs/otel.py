"""OpenTelemetry traces of agents: OTLP JSON and the Python console exporter, by any of the conventions for models.

Files: OTLP JSON (``resourceSpans/scopeSpans/spans``, attributes as ``[{key, value: {stringValue: ...}}]``), whole or
one batch a line, as the Collector's file exporter writes it, with log records (``resourceLogs``) beside them; spans of
``ConsoleSpanExporter``, one after another or one a line; flat spans with ``trace_id``, ``span_id``, ``attributes``.
How spans become episodes is told in `offline_lm.logs._spans`.

Conventions, by attribute:

- GenAI (opentelemetry.io, semantic conventions 1.37 and later): ``gen_ai.operation.name`` (chat, execute_tool,
  invoke_agent), ``gen_ai.input.messages``, ``gen_ai.output.messages``, ``gen_ai.system_instructions``,
  ``gen_ai.tool.call.arguments`` and ``result``, ``gen_ai.conversation.id``, ``gen_ai.usage.*``; the event
  ``gen_ai.client.inference.operation.details``; ``gen_ai.evaluation.result`` becomes a label.
- GenAI before 1.37: an event for each message (``gen_ai.user.message`` ... ``gen_ai.choice``), or
  ``gen_ai.content.prompt`` and ``gen_ai.content.completion``; OpenLLMetry's ``gen_ai.prompt.N.role``.
- OpenInference (Arize, ``spec/semantic_conventions.md``): ``openinference.span.kind``, ``llm.input_messages.N.*``,
  ``llm.output_messages.N.*``, ``tool.name``, ``session.id``, ``llm.token_count.*``, ``annotations.N.annotation.*``.

Content is opt-in everywhere; spans without it are refused (``no_content``) with the switch to set.

The episode is the conversation (``gen_ai.conversation.id``, ``session.id``) where it is logged, else the trace;
``by=trace`` takes the trace always.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, take
from offline_lm.logs._records import Bad
from offline_lm.logs._span_messages import REDACTED, answers, from_json, label, messages, nested, unflattened
from offline_lm.logs._spans import Span, read_files
from offline_lm.types import JSON, Episode, Rejected

SOURCE = "otel"
SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".jsonl.zst")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_NS = 32503680000 * 10**9  # the year 3000
_DEPTH = 20
_KINDS = {
    "chat": "llm",
    "text_completion": "llm",
    "generate_content": "llm",
    "completion": "llm",
    "execute_tool": "tool",
    "invoke_agent": "agent",
    "create_agent": "agent",
    "invoke_workflow": "agent",
    "llm": "llm",
    "tool": "tool",
    "agent": "agent",
    "evaluator": "evaluator",
    "guardrail": "evaluator",
}
_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "seed")


def detect(sample: Sample) -> str | None:
    value, keys = sample.value, sample.keys
    if "resourceSpans" in keys or "resource_spans" in keys:
        return "resourceSpans of OTLP"
    if "resourceLogs" in keys and (b"gen_ai." in sample.head or b"openinference." in sample.head):
        return "resourceLogs of OTLP with gen_ai events"
    if {"attributes", "name"} <= keys and type(value["attributes"]) in (dict, list):
        context = value.get("context")
        if "span_id" in keys or "spanId" in keys or (type(context) is dict and "span_id" in context):
            return "OpenTelemetry spans"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, by: str = "conversation") -> Iterator[Episode | Rejected]:
    """The episodes of each file; spans of one trace are brought together within a file, not across files.

    Raises UserError for a folder without files ending in `SUFFIXES`, or `by` that is neither conversation nor trace.
    """
    return read_files(SOURCE, find(path), spans_of, by, "conversation")


# --- containers ---------------------------------------------------------------------------------------------


def spans_of(value: Any) -> Iterator[Span]:
    """The spans of one record: a batch of OTLP, or one span. Raises Bad."""
    if type(value) is not dict:
        raise Bad("not_an_object", "not a JSON object; a batch has resourceSpans, a span has attributes")
    batches = False
    for outer, scopes, inner in (
        ("resourceSpans", ("scopeSpans", "instrumentationLibrarySpans"), "spans"),
        ("resource_spans", ("scope_spans",), "spans"),
        ("resourceLogs", ("scopeLogs",), "logRecords"),
    ):
        if outer not in value:
            continue
        batches = True
        for resource in take(value, outer, list) or []:
            for key in scopes:
                for scope in take(resource, key, list, outer) or []:
                    for i, span in enumerate(take(scope, inner, list, key) or []):
                        made = _event if inner == "logRecords" else _span
                        yield from made(span, f"{inner}[{i}]")
    if "resourceMetrics" in value:
        return
    if not batches:
        if "attributes" not in value:
            raise Bad("missing_key", "neither resourceSpans nor attributes: no span of OpenTelemetry")
        yield from _span(value, "the span")


def _attributes(given: Any, place: str) -> JSON:
    """As a flat dict with dotted keys: OTLP has a list of {key, value}, other exporters objects, nested or not."""
    flat: JSON = {}
    if type(given) is list:
        for i, pair in enumerate(given):
            key = take(pair, "key", str, f"{place}[{i}]")
            if key is not None:
                flat[key] = _any_value(pair.get("value"))
    elif type(given) is dict:
        _flatten("", given, flat)
    elif given is not None:
        raise Bad("wrong_type", f"{place} is neither a list nor an object")
    return flat


def _flatten(prefix: str, value: JSON, flat: JSON, depth: int = 0) -> None:
    """Names of the conventions joined by dots; what stands under another name stays as it is."""
    for key, item in value.items():
        name = f"{prefix}{key}"
        ours = name.split(".")[0] in ("llm", "gen_ai", "tool", "session", "openinference")
        if type(item) is dict and ours and depth < _DEPTH and not name.endswith(("arguments", "result", "metadata")):
            _flatten(f"{name}.", item, flat, depth + 1)
        else:
            flat[name] = item


def _any_value(value: Any, depth: int = 0) -> Any:
    """A value of OTLP's AnyValue."""
    if type(value) is not dict or depth > _DEPTH:
        return value
    for key in ("stringValue", "boolValue", "doubleValue", "bytesValue"):
        if key in value:
            return value[key]
    if "intValue" in value:  # 64-bit integers are text in protobuf's JSON
        number = value["intValue"]
        return int(number) if type(number) is str and number.lstrip("-").isdigit() and len(number) < 20 else number
    for key, is_list in (("arrayValue", True), ("kvlistValue", False)):
        inner = value.get(key)
        items = inner.get("values") if type(inner) is dict else None
        if key in value:
            items = items if type(items) is list else []
            if is_list:
                return [_any_value(item, depth + 1) for item in items]
            pairs = [item for item in items if type(item) is dict and type(item.get("key")) is str]
            return {item["key"]: _any_value(item.get("value"), depth + 1) for item in pairs}
    return value


def _first(value: JSON, *keys: str) -> Any:
    return next((value[key] for key in keys if value.get(key) not in (None, "")), None)


def _id(value: Any) -> str | None:
    return value.removeprefix("0x") if type(value) is str and value else None


def _when(value: Any, place: str) -> datetime | None:
    """Nanoseconds since 1970, as a number or text, or ISO 8601."""
    if value is None or value in ("", "0", 0):
        return None
    number = int(value) if type(value) is str and value.isdigit() and len(value) < 21 else value
    if type(number) is int:
        if not 0 < number < _MAX_NS:
            raise Bad("out_of_range", f"{place} is no time in nanoseconds since 1970")
        return _EPOCH + timedelta(microseconds=number // 1000)
    if type(value) is str:
        try:
            time = datetime.fromisoformat(value)
            return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
        except (ValueError, OverflowError):
            pass
    raise Bad("bad_value", f"{place} is no time; it must be nanoseconds since 1970 or ISO 8601")


# --- one span -----------------------------------------------------------------------------------------------


def _span(raw: Any, place: str) -> Iterator[Span]:
    if type(raw) is not dict:
        raise Bad("wrong_type", f"{place} is not an object")
    context = _dict(raw.get("context"))
    trace = _id(_first(raw, "traceId", "trace_id") or _first(context, "trace_id", "traceId"))
    if trace is None:
        raise Bad("missing_key", f"{place} has no trace id; it must be logged")
    attributes = _attributes(raw.get("attributes"), f"{place}.attributes")
    span = Span(trace=trace, id=_id(_first(raw, "spanId", "span_id") or _first(context, "span_id", "spanId")) or "")
    span.parent = _id(_first(raw, "parentSpanId", "parent_span_id", "parent_id"))
    span.name = take(raw, "name", str, place)
    span.start = _when(_first(raw, "startTimeUnixNano", "start_time_unix_nano", "start_time"), f"{place}.start")
    span.end = _when(_first(raw, "endTimeUnixNano", "end_time_unix_nano", "end_time"), f"{place}.end")
    span.error = _error(raw)
    _describe(span, attributes)
    _content(span, attributes, place)
    for i, event in enumerate(take(raw, "events", list, place) or []):
        here = f"{place}.events[{i}]"
        name = take(event, "name", str, here) or ""
        _apply(span, name, _attributes(event.get("attributes"), here), None, here)
    yield span


def _error(raw: JSON) -> str | None:
    status = _dict(raw.get("status"))
    code = _first(status, "code", "status_code") or raw.get("status_code")
    if code not in (2, "2", "ERROR", "STATUS_CODE_ERROR"):
        return None
    said = _first(status, "message", "description") or raw.get("status_message")
    return said if type(said) is str else "error"


def _event(raw: Any, place: str) -> Iterator[Span]:
    """A log record: an event of the span that it names."""
    if type(raw) is not dict:
        raise Bad("wrong_type", f"{place} is not an object")
    attributes = _attributes(raw.get("attributes"), f"{place}.attributes")
    name = _first(raw, "eventName", "event_name") or attributes.get("event.name")
    trace = _id(_first(raw, "traceId", "trace_id"))
    if trace is None or type(name) is not str or not name.startswith("gen_ai."):
        return  # an ordinary line of a log
    span = Span(trace=trace, kind="event", parent=_id(_first(raw, "spanId", "span_id")))
    span.start = _when(_first(raw, "timeUnixNano", "observedTimeUnixNano"), f"{place}.timeUnixNano")
    span.conversation = _text(_first(attributes, "gen_ai.conversation.id", "session.id"))
    _apply(span, name, attributes, _any_value(raw.get("body")), place)
    yield span


def _dict(value: Any) -> JSON:
    return value if type(value) is dict else {}


def _text(value: Any) -> str | None:
    return value if type(value) is str else None


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _describe(span: Span, attributes: JSON) -> None:
    """Kind, model, counts and names."""
    said = _first(
        attributes, "openinference.span.kind", "gen_ai.operation.name", "traceloop.span.kind", "llm.request.type"
    )
    asked = any(key.startswith(("llm.input_messages.", "gen_ai.prompt.")) for key in attributes)
    if type(said) is str:
        span.kind = _KINDS.get(said.lower(), "other")
    elif "gen_ai.tool.name" in attributes:
        span.kind = "tool"
    elif asked or "gen_ai.input.messages" in attributes or "gen_ai.request.model" in attributes:
        span.kind = "llm"
    span.conversation = _text(_first(attributes, "gen_ai.conversation.id", "session.id"))
    names = ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name")
    span.model = _text(_first(attributes, *names))
    span.agent = _text(_first(attributes, "gen_ai.agent.name", "agent.name"))
    span.tokens_in = _count(
        _first(attributes, "gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
    )
    span.tokens_out = _count(
        _first(attributes, "gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion")
    )
    cost = attributes.get("llm.cost.total")
    span.cost_usd = float(cost) if isinstance(cost, int | float) else None
    given = _dict(from_json(attributes.get("llm.invocation_parameters")))
    found = {key: attributes.get(f"gen_ai.request.{key}", given.get(key)) for key in _SAMPLING}
    whole = ("top_k", "max_tokens", "seed")
    found = {k: v for k, v in found.items() if type(v) is int or (type(v) is float and k not in whole)}
    span.sampling = found or None
    span.labels += _scores(attributes, "annotation") + _scores(attributes, "evaluation")


def _scores(attributes: JSON, word: str) -> list[JSON]:
    """OpenInference's annotations: of the span, its trace or its session; a list of them, or one."""
    found: list[JSON] = []
    for prefix in ("", "trace.", "session."):
        found += [item.get(word, item) for item in nested(attributes, f"{prefix}{word}s.")]
    if f"{word}.name" in attributes:
        found.append({key.removeprefix(f"{word}."): value for key, value in attributes.items()})
    who = {"HUMAN": "human"}
    return [
        label(
            item.get("name"),
            item.get("score"),
            kind=who.get(str(item.get("annotator_kind"))),
            reason=item.get("explanation"),
            said=item.get("label"),
        )
        for item in found
        if type(item) is dict
    ]


def _content(span: Span, attributes: JSON, place: str) -> None:
    """Prompt, answers and tool of a span, from its attributes."""
    system = from_json(attributes.get("gen_ai.system_instructions"))
    prompt = attributes.get("gen_ai.input.messages")
    if prompt is not None:
        said = messages({"role": "system", "parts": system}, "system", place) if type(system) is list else []
        span.prompt = said + messages(prompt, "user", f"{place}: gen_ai.input.messages")
    if (given := attributes.get("gen_ai.output.messages")) is not None:
        span.answers = answers(given, f"{place}: gen_ai.output.messages")
    for key in ("llm.input_messages.", "gen_ai.prompt."):
        if span.prompt is None and (items := nested(attributes, key)):
            said = [unflattened(item.get("message", item), "user") for item in items]
            span.prompt = said if any(m["content"] or m.get("tool_calls") for m in said) else None  # hidden
    for key in ("llm.output_messages.", "gen_ai.completion."):
        if span.answers is None and (items := nested(attributes, key)):
            made = [unflattened(item.get("message", item), "assistant") | {"role": "assistant"} for item in items]
            span.answers = [m for m in made if m["content"] or m.get("tool_calls") or m.get("reasoning_content")]
    span.answers = span.answers or None
    if span.kind == "tool":
        arguments = _first(
            attributes, "gen_ai.tool.call.arguments", "traceloop.entity.input", "input.value", "tool.parameters"
        )
        result = _first(attributes, "gen_ai.tool.call.result", "traceloop.entity.output", "output.value")
        name = _first(attributes, "gen_ai.tool.name", "tool.name", "traceloop.entity.name") or span.name
        span.tool = {
            "name": _text(name),
            "id": _text(_first(attributes, "gen_ai.tool.call.id", "tool.id", "tool_call.id")),
        }
        span.tool |= {"arguments": from_json(arguments)} if _kept(arguments) else {}
        span.tool |= {"result": result} if _kept(result) else {}


def _kept(value: Any) -> bool:
    return value is not None and value != REDACTED


def _apply(span: Span, name: str, attributes: JSON, body: Any, place: str) -> None:
    """An event of a span, or the log record that took its place."""
    if name == "gen_ai.evaluation.result":
        score = [attributes.get(f"gen_ai.evaluation.{key}") for key in ("name", "score.value", "score.label")]
        span.labels.append(
            label(score[0], score[1], said=score[2], reason=attributes.get("gen_ai.evaluation.explanation"))
        )
    elif name == "gen_ai.client.inference.operation.details":
        _content(span, attributes, place)
    elif name == "gen_ai.content.prompt" and "gen_ai.prompt" in attributes:
        span.prompt = (span.prompt or []) + messages(attributes["gen_ai.prompt"], "user", place)
    elif name == "gen_ai.content.completion" and "gen_ai.completion" in attributes:
        span.answers = (span.answers or []) + answers(attributes["gen_ai.completion"], place)
    elif name == "gen_ai.choice":
        given = from_json(body if body is not None else {k.removeprefix("gen_ai."): v for k, v in attributes.items()})
        given = given if type(given) is dict else {"message": given}
        said = from_json(given.get("message", given))
        said = said if type(said) is dict else {"content": said}
        calls = given.get("tool_calls") or said.get("tool_calls")
        if said.get("content") or calls:
            made = {"role": "assistant", "content": said.get("content")} | ({"tool_calls": calls} if calls else {})
            span.answers = (span.answers or []) + [made]
    elif name.startswith("gen_ai.") and name.endswith(".message"):
        role = name.split(".")[1]
        given = from_json(body if body is not None else {k.removeprefix("gen_ai."): v for k, v in attributes.items()})
        if type(given) is dict and (given.get("content") is not None or given.get("tool_calls")):
            kept = {key: given[key] for key in ("content", "tool_calls") if given.get(key) is not None}
            made = {"content": ""} | kept | {"role": _text(given.get("role")) or role}
            if type(given.get("id")) is str:
                made["tool_call_id"] = given["id"]
            span.prompt = (span.prompt or []) + [made]
    elif name == "exception" and span.error is None:
        span.error = _text(attributes.get("exception.message"))
