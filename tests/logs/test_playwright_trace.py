"""Playwright traces of versions 3 to 9: calls that act are steps, snapshots are pages."""

import json
import zipfile
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.logs._adapters import Sample
from offline_lm.logs._records import Bad
from offline_lm.logs.playwright_trace import Snapshot, render
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def options(version: object = 8, **keys):
    return {
        "type": "context-options",
        "version": version,
        "browserName": "chromium",
        "wallTime": 1_700_000_000_000,
    } | keys


def before(call, method: object = "click", start=1.0, page="page@1", **keys):
    return {
        "type": "before",
        "callId": call,
        "class": "Frame",
        "method": method,
        "params": {"selector": "#go"},
        "startTime": start,
        "pageId": page,
        "beforeSnapshot": f"before@{call}",
    } | keys


def snapshot(name, html, main=True, frame="frame@1", url="https://x.com/"):
    keys = {"snapshotName": name, "frameId": frame, "frameUrl": url, "html": html, "isMainFrame": main}
    return {"type": "frame-snapshot", "snapshot": keys}


def page(*children, title="Shop"):
    return ["HTML", {}, ["HEAD", {}, ["TITLE", {}, title], ["STYLE", {}, "p {}"]], ["BODY", {}, *children]]


def rows_of(episode):
    """Its rows, as the store makes them once it has taken the pictures."""
    steps = [
        replace(step, screenshot={k: v for k, v in step.screenshot.items() if k != "data"}) if step.screenshot else step
        for step in episode.steps
    ]
    return rows.convert(replace(episode, steps=tuple(steps)), "i")


def write(tmp_path, *events, name="trace.trace", zip_name="run/trace.zip", **members):
    path = tmp_path / zip_name
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, "\n".join(json.dumps(event) for event in events))
        for member, data in members.items():
            archive.writestr(member.replace("__", "/").replace("_jpeg", ".jpeg"), data)
    return path


def read(path, **keys) -> Any:
    (got,) = logs.read("playwright_trace", path, **keys)
    return got


EVENTS = [
    options(title="shop.spec.ts:3 > buys"),
    {"type": "before", "callId": "c0", "class": "BrowserContext", "method": "newPage", "startTime": 0.5},
    {"type": "before", "callId": "c9", "class": "BrowserContext", "method": "close", "startTime": 9.5},
    {"type": "screencast-frame", "pageId": "page@1", "sha1": "a.jpeg", "timestamp": 0.9},
    before("c1"),
    snapshot("before@c1", page(["BUTTON", {"id": "go", "__playwright_target__": "c1", "class": "big"}, "Go"])),
    snapshot("before@c1", page("an inner frame"), main=False, frame="frame@2"),
    {"type": "input", "callId": "c1", "point": {"x": 3.5, "y": 4}, "box": {"x": 0, "y": 0, "width": 7, "height": 8}},
    {"type": "after", "callId": "c1", "endTime": 2.0, "afterSnapshot": "after@c1"},
    before("c2", "fill", 3.0, params={"selector": "#q", "value": "mug"}, apiName="locator.fill"),
    snapshot(
        "before@c2", page(["INPUT", {"id": "q", "value": "old", "__playwright_value_": "r"}]), url="https://x.com/s"
    ),
    {
        "type": "after",
        "callId": "c2",
        "endTime": 2001.0,
        "error": {"name": "Error", "message": "Timeout 30000ms exceeded."},
        "afterSnapshot": "after@c2",
    },
    snapshot("after@c2", page("Done")),
    before("c3", "evaluateExpression", 4.0),
    {"type": "after", "callId": "c3", "endTime": 5.0},
]


def test_the_episode(tmp_path):
    got = read(write(tmp_path, *EVENTS, resources__a_jpeg=PNG), policy_id="smoke")
    assert isinstance(got, Episode)
    assert (got.dataset, got.native_id, got.policy_id) == (tmp_path.name, "run/trace", "smoke")
    assert (got.goal, got.success, got.outcome_reward, got.terminated, got.truncated) == (None,) * 5
    assert (got.end_reason, got.quality_flags) == ("unknown", ("unlabelled",))
    assert got.started_at is not None
    assert got.started_at.isoformat() == "2023-11-14T22:13:20+00:00"
    assert got.duration_s == 2.0
    assert got.extra == {
        "version": 8,
        "title": "shop.spec.ts:3 > buys",
        "browserName": "chromium",
        "other_calls": {"newPage": 1, "close": 1, "evaluateExpression": 1},
    }
    first, second, final = got.steps
    assert (first.action, first.action_name) == ('click(selector="#go")', "click")
    assert (first.url, first.title, first.observation_kind) == ("https://x.com/", "Shop", "dom")
    assert first.observation == 'button id="go"\n  "Go"'
    assert first.target == {
        "ref": "#go",
        "point": {"x": 3.5, "y": 4},
        "box": {"x": 0, "y": 0, "width": 7, "height": 8},
    }
    assert first.screenshot is not None
    assert (first.screenshot["status"], first.screenshot["mime"]) == ("ok", "image/png")
    assert (first.reward, first.action_error) == (None, None)
    assert second.action == 'fill(selector="#q", value="mug")'
    assert second.observation == 'input id="q" value="r"'
    assert second.action_error == "Timeout 30000ms exceeded."
    assert (final.is_final_observation, final.observation, final.action) == (True, '"Done"', None)
    assert rows_of(got).n_steps == 2


