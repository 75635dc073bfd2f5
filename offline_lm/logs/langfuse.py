"""Langfuse exports: observations, with the scores and traces that lie in the same file.

Rows are those of the blob storage export (``observations/``, ``observations_v2/``: snake_case, input and output as
text; langfuse.com/docs, "Export field reference"), of the API and the table export (camelCase), or the JSON of one
trace or session as the page downloads it (``{id, observations[], scores[]}``), lines or an array.

``type`` GENERATION is a call of the model, TOOL a tool, AGENT, CHAIN, SPAN, EVENT what is around them, EVALUATOR and
GUARDRAIL are left out. How they become episodes is told in `offline_lm.logs._spans`: an episode is a session where
one was logged (``session_id``), else a trace; ``by=trace`` takes the trace always. ``level`` ERROR is an error of the
call.

Scores become labels: human where annotated (``source`` ANNOTATION), else judge, or env if so named. The blob export
keeps them in files of their own (``scores/``): those are refused as ``outcome_only``, and ``labels=`` takes them.
Rows of traces alone hold no steps (``no_steps``). An export without input and output is ``no_content``: export the
field group ``io``.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, take
from offline_lm.logs._records import Bad
from offline_lm.logs._span_messages import answers, from_json, label, messages
from offline_lm.logs._spans import Span, read_files
from offline_lm.types import JSON, Episode, Rejected

SOURCE = "langfuse"
SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".jsonl.zst")
_KINDS = {
    "GENERATION": "llm",
    "TOOL": "tool",
    "AGENT": "agent",
    "EVALUATOR": "evaluator",
    "GUARDRAIL": "evaluator",
    "SPAN": "other",
    "EVENT": "other",
    "CHAIN": "other",
    "RETRIEVER": "other",
    "EMBEDDING": "other",
}
_WHOLE = ("top_k", "max_tokens", "seed")
_SAMPLING = ("temperature", "top_p", *_WHOLE)


def detect(sample: Sample) -> str | None:
    value, keys = sample.value, sample.keys
    if keys & {"trace_id", "traceId"} and keys & {"start_time", "startTime"}:
        if "id" in keys and type(value.get("type")) is str and value["type"] in _KINDS:
            return f"Langfuse observations ({value['type']})"
    elif keys & {"trace_id", "traceId"} and keys & {"data_type", "dataType"} and {"id", "value", "name"} <= keys:
        return "Langfuse scores"
    elif type(value) is dict and type(value.get("observations")) is list and value["observations"]:
        first = value["observations"][0]
        if type(first) is dict and type(first.get("type")) is str and first["type"] in _KINDS:
            return "a trace of Langfuse with its observations"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, by: str = "session") -> Iterator[Episode | Rejected]:
    """The episodes of each file; observations of one trace are brought together within a file, not across files.

    Raises UserError for a folder without files ending in `SUFFIXES`, or `by` that is neither session nor trace.
    """
    return read_files(SOURCE, find(path), spans_of, by, "session")


def spans_of(value: Any) -> Iterator[Span]:
    """The spans of one row, or of a trace with all of its rows. Raises Bad."""
    if type(value) is not dict:
        raise Bad("not_an_object", "not a JSON object; an observation has id, traceId, type, input and output")
    if type(value.get("traces")) is list:  # a session
        for trace in value["traces"]:
            yield from spans_of(trace if type(trace) is not dict else {"sessionId": value.get("id")} | trace)
    elif type(value.get("observations")) is list:
        trace = value["trace"] if type(value.get("trace")) is dict else value
        known = {"traceId": take(trace, "id", str), "sessionId": _either(trace, "sessionId", "session_id")}
        for i, row in enumerate(value["observations"]):
            if type(row) is not dict:
                raise Bad("wrong_type", f"observations[{i}] is not an object")
            yield _observation(known | {k: v for k, v in row.items() if v is not None}, f"observations[{i}]")
        for i, row in enumerate(take(value, "scores", list) or take(trace, "scores", list) or []):
            if type(row) is not dict:
                raise Bad("wrong_type", f"scores[{i}] is not an object")
            yield _score(known | row, f"scores[{i}]")
    elif type(value.get("type")) is str:
        yield _observation(value, "")
    elif _either(value, "dataType", "data_type") is not None or "value" in value:
        yield _score(value, "")
    elif type(value.get("id")) is str and "timestamp" in value:  # a trace without its observations
        yield Span(trace=value["id"], name=_text(value.get("name")), conversation=_session(value))
    else:
        raise Bad("missing_key", "neither type nor observations: no row of Langfuse")


def _either(value: JSON, *keys: str) -> Any:
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _text(value: Any) -> str | None:
    return value if type(value) is str and value else None


def _session(row: JSON) -> str | None:
    return _text(_either(row, "sessionId", "session_id"))


def _trace(row: JSON, place: str) -> str:
    trace = _text(_either(row, "traceId", "trace_id"))
    if trace is None:
        raise Bad("missing_key", f"{place}{'.' if place else ''}traceId is missing; it must be logged")
    return trace


def _when(row: JSON, *keys: str) -> datetime | None:
    """ISO 8601, or ``YYYY-MM-DD HH:MM:SS.ffffff`` in UTC."""
    value = _either(row, *keys)
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(value)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (TypeError, ValueError, OverflowError):
        raise Bad("bad_value", f"{keys[0]} is no time; it must be as 2026-11-21 09:30:00.000000") from None


def _number(value: Any) -> float | None:
    """Langfuse writes some decimals as text."""
    if type(value) is str:
        try:
            value = float(value)
        except ValueError:
            return None
        return value if abs(value) < 1e15 else None
    return float(value) if type(value) is int or type(value) is float else None


def _observation(row: JSON, place: str) -> Span:
    kind = row.get("type")
    if type(kind) is not str or kind not in _KINDS:
        raise Bad("bad_value", f"type is {str(kind)[:40]!r}; it must be one of: {', '.join(_KINDS)}")
    span = Span(trace=_trace(row, place), id=_text(row.get("id")) or "", kind=_KINDS[kind])
    span.parent = _text(_either(row, "parentObservationId", "parent_observation_id"))
    span.name = _text(row.get("name"))
    span.conversation = _session(row)
    span.start = _when(row, "startTime", "start_time")
    span.end = _when(row, "endTime", "end_time")
    if row.get("level") == "ERROR":
        span.error = _text(_either(row, "statusMessage", "status_message")) or "error"
    given, made = row.get("input"), row.get("output")
    if span.kind == "llm":
        span.model = _text(_either(row, "model", "providedModelName", "provided_model_name"))
        if given is not None and given != "":
            span.prompt = messages(given, "user", "input")
        if made is not None and made != "":
            span.answers = answers(made, "output")
        _counts(span, row)
    elif span.kind == "tool":
        span.tool = {"name": span.name, "id": None}
        span.tool |= {"arguments": from_json(given)} if given is not None else {}
        span.tool |= {"result": made} if made is not None else {}
    elif kind == "AGENT":
        span.agent = span.name
    return span


def _counts(span: Span, row: JSON) -> None:
    usage = from_json(_either(row, "usageDetails", "usage_details", "usage"))
    usage = usage if type(usage) is dict else {}
    counted = _either(usage, "input", "promptTokens"), _either(usage, "output", "completionTokens")
    span.tokens_in, span.tokens_out = (int(n) if (n := _number(count)) is not None else None for count in counted)
    cost = from_json(_either(row, "costDetails", "cost_details"))
    total = cost.get("total") if type(cost) is dict else None
    span.cost_usd = _number(
        total if total is not None else _either(row, "totalCost", "total_cost", "calculatedTotalCost")
    )
    given = from_json(_either(row, "modelParameters", "model_parameters"))
    if type(given) is dict:
        found = {key: _number(given.get(key)) for key in _SAMPLING}
        whole = {k: int(v) if k in _WHOLE else v for k, v in found.items() if v is not None}
        span.sampling = whole or None


def _score(row: JSON, place: str) -> Span:
    trace = _text(_either(row, "traceId", "trace_id"))
    session = _session(row)
    if trace is None and session is None:
        raise Bad("missing_key", f"{place or 'the score'} names neither a trace nor a session")
    span = Span(trace=trace or session or "", kind="event", conversation=session)
    span.start = _when(row, "timestamp")
    said = _text(_either(row, "stringValue", "string_value"))
    human = "human" if row.get("source") == "ANNOTATION" else None
    value = _number(row.get("value"))
    span.labels.append(label(row.get("name"), value, kind=human, reason=row.get("comment"), said=said))
    return span
