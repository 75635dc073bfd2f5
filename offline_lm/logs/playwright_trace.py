"""Playwright traces: ``trace.zip`` with ``*.trace`` (events, one JSON object a line) and pictures in ``resources/``.

A trace records the calls of a program, be it a test or an agent. A call that acts on a page (`ACTING`: goto, click,
fill, press, ...) is a step; calls that only look or wait are counted in ``extra.other_calls``. The test runner's
own ``test.trace`` repeats the calls of the library and is left out, as is ``trace.network`` (HAR).

- Versions 3 to 9 are read. Version 3 has one ``action`` event for each call, later ones ``before``, ``input`` and
  ``after``. Up to 8 a call names its snapshots, in 9 a snapshot names its call and phase; pictures are named by their
  file in 9, by a hash before. Another version is refused (``unsupported_version``).
- The action is method and parameters, ``click(selector="internal:role=button", strict=true)``, which no version
  spells otherwise; ``target`` has the selector, the point and the box, ``action_error`` what ``after`` says.
- The observation is the snapshot of the main frame before the call, as text: one line for each element that says
  something, indented. Snapshots share subtrees by reference (how many snapshots back, which node in post-order).
  Attributes that the recorder adds are dropped (``__playwright_target__`` marks the element about to be acted on) or
  stand under their own name (value, checked, selected). Where there is none, an ``aria-snapshot`` is taken (version 9,
  kind axtree). The snapshot after the last call is the final observation.
- The screenshot is that of the call, where there is one (version 9), else the screencast's last frame before it.
- Nothing says what the program was to do, nor how it went: no goal, no reward, flag ``unlabelled``. The test's title
  is in ``extra``.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import Sample, call_text, need, numbered, rejected, take
from offline_lm.logs._records import Bad, parse
from offline_lm.logs._zip import Archive
from offline_lm.types import Episode, Rejected

SOURCE = "playwright_trace"
SUFFIXES = (".zip",)
VERSIONS = range(3, 10)
ACTING = frozenset(
    """goto goBack goForward reload setContent close click dblclick tap hover fill type press check uncheck clear
    selectOption selectText setInputFiles setInputFilePaths dragAndDrop focus blur dispatchEvent
    scrollIntoViewIfNeeded keyboardDown keyboardUp keyboardPress keyboardType keyboardInsertText mouseMove mouseDown
    mouseUp mouseClick mouseWheel touchscreenTap""".split()
)
_TRACE = re.compile(r"(?:.*/)?(?:\d+-)?trace\.trace\Z|[^/]*\.trace\Z")
_ON_PAGE = frozenset({"Page", "Frame", "ElementHandle"})
"""Classes whose calls act on a page; close() of a browser does not. Class Test: the runner's account of the calls."""
_FROM_RUNNER = "Test"
MAX_EVENTS = 2_000_000
MAX_TRACE = 128 << 20
"""Bytes of all .trace members together; parsed they take several times as much memory."""

Event = dict[str, Any]


def detect(sample: Sample) -> str | None:
    if sample.is_dir or not sample.name.endswith(SUFFIXES) or not sample.head.startswith(b"PK"):
        return None
    try:
        with Archive(sample.path) as archive:
            return "a zip with a .trace" if any(map(_TRACE.match, archive.names)) else None
    except Bad:
        return "a zip with a .trace" if b"trace.trace" in sample.head else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, dataset: str | None = None, policy_id: str | None = None) -> Iterator[Episode | Rejected]:
    """One Episode or Rejected for each trace.zip at or below `path`.

    `dataset` names the collection (default: the folder of the zip, or the one above for a ``trace.zip``), and
    `policy_id` the program that was traced.
    """
    return (_read_file(file, dataset, policy_id) for file in find(path))