def test_a_missing_picture_and_a_missing_snapshot(tmp_path):
    got = read(write(tmp_path, EVENTS[0], EVENTS[3], before("c1")))
    assert got.steps[0].screenshot["status"] == "missing"
    assert got.steps[0].observation is None
    assert got.steps[0].observation_error == "no snapshot was recorded before this call"
    assert rows_of(got).n_steps == 1


def test_version_3_has_one_event_for_a_call(tmp_path):
    metadata = {
        "id": "c1",
        "type": "Frame",
        "method": "goto",
        "params": {"url": "https://x.com/"},
        "startTime": 1,
        "endTime": 2,
        "pageId": "page@1",
        "apiName": "page.goto",
        "snapshots": [{"title": "before", "snapshotName": "b"}, {"title": "after", "snapshotName": "a"}],
        "error": {"error": {"message": "net::ERR"}},
    }
    events = [options(3), {"type": "action", "metadata": metadata}]
    got = read(write(tmp_path, *events, snapshot("b", page("Before")), snapshot("a", page("After"))))
    step, final = got.steps
    assert (step.action, step.observation, step.action_error) == ('goto(url="https://x.com/")', '"Before"', "net::ERR")
    assert step.extra == {"call_id": "c1", "api": "page.goto"}
    assert final.observation == '"After"'


def test_version_9_names_calls_and_files(tmp_path):
    """Snapshots say their call and phase, calls say no page and no snapshot, pictures are named by their file."""

    def at(phase, call, html):
        keys = {"callId": call, "phase": phase, "pageId": "page@1", "frameId": "f", "frameUrl": "u", "html": html}
        return {"type": "frame-snapshot", "snapshot": keys | {"isMainFrame": True}}

    def call(name, start):
        gone = ("pageId", "beforeSnapshot")
        return {key: value for key, value in before(name, "tap", start).items() if key not in gone}

    def taken(kind, name, phase):
        return {"type": kind, "callId": name, "phase": phase, "pageId": "page@1", "timestamp": 1, "file": f"r/{kind}"}

    path = write(
        tmp_path,
        options(9),
        {"type": "screencast-frame", "pageId": "page@1", "file": "resources/a.jpeg", "timestamp": 0.5},
        call("c1", 1),
        at("before", "c1", page("One")),
        at("after", "c1", page("Two")),
        call("c2", 2),
        taken("aria-snapshot", "c2", "before"),
        taken("screenshot", "c2", "before"),
        taken("screenshot", "c2", "after"),
        at("after", "c2", page("Three")),
        resources__a_jpeg=PNG,
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("r/aria-snapshot", '- button "Go"')
    got = read(path)
    assert [(s.observation, s.observation_kind) for s in got.steps] == [
        ('"One"', "dom"),
        ('- button "Go"', "axtree"),
        ('"Three"', "dom"),
    ]
    assert [s.screenshot and s.screenshot["status"] for s in got.steps] == ["ok", "missing", None]


def test_the_runners_own_calls_are_no_steps(tmp_path):
    path = write(tmp_path, *EVENTS[:5], name="0-trace.trace")
    with zipfile.ZipFile(path, "a") as archive:
        runner = before("pw:api@1", "click") | {"class": "Test"}
        archive.writestr(
            "test.trace", json.dumps(runner) + "\n" + json.dumps({"type": "error", "message": "it failed"})
        )
    got = read(path)
    assert [step.action_name for step in got.steps] == ["click"]
    assert got.extra["errors"] == ["it failed"]


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([options(10_000)], "unsupported_version"),
        ([options(2)], "unsupported_version"),
        ([options("8")], "wrong_type"),
        ([before("c1")], "missing_key"),
        ([options()], "no_steps"),
        ([options(), before("c1", 5)], "wrong_type"),
        ([options(), {"type": "after"}], "missing_key"),
        ([options(), 7], "wrong_type"),
        ([options(), before("c1"), snapshot("before@c1", [[1, 0]])], "bad_node"),
        ([options(), before("c1"), snapshot("before@c1", [[0, 0]])], "bad_node"),
        ([options(), before("c1"), snapshot("before@c1", 3)], "bad_node"),
    ],
)
def test_what_is_rejected(tmp_path, events, reason):
    got = read(write(tmp_path, *events))
    assert isinstance(got, Rejected)
    assert got.reason == reason
    assert got.sha256


