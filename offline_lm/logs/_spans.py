"""Spans of traces as episodes: what `otel` and `langfuse` share once each has read its own spans.

A span is a call of a model (kind llm), of a tool, an agent or evaluator around them, or anything else. The spans of
one trace may lie anywhere in a file and in any order, so those of a file are held until its end, compressed, at most
`MAX_HELD` bytes of them; a longer file is refused whole (``too_many_spans``) rather than cut into half episodes.

An episode is a conversation (or session) where one was logged, else a trace. Its steps are the calls of the model in
order of their start; a tool span belongs to the last call before it (``extra.tools``). Left out are calls inside an
evaluator, and calls inside another call of a model, which a second instrumentation reports again.

The prompt of a call holds the whole conversation. ``messages`` are what is new in it since the call before: where the
prompt does not begin as that one did, it is all new, and ``extra.context_reset`` says so. The tools called after the
last decision are the final observation. A trace without calls of a model but with tools has a step for each tool.
Nothing in a trace says how it ended or what it earned: no reward (flag ``unlabelled``), ``terminated`` null. Scores
are ``labels``.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from offline_lm.errors import UserError
from offline_lm.logs import _chat
from offline_lm.logs._adapters import call_text, each, numbered, rejected, to_json
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad
from offline_lm.types import JSON, Episode, Label, Rejected

MAX_HELD = 512 << 20
"""Compressed bytes of spans held for one file."""
MAX_EPISODE = 256 << 20
"""Bytes of the spans of one episode, before compression."""
NO_CONTENT = (
    "the spans hold no prompts and answers: capture of content was off. Log again with "
    "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=true (OpenTelemetry), OPENINFERENCE_HIDE_INPUTS=false and "
    "OPENINFERENCE_HIDE_OUTPUTS=false (OpenInference), or TRACELOOP_TRACE_CONTENT=true (OpenLLMetry)"
)


@dataclass(slots=True, kw_only=True)
class Span:
    """One span, whichever convention wrote it. Times are those of the log, as UTC."""

    trace: str
    id: str = ""
    parent: str | None = None
    kind: str = "other"
    """llm, tool, agent, evaluator, event (to be added to the span `parent`) or other"""
    name: str | None = None
    conversation: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    error: str | None = None
    prompt: list[JSON] | None = None
    """messages with role and content"""
    answers: list[JSON] | None = None
    """assistant messages; more than one if several were sampled"""
    model: str | None = None
    agent: str | None = None
    sampling: JSON | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost_usd: float | None = None
    tool: JSON | None = None
    """name, id, arguments, result"""
    labels: list[JSON] = field(default_factory=list)
    offset: int = 0
    extra: JSON = field(default_factory=dict)


class Held:
    """The spans of one file, by trace."""

    def __init__(self) -> None:
        self.size = 0
        self.full = self.lost = False
        self._spans: dict[str, list[bytes]] = {}
        self._conversation: dict[str, str] = {}
        self._plain: dict[str, int] = {}

    def add(self, span: Span, offset: int) -> None:
        if self.full:
            return
        span.offset = offset
        try:
            data = orjson.dumps(asdict(span))
        except TypeError as error:
            raise Bad("out_of_range", f"a span cannot be kept: {error}") from None
        self._plain[span.trace] = self._plain.get(span.trace, 0) + len(data)
        if len(data) > 1000:
            data = b"z" + zlib.compress(data, 1)
        self.size += len(data) + 100
        if self.size > MAX_HELD:
            self.full = True
            self._spans.clear()
            return
        self._spans.setdefault(span.trace, []).append(data)
        if span.conversation is not None:
            self._conversation.setdefault(span.trace, span.conversation)

    def groups(self, by_trace: bool) -> Iterator[tuple[str, list[Span], str]]:
        """(name, spans in order of their start, hash of them all) of each episode, in order of first appearance.

        No spans stand for an episode of more than `MAX_EPISODE` bytes.
        """
        groups: dict[str, list[str]] = {}
        for trace in self._spans:
            name = trace if by_trace else self._conversation.get(trace, trace)
            groups.setdefault(name, []).append(trace)
        for name, traces in groups.items():
            if sum(self._plain[trace] for trace in traces) > MAX_EPISODE:
                yield name, [], ""
                continue
            digest, spans, ids = hashlib.sha256(), [], set()
            for data in (data for trace in traces for data in self._spans.pop(trace)):
                plain = zlib.decompress(data[1:]) if data.startswith(b"z") else data
                value = orjson.loads(plain)
                for key in ("start", "end"):
                    value[key] = datetime.fromisoformat(value[key]) if value[key] else None
                span = Span(**value)
                if span.id and span.kind != "event":
                    if (span.trace, span.id) in ids:  # an exporter sends a batch again when it saw no answer
                        continue
                    ids.add((span.trace, span.id))
                digest.update(plain)
                spans.append(span)
            yield name, _ordered(spans), digest.hexdigest()


def _ordered(spans: list[Span]) -> list[Span]:
    """By start; spans without one, and those of the same instant, stay in the order of the file."""
    known = [span.start.timestamp() if span.start else None for span in spans]
    last = 0.0
    for i, time in enumerate(known):
        last = last if time is None else time
        known[i] = last
    return [span for _, _, span in sorted(zip(known, range(len(spans)), spans, strict=True), key=lambda x: x[:2])]


def read_files(source: str, paths: Iterable[Path], to_spans: Any, by: str, group: str) -> Iterator[Episode | Rejected]:
    """The episodes of each file: a trace, or the `group` (conversation, session) it is of, as `by` says."""
    if by not in (group, "trace"):
        raise UserError(f"by={by} is unknown; an episode is a {group} or a trace")
    return chain.from_iterable(_read_file(source, path, to_spans, by == "trace") for path in paths)


def _read_file(source: str, path: Path, to_spans: Any, by_trace: bool) -> Iterator[Episode | Rejected]:
    """Every record of the file through `to_spans(value) -> Iterable[Span]`, then the episodes they make."""
    held = Held()

    def take_in(value: Any, record: Record) -> Iterable[Episode]:
        for span in list(to_spans(value)):  # whole records only
            held.add(span, record.offset)
        return ()

    for refused in each(source, path, take_in):
        held.lost = True
        yield refused
    if held.full:
        message = f"more than {MAX_HELD} bytes of spans, compressed; split the file so that each trace is in one part"
        yield rejected(source, path, Bad("too_many_spans", message))
        return
    for name, spans, digest in held.groups(by_trace):
        try:
            if not spans:
                raise Bad("too_large", f"{name[:80]} has more than {MAX_EPISODE} bytes of spans; log shorter prompts")
            made = _episode(name, spans)
        except Bad as bad:
            yield rejected(source, path, bad, spans[0].offset if spans else 0, b"", digest or None)
            continue
        flags = ("unlabelled", *made.pop("flags"), *(("spans_lost",) if held.lost else ()))
        yield Episode(
            source=source,
            dataset=path.name.split(".")[0],
            uri=str(path),
            sha256=digest,
            quality_flags=tuple(dict.fromkeys(flags)),
            **made,
        )


# --- one episode --------------------------------------------------------------------------------------------


def _episode(name: str, spans: list[Span]) -> JSON:
    by_id = {(span.trace, span.id): span for span in spans if span.kind != "event"}
    for event in (span for span in spans if span.kind == "event"):
        _attach(event, by_id.get((event.trace, event.parent or "")))
    above = {id(span): list(_above(span, by_id)) for span in spans if span.kind in ("llm", "tool")}
    acting = [s for s in spans if s.kind in ("llm", "tool") and all(a.kind != "evaluator" for a in above[id(s)])]
    calls = [s for s in acting if s.kind == "llm" and not any(a.kind == "llm" and a.answers for a in above[id(s)])]
    tools = [s for s in acting if s.kind == "tool"]
    labels = [Label(**label) for span in spans for label in span.labels]
    if not calls and not tools:
        if labels:
            raise Bad("outcome_only", f"trace {name[:80]} holds scores and no call of a model; labels= takes the file")
        raise Bad("no_steps", f"trace {name[:80]} holds no call of a model and no tool; leave it out")
    flags: list[str] = []
    steps = _calls(calls, tools, flags) if calls else _tools(tools, flags)
    counted = calls or tools
    agents = list(dict.fromkeys(s.agent for s in spans if s.agent))
    models = list(dict.fromkeys(s.model for s in calls if s.model))
    if len(agents) > 1:
        flags.append("several_agents")
    goal = next(
        (_chat.content_text(m.get("content"), "goal")[0] for s in calls for m in s.prompt or [] if _user(m)), None
    )
    start, end = counted[0].start, max((s.end for s in counted if s.end), default=None)
    first = spans[0]
    extra = {"agents": agents, "models": models} if len(agents) > 1 or len(models) > 1 else {}
    traces = list(dict.fromkeys(span.trace for span in spans))
    if traces != [name]:
        extra["traces"] = traces
    return {
        "native_id": name,
        "steps": numbered(steps),
        "goal": goal or None,
        "policy_id": models[0] if models else None,
        "policy_kind": "llm" if calls else None,
        "model": models[0] if models else None,
        "agent": agents[0] if agents else None,
        "sampling": next((s.sampling for s in calls if s.sampling), None),
        "labels": tuple(labels),
        "started_at": start,
        "duration_s": (end - start).total_seconds() if start and end else None,
        "tokens_in": _sum(s.tokens_in for s in calls),
        "tokens_out": _sum(s.tokens_out for s in calls),
        "cost_usd": _sum(s.cost_usd for s in calls),
        "extra": extra | ({"trace": first.name} if first.kind not in ("llm", "tool") and first.name else {}),
        "flags": flags,
    }


def _user(message: JSON) -> bool:
    return message.get("role") in ("user", "human")


def _sum(values: Iterable[Any]) -> Any:
    """None where one is not known: a part of a sum is no sum."""
    known = list(values)
    return sum(known) if known and None not in known else None


def _attach(event: Span, span: Span | None) -> None:
    """What a log record says of the span that it was written in."""
    if span is None:
        return
    if event.prompt:
        span.prompt = (span.prompt or []) + event.prompt
    if event.answers:
        span.answers = (span.answers or []) + event.answers
    if event.prompt or event.answers:
        span.kind = "llm"


def _above(span: Span, by_id: dict[tuple[str, str], Span]) -> Iterator[Span]:
    """The spans around this one, inside out; a loop in the parents ends it."""
    seen = {span.id}
    while span.parent and span.parent not in seen and (parent := by_id.get((span.trace, span.parent))):
        seen.add(parent.id)
        yield parent
        span = parent


def _common(span: Span) -> JSON:
    extra = dict(span.extra) | {"span": span.id}
    if span.model:
        extra["model"] = span.model
    for key in ("tokens_in", "tokens_out", "cost_usd"):
        if (value := getattr(span, key)) is not None:
            extra[key] = value
    return {"ts_start": span.start, "ts_end": span.end, "source_offset": span.offset, "extra": extra}


def _calls(calls: list[Span], tools: list[Span], flags: list[str]) -> list[JSON]:
    if not any(span.answers or span.prompt for span in calls):
        raise Bad("no_content", NO_CONTENT)
    steps: list[JSON] = []
    before: list[JSON] = []
    waiting = list(tools)
    for i, span in enumerate(calls):
        prompt = span.prompt or []
        if span.prompt is None:
            flags.append("no_observations")
        new, reset = _new(prompt, before)
        step = _seen(new, prompt)
        if span.answers:
            # Alone in the conversation: the prompt may quote earlier answers, which are no decisions of this step.
            said = _chat.split([span.answers[0]], "answer")[0]
            step |= {
                k: said[k] for k in said if k not in ("messages", "observation_kind", "context_hash", "screenshot")
            }
        elif span.error is not None:
            step |= {"action": "", "action_valid": False, "action_error": span.error}
        else:
            raise Bad("no_content", f"call {i} of a model has no answer; {NO_CONTENT}")
        extra = step.pop("extra", {}) | (common := _common(span)).pop("extra")
        if reset:
            extra["context_reset"] = True
        if len(span.answers or []) > 1:
            extra["choices"] = (span.answers or [])[1:]
        if span.error is not None:
            step["action_error"] = span.error
        later = calls[i + 1].start if i + 1 < len(calls) else None
        mine, waiting = _before(waiting, later, i + 1 == len(calls))
        if mine:
            extra["tools"] = [_told(tool) for tool in mine]
            if failed := [tool.error for tool in mine if tool.error is not None]:
                step["action_error"] = "; ".join(failed)
        steps.append(step | common | {"extra": extra})
        before = prompt
        if i + 1 == len(calls) and any("result" in (tool.tool or {}) or tool.error is not None for tool in mine):
            results = [_result(tool) for tool in mine]
            steps.append(_seen(results, prompt + results) | {"is_final_observation": True})
    return steps


def _before(tools: list[Span], time: datetime | None, last: bool) -> tuple[list[Span], list[Span]]:
    """Tools that began before the next call of the model, and the rest."""
    if last:
        return tools, []
    mine, rest = [], []
    for tool in tools:
        (mine if tool.start and time and tool.start < time else rest).append(tool)
    return mine, rest


def _new(prompt: list[JSON], before: list[JSON]) -> tuple[list[JSON], bool]:
    """(what a prompt adds to the one before, whether it did not continue that one)."""
    if not before:
        return prompt, False
    if prompt[: len(before)] != before:
        return prompt, True
    added = prompt[len(before) :]
    if added and added[0].get("role") in _chat.ASSISTANT:  # the answer that was logged as such
        added = added[1:]
    return added, False


def _seen(new: list[JSON], prompt: list[JSON]) -> JSON:
    said: list[JSON] = []
    shots: list[JSON] = []
    for i, message in enumerate(new):
        text, pictures = _chat.content_text(message.get("content"), f"prompt[{i}].content")
        said.append({**message, "content": text})
        shots += pictures
    step: JSON = {"messages": to_json(said), "observation_kind": "messages"}
    step["context_hash"] = hashlib.sha256(to_json(prompt).encode()).hexdigest()
    return step | ({"screenshot": shots[-1]} if shots else {})


def _told(tool: Span) -> JSON:
    told = {"span": tool.id, "name": tool.name, **(tool.tool or {})}
    return told | ({"error": tool.error} if tool.error is not None else {})


def _result(tool: Span) -> JSON:
    called = tool.tool or {}
    result = called.get("result", tool.error)
    said: JSON = {"role": "tool", "content": result if type(result) is str else to_json(result)}
    return said | ({"tool_call_id": called["id"]} if called.get("id") else {})


def _tools(tools: list[Span], flags: list[str]) -> list[JSON]:
    """A step for each tool of a trace without calls of a model; it saw what the tool before gave back."""
    if not any("arguments" in (tool.tool or {}) or "result" in (tool.tool or {}) for tool in tools):
        raise Bad("no_content", NO_CONTENT)
    flags.append("no_model_calls")
    steps: list[JSON] = []
    seen = ""
    for tool in tools:
        called = tool.tool or {}
        name, args = called.get("name") or tool.name or "tool", called.get("arguments")
        step: JSON = {"observation": seen, "observation_kind": "text", "action": call_text(name, args)}
        step |= {
            "action_name": name,
            "action_grammar": "tool_call",
            "action_args": args if type(args) is dict else None,
        }
        steps.append(step | {"action_error": tool.error} | _common(tool))
        seen = _result(tool)["content"]
    if (tools[-1].tool or {}).get("result") is not None:
        steps.append({"observation": seen, "observation_kind": "text", "is_final_observation": True})
    return steps