def _read_file(path: Path, dataset: str | None, policy_id: str | None) -> Episode | Rejected:
    sha256 = None
    try:
        with Archive(path) as archive:
            sha256 = _sha256(path)
            fields = _episode(archive)
    except Bad as bad:
        return rejected(SOURCE, path, bad, sha256=sha256)
    stem, folder = path.name.removesuffix(".zip"), path.parent
    collection = folder.parent if stem == "trace" else folder  # Playwright itself writes FOLDER_OF_A_TEST/trace.zip
    return Episode(
        source=SOURCE,
        dataset=dataset or collection.name or None,
        native_id=f"{folder.name}/{stem}" if folder.name else stem,
        policy_id=policy_id,
        uri=str(path),
        sha256=sha256,
        **fields,
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# --- events -------------------------------------------------------------------------------------------------


class Snapshot:
    """A frame at one moment, and the nodes that later snapshots may refer to."""

    def __init__(self, event: Event) -> None:
        self.html = event.get("html")
        self.url: str | None = take(event, "frameUrl", str, "snapshot")

    @cached_property
    def nodes(self) -> list[Any]:
        """Texts and elements, children before their parent; references are not counted, as in Playwright's viewer."""
        nodes: list[Any] = []
        stack = [self.html]
        while stack:  # parents first and children from the last: reversed, that is post-order
            node = stack.pop()
            if type(node) is str:
                nodes.append(node)
            elif type(node) is list and node and type(node[0]) is str:
                nodes.append(node)
                stack += node[2:]
        nodes.reverse()
        return nodes


class _Trace:
    """One .trace member: its calls in order, snapshots by frame and screencast frames by page."""

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self.context: Event = {}
        self.calls: dict[str, Event] = {}
        self.snapshots: dict[str, list[Snapshot]] = {}
        self.named: dict[str, tuple[str, int]] = {}
        """snapshot name -> (frame, index), main frames only"""
        self.pages: dict[str, str] = {}
        """call -> page, where the call itself does not say"""
        self.pictures: dict[str, list[tuple[float, str]]] = {}
        self.files: dict[tuple[str, str], str] = {}
        """(screenshot or aria-snapshot, call) -> the file taken before the call"""
        self.errors: list[str] = []
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                try:
                    self._add(parse(line, refuse_duplicates=False))
                except Bad as bad:
                    raise Bad(bad.reason, f"{name[:80]} line {number}: {bad.message}") from None
            if number > MAX_EVENTS:
                raise Bad("too_large", f"{name[:80]} holds more than {MAX_EVENTS} events")

    def _add(self, event: Any) -> None:
        kind = need(event, "type", str)
        if kind == "context-options":
            if need(event, "version", int) not in VERSIONS:
                raise Bad(
                    "unsupported_version",
                    f"the trace is of version {event['version']}; {VERSIONS[0]} to {VERSIONS[-1]} are read",
                )
            self.context = event
        elif kind == "before":
            self.calls[need(event, "callId", str)] = event
        elif kind == "action":  # version 3, and a few of version 4 that were converted
            call = _of_version_3(need(event, "metadata", dict)) if "metadata" in event else event
            self.calls[need(call, "callId", str)] = call
        elif kind in ("input", "after"):
            if call := self.calls.get(need(event, "callId", str)):  # traces cut at the start have lone ones
                call |= {key: value for key, value in event.items() if key not in ("type", "callId")}
        elif kind == "frame-snapshot":
            self._add_snapshot(need(event, "snapshot", dict))
        elif kind == "screencast-frame":
            file = take(event, "file", str) or f"resources/{need(event, 'sha1', str)}"
            self.pictures.setdefault(need(event, "pageId", str), []).append((need(event, "timestamp", float), file))
        elif kind in ("screenshot", "aria-snapshot"):
            if take(event, "phase", str) == "before":
                self.files[kind, need(event, "callId", str)] = need(event, "file", str)
        elif kind == "error":
            self.errors.append(str(take(event, "message", str))[:1000])

    def _add_snapshot(self, snapshot: Event) -> None:
        frame = need(snapshot, "frameId", str, "snapshot")
        frames = self.snapshots.setdefault(frame, [])
        frames.append(Snapshot(snapshot))
        call, phase = take(snapshot, "callId", str, "snapshot"), take(snapshot, "phase", str, "snapshot")
        name = take(snapshot, "snapshotName", str, "snapshot") or f"{phase}@{call}"
        if take(snapshot, "isMainFrame", bool, "snapshot"):
            self.named.setdefault(name, (frame, len(frames) - 1))
            if call and (page := take(snapshot, "pageId", str, "snapshot")):
                self.pages[call] = page


def _of_version_3(metadata: Event) -> Event:
    call = {
        "callId": need(metadata, "id", str, "metadata"),
        "class": take(metadata, "type", str, "metadata"),
        **{k: metadata.get(k) for k in ("method", "params", "startTime", "endTime", "apiName", "pageId", "point")},
    }
    wrapped = metadata.get("error")
    call["error"] = wrapped.get("error", wrapped) if type(wrapped) is dict else wrapped
    for snapshot in take(metadata, "snapshots", list, "metadata") or ():
        title, name = take(snapshot, "title", str, "snapshot"), take(snapshot, "snapshotName", str, "snapshot")
        call[f"{title}Snapshot"] = name
    return call


def _episode(archive: Archive) -> dict[str, Any]:
    names = sorted(name for name in archive.names if _TRACE.match(name))
    if not names:
        raise Bad("missing_key", "the zip holds no .trace; is it a Playwright trace?")
    traces: list[_Trace] = []
    left = MAX_TRACE
    for name in names:
        data = archive.read(name, left)
        left -= len(data)
        traces.append(_Trace(data, name))
    if not any(trace.context for trace in traces):
        raise Bad("missing_key", "no .trace of the zip begins with context-options, which say its version")
    calls: list[tuple[float, _Trace, Event]] = []
    others: Counter[str] = Counter()
    for trace in traces:
        for call_id, call in trace.calls.items():
            owner = take(call, "class", str, call_id)
            if owner == _FROM_RUNNER:
                continue
            method = need(call, "method", str, call_id)
            if method in ACTING and owner in _ON_PAGE:
                calls.append((take(call, "startTime", float, call_id) or 0.0, trace, call))
            else:
                others[method] += 1
    calls.sort(key=lambda item: item[0])
    steps = [_step(trace, call, archive) for _, trace, call in calls]
    if calls:
        _, trace, call = calls[-1]
        if (page := _page(trace, call, "after")) and page["observation"]:
            steps.append(page | {"is_final_observation": True})
    context = next(trace.context for trace in traces if trace.context)
    wall = take(context, "wallTime", float)
    extra = {
        key: context[key] for key in ("version", "title", "browserName", "sdkLanguage", "options") if key in context
    }
    if others:
        extra["other_calls"] = dict(others)
    if errors := [error for trace in traces for error in trace.errors]:
        extra["errors"] = errors
    return {
        "steps": numbered(steps),
        "started_at": datetime.fromtimestamp(wall / 1000, UTC) if wall and 0 < wall < 1e14 else None,
        "duration_s": _duration([call for _, _, call in calls]),
        "end_reason": "unknown",
        "quality_flags": ("unlabelled",),
        "extra": extra,
    }


def _duration(calls: list[Event]) -> float | None:
    starts = [t for call in calls if (t := take(call, "startTime", float)) is not None]
    ends = [t for call in calls if (t := take(call, "endTime", float))]
    return (max(ends) - min(starts)) / 1000 if starts and ends else None


def _step(trace: _Trace, call: Event, archive: Archive) -> dict[str, Any]:
    place = call["callId"]
    method, params = call["method"], take(call, "params", dict, place) or {}
    error = call.get("error")
    if type(error) is dict:
        error = error.get("message", error.get("error"))
        if type(error) is dict:
            error = error.get("message")
    step: dict[str, Any] = {
        "observation_error": "no snapshot was recorded before this call",
        "action": call_text(method, params),
        "action_name": method,
        "action_args": params,
        "action_grammar": "playwright",
        "action_error": error if type(error) is str else None,
        "extra": {"call_id": place, "api": take(call, "apiName", str, place) or take(call, "title", str, place)},
    }
    target = {key: call[key] for key in ("point", "box") if type(call.get(key)) is dict}
    if type(params.get("selector")) is str:
        target["ref"] = params["selector"]
    if target:
        step["target"] = target
    aria = trace.files.get(("aria-snapshot", place), "")
    if page := _page(trace, call, "before"):
        step |= page | {"observation_error": None}
    elif aria in archive:
        text = archive.read(aria, MAX_TRACE).decode("utf-8", "replace")
        step |= {"observation": text, "observation_kind": "axtree", "observation_error": None}
    if picture := _picture(trace, call):
        there = picture in archive
        step["screenshot"] = _media.of_bytes(archive.read(picture, _media.MAX_IMAGE)) if there else _media.missing()
    return step


def _picture(trace: _Trace, call: Event) -> str | None:
    """The file with what the page looked like before the call."""
    place = call["callId"]
    if file := trace.files.get(("screenshot", place)):
        return file
    page = take(call, "pageId", str, place) or trace.pages.get(place, "")
    started = take(call, "startTime", float, place)
    frames = [file for at, file in trace.pictures.get(page, ()) if started is None or at <= started]
    return frames[-1] if frames else None


# --- a snapshot as text -------------------------------------------------------------------------------------

MAX_NODES = 200_000
"""Nodes that one page may render: references can double a page at every snapshot."""
_SILENT = frozenset({"HEAD", "STYLE", "SCRIPT", "NOSCRIPT", "META", "LINK", "BASE", "SVG", "PATH"})
_SAYS = ("id", "role", "name", "type", "href", "placeholder", "alt", "title", "for", "value", "checked", "selected")
_SAYS += ("disabled", "contenteditable")
_RECORDED = {
    "__playwright_value_": "value",
    "__playwright_checked_": "checked",
    "__playwright_selected_": "selected",
}


def _page(trace: _Trace, call: Event, phase: str) -> dict[str, Any] | None:
    """url, title and text of the snapshot before or after a call, or None if there is none."""
    name = take(call, f"{phase}Snapshot", str, call["callId"]) or f"{phase}@{call['callId']}"
    if name not in trace.named:
        return None
    frame, index = trace.named[name]
    frames = trace.snapshots[frame]
    text, title = render(frames, index)
    return {"url": frames[index].url, "title": title, "observation": text, "observation_kind": "dom"}


def render(snapshots: list[Snapshot], index: int) -> tuple[str, str | None]:
    """(text, title) of a frame's snapshot; `snapshots` are those of its frame, to which it may refer.

    Raises Bad: ``too_large`` beyond MAX_NODES, ``bad_node`` for a reference that leads nowhere.
    """
    lines: list[str] = []
    title: str | None = None
    # (node, the snapshot it stands in, depth, inside what)
    stack: list[tuple[Any, int, int, str]] = [(snapshots[index].html, index, 0, "")]
    count = 0
    while stack:
        node, at, depth, inside = stack.pop()
        count += 1
        if count > MAX_NODES:
            raise Bad("too_large", f"a snapshot renders more than {MAX_NODES} nodes; its references multiply")
        if type(node) is str:
            if inside == "TITLE":
                title = title or node.strip() or None
            elif inside not in _SILENT and (words := " ".join(node.split())):
                lines.append("  " * depth + orjson.dumps(words).decode())
        elif type(node) is list and node and type(node[0]) is str:
            tag = node[0].upper()
            if inside in _SILENT and tag != "TITLE":
                continue
            attributes = _attributes(node[1]) if len(node) > 1 else []
            shown = attributes or tag in ("BUTTON", "INPUT", "SELECT", "TEXTAREA", "A", "LI", "TR", "TD", "H1", "H2")
            if shown and tag not in _SILENT and tag not in ("TITLE", "HTML", "BODY"):
                lines.append("  " * depth + " ".join([tag.lower(), *attributes]))
                depth += 1
            stack += [(child, at, depth, tag) for child in reversed(node[2:])]
        else:
            back, which = _reference(node)
            nodes = snapshots[at - back].nodes if back <= at else []
            if which >= len(nodes):
                raise Bad("bad_node", f"a snapshot refers to node {which} of a snapshot that lacks it")
            stack.append((nodes[which], at - back, depth, inside))
    return "\n".join(lines), title


def _reference(node: Any) -> tuple[int, int]:
    """(snapshots back, node in post-order) of ``[[back, node]]``. Going back 0 could loop."""
    pair = node[0] if type(node) is list and node else None
    if type(pair) is list and len(pair) == 2 and all(type(n) is int for n in pair) and pair[0] > 0 <= pair[1]:
        return pair[0], pair[1]
    raise Bad("bad_node", "a snapshot holds what is neither text, nor an element, nor a reference")


def _attributes(given: Any) -> list[str]:
    if type(given) is not dict:
        return []
    shown: dict[str, str] = {}
    for name, value in given.items():
        key = _RECORDED[name] if name in _RECORDED else name.lower()
        if type(value) is str and (key in _SAYS or key.startswith("aria-")) and (name in _RECORDED or key not in shown):
            shown[key] = value
    return [f"{key}={orjson.dumps(value[:200]).decode()}" for key, value in shown.items()]