def test_a_broken_line_and_a_zip_that_is_none(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("trace.trace", b"{\n")
    assert read(path).reason == "json_truncated"
    path.write_bytes(b"PK nothing")
    assert read(path).reason == "damaged_file"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../trace.trace", b"{}")
    assert read(path).reason == "path_traversal"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", b"{}")
    assert read(path).reason == "missing_key"


def snapshots(*pages):
    return [Snapshot({"html": html}) for html in pages]


def test_references_count_nodes_as_the_viewer_does():
    """Children before parents, texts too, references not. [[2, 1]] is the second node of two snapshots before."""
    first = ["BODY", {}, ["P", {}, "one"], ["A", {}, "two"]]  # 0 "one", 1 P, 2 "two", 3 A, 4 BODY
    second = ["BODY", {}, [[1, 3]], ["P", {}, "three"]]  # 0 "three", 1 P, 2 BODY
    third = ["BODY", {}, [[2, 1]], [[1, 1]], [[1, 2]]]
    pages = snapshots(first, second, third)
    assert render(pages, 1)[0] == 'a\n  "two"\n"three"'
    assert render(pages, 2)[0] == '"one"\n"three"\na\n  "two"\n"three"'


def test_references_that_multiply_are_bounded():
    doubling = [["DIV", {}, [[1, 0]], [[1, 0]]] for _ in range(60)]
    with pytest.raises(Bad, match="multiply") as caught:
        render(snapshots(["DIV", {}], *doubling), 60)
    assert caught.value.reason == "too_large"


def test_a_page_1000_elements_deep_is_no_recursion():
    html = "deep"
    for _ in range(900):
        html = ["DIV", {"role": "group"}, html]
    text, _ = render(snapshots(html), 0)
    assert text.count("\n") == 900


def test_marks_of_the_recorder_are_dropped():
    attributes = {"__playwright_target__": "c1", "__playwright_scroll_top_": "9", "__playwright_checked_": "true"}
    html = ["INPUT", attributes | {"style": "x", "aria-label": "Agree"}]
    assert render(snapshots(html), 0)[0] == 'input checked="true" aria-label="Agree"'


def test_detect(tmp_path):
    detect = logs.format_of("playwright_trace").detect
    assert detect(Sample(write(tmp_path, *EVENTS)))
    assert detect(Sample(write(tmp_path, *EVENTS, zip_name="run/b.zip", name="0-trace.trace")))
    assert detect(Sample(write(tmp_path, *EVENTS, zip_name="run/c.zip", name="data.json"))) is None
    (tmp_path / "d.zip").write_bytes(b"PK\x03\x04")
    assert detect(Sample(tmp_path / "d.zip")) is None
    assert detect(Sample(tmp_path)) is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_events_crash_it(tmp_path, data):
    good = "\n".join(json.dumps(event) for event in EVENTS).encode()
    at = data.draw(st.integers(0, len(good)))
    junk = data.draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"null", b"[]", b"7", b'""', b"-1e9"])))
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("trace.trace", good[:at] + junk + good[at + data.draw(st.integers(0, 8)) :])
    assert isinstance(read(path), Episode | Rejected)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, len(EVENTS) - 1),
    st.sampled_from("type callId method params startTime endTime pageId point error snapshot wallTime sha1".split()),
    st.sampled_from([None, True, 0, -1, 2.5, 1e300, "x", [], {}, [[[]]], {"error": {"message": 3}}]),
)
def test_no_value_crashes_it(tmp_path, which, key, value):
    events = [event | {key: value} if i == which else event for i, event in enumerate(EVENTS)]
    got = read(write(tmp_path, *events, zip_name="x.zip"))
    assert isinstance(got, Episode | Rejected)
    if isinstance(got, Episode):
        rows_of(got)


def test_the_real_traces(shared_data):
    """The card counts no steps, for the calls are a test's and not an agent's: 1 + 2 of them act on a page."""
    new, old, future = logs.read("playwright_trace", shared_data / "playwright-trace")
    assert isinstance(new, Episode)
    assert isinstance(old, Episode)
    assert isinstance(future, Rejected)
    assert future.reason == "unsupported_version"
    assert "10000" in future.message
    assert [s.action_name for s in new.steps] == ["goto", None]
    assert (new.extra["version"], new.extra["other_calls"]) == (6, {"newPage": 1})
    assert (new.steps[1].url, new.steps[1].title) == ("https://playwright.dev/", "Playwright")
    assert new.steps[1].observation is not None
    assert new.steps[1].observation.startswith('div id="__docusaurus"\n')
    assert [s.action for s in old.steps] == [
        'setContent(html="<button>Submit</button>", waitUntil="load")',
        'click(selector="internal:role=button", strict=true)',
        None,
    ]
    assert old.steps[1].target == {"ref": "internal:role=button", "point": {"x": 36.74, "y": 18.48}}
    assert old.steps[1].observation == 'button\n  "Submit"'
    assert old.steps[1].screenshot is not None
    assert old.steps[1].screenshot["mime"] == "image/jpeg"
    for episode in (new, old):
        assert orjson.dumps(episode.extra)
        assert rows_of(episode).n_steps == len(episode.steps) - 1
