"""Decoding of recorded DOM events into actions, rule by rule, and the totals over the real demonstrations."""

import copy
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.types import Episode


def read(source, path) -> Iterator[Any]:
    return logs.read(source, path)


def node(ref, tag, *children, **keys):
    return {"ref": ref, "tag": tag, "children": list(children), "id": "", "classes": ""} | keys


PAGE = node(
    1,
    "BODY",
    node(2, "INPUT_text", id="tt", value=""),
    node(3, "LABEL", node(4, "INPUT_checkbox", id="ch0", value=False), node(-1, "t", text="Yes")),
    node(5, "BUTTON", text="Submit", classes="secondary-action"),
    node(6, "SPAN", left=10.4, top=20.6, width=12, height=11),
    focused=True,
)


def find(dom, ref) -> Any:
    return dom if dom["ref"] == ref else next((n for c in dom["children"] if (n := find(c, ref))), None)


class Recorder:
    """Writes states as the recorder of MiniWoB++ does: each event before (1) and after (3) it is handled."""

    def __init__(self):
        self.dom = copy.deepcopy(PAGE)
        self.time = 0
        self.states = [{"time": 0, "action": None, "dom": copy.deepcopy(self.dom)}]

    def event(self, kind, ref=None, timings=(1, 3), **keys):
        for timing in timings:
            self.time += 1
            dom = copy.deepcopy(self.dom)
            if ref is not None:
                find(dom, ref)["recordingTarget"] = True
            self.states.append({"time": self.time, "action": {"type": kind, "timing": timing} | keys, "dom": dom})

    def click(self, ref, x=5, y=5, x2=None, toggles=None):
        self.event("mousedown", ref, x=x, y=y)
        self.event("mouseup", ref, x=x if x2 is None else x2, y=y)
        if toggles is not None:
            find(self.dom, toggles)["value"] ^= True
        self.event("click", ref, x=x if x2 is None else x2, y=y)

    def key(self, ref, code, char=0, value=None, up=True):
        self.event("keydown", ref, keyCode=code, charCode=0)
        if char:
            self.event("keypress", ref, keyCode=char, charCode=char)
        if value is not None:
            find(self.dom, ref)["value"] = value
        if up:
            self.event("keyup", ref, keyCode=code, charCode=0)


@pytest.fixture
def recorder():
    return Recorder()


def demo(tmp_path, states, **keys):
    folder = tmp_path / "first-turk" / "enter-text"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"utterance": "Do it.", "reward": 0.4, "rawReward": 1, "states": states} | keys
    (folder / "enter-text_1.json.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    (result,) = read("miniwob_demos", tmp_path)
    return result


def actions(tmp_path, recorder):
    return [step.action for step in demo(tmp_path, recorder.states).steps[:-1]]


def test_the_episode(tmp_path, recorder):
    recorder.click(6)
    recorder.click(5)
    got = demo(tmp_path, recorder.states, rawReward=0.5, fields={"by": "Ann"})
    assert (got.dataset, got.native_id) == ("first-turk", "first-turk/enter-text/enter-text_1")
    assert (got.task_id, got.task_family, got.benchmark) == ("miniwob/enter-text", "enter-text", "miniwob")
    assert (got.goal, got.policy_kind, got.extra) == (
        "Do it.",
        "human",
        {"fields": {"by": "Ann"}, "reward": 0.4},
    )
    assert (got.outcome_reward, got.raw_reward, got.success, got.duration_s) == (0.5, 0.5, False, 0.012)
    assert [step.reward for step in got.steps] == [0.0, 0.5, None]
    assert [step.terminated for step in got.steps] == [None, True, None]
    assert [step.is_final_observation for step in got.steps] == [False, False, True]
    second = got.steps[1]
    assert (second.action, second.action_name) == ("click(5)", "click")
    assert second.target == {"ref": 5, "tag": "button", "text": "Submit"}
    assert second.extra == {"time_ms": 7, "end_ms": 11}


def test_the_page_as_text_hides_the_recorders_mark(tmp_path, recorder):
    recorder.click(5)
    page = demo(tmp_path, recorder.states).steps[0].observation
    assert page == "\n".join(
        [
            "[1] body",
            "  [2] input_text #tt",
            "  [3] label",
            "    [4] input_checkbox #ch0",
            '    "Yes"',
            '  [5] button .secondary-action "Submit"',
            "  [6] span @10,21 12x11",
        ]
    )


def test_only_events_before_their_handling_count(tmp_path, recorder):
    recorder.event("mousedown", 5, timings=(3,), x=1, y=1)
    recorder.click(5)
    assert actions(tmp_path, recorder) == ["click(5)"]


def test_scroll_counts_after_its_handling_and_runs_are_one(tmp_path, recorder):
    recorder.event("scroll", 1, timings=(2,))
    recorder.event("scroll", 1, timings=(1,))
    recorder.click(5)
    assert actions(tmp_path, recorder) == ["scroll(1)", "click(5)"]


def test_a_click_shows_the_page_before_the_box_toggled(tmp_path, recorder):
    recorder.click(4, toggles=4)
    recorder.click(5)
    first, second, _ = demo(tmp_path, recorder.states).steps
    assert "[4] input_checkbox #ch0\n" in first.observation
    assert "[4] input_checkbox #ch0 checked\n" in second.observation


def test_a_label_and_its_synthetic_click_are_one(tmp_path, recorder):
    recorder.click(3, toggles=4)
    recorder.event("click", 4, x=5, y=5)
    recorder.click(5)
    assert actions(tmp_path, recorder) == ["click(3)", "click(5)"]


def test_four_pixels_are_a_click_five_a_drag(tmp_path, recorder):
    recorder.click(5, x=10, x2=14)
    recorder.click(5, x=10, x2=15)
    recorder.click(None, x=10, x2=30)
    assert actions(tmp_path, recorder) == ["click(5)", "drag(5, 5)", "mouse_drag(10, 5, 30, 5)"]


def test_a_key_held_during_a_click_does_not_cut_it(tmp_path, recorder):
    recorder.event("mousedown", 3, x=5, y=5)
    recorder.key(4, 8, up=False)
    recorder.key(4, 8, up=False)
    recorder.event("mouseup", 3, x=5, y=5)
    recorder.event("click", 3, x=5, y=5)
    recorder.event("click", 4, x=5, y=5)
    recorder.key(4, 8)
    recorder.click(5)
    assert actions(tmp_path, recorder) == ["click(3)", 'press("Backspace", 3)', "click(5)"]


def test_a_lone_mousedown_ends_an_episode(tmp_path, recorder):
    recorder.event("mousedown", 5, timings=(1,), x=1, y=1)
    assert actions(tmp_path, recorder) == ["click(5)"]


def test_a_double_click_takes_back_its_clicks(tmp_path, recorder):
    recorder.click(5)
    recorder.click(4, toggles=4)
    recorder.click(4, toggles=4)
    recorder.event("dblclick", 4, x=5, y=5)
    assert actions(tmp_path, recorder) == ["click(5)", "dblclick(4)"]


@pytest.mark.parametrize(("code", "name"), [(13, "Enter"), (32, "Space")])
def test_a_click_after_enter_or_space_is_the_keys(tmp_path, recorder, code, name):
    recorder.key(5, code, char=code)
    recorder.event("click", 5, x=5, y=5)
    assert actions(tmp_path, recorder) == [f'press("{name}")']


def test_keys_on_a_field_are_one_fill_with_its_value_after(tmp_path, recorder):
    recorder.key(2, 16)
    recorder.key(2, 65, 65, "A")
    recorder.key(2, 66, 98, "Ab")
    recorder.key(2, 8, value="A")
    recorder.key(2, 67, 99, 'A"c')  # what a paste leaves is seen only in the value
    recorder.click(5)
    first, second, _ = demo(tmp_path, recorder.states).steps
    assert first.action == 'fill(2, "A\\"c")'
    assert first.action_args == {"ref": 2, "text": 'A"c', "typed": "Ac"}
    assert "[2] input_text #tt\n" in first.observation
    assert '[2] input_text #tt value="A\\"c"\n' in second.observation


def test_tab_splits_runs_of_keys(tmp_path, recorder):
    recorder.key(2, 65, 97, "a")
    recorder.key(2, 9)
    recorder.key(5, 9)
    assert actions(tmp_path, recorder) == ['fill(2, "a")', 'press("Tab")', 'press("Tab")']


def test_keys_that_leave_no_value(tmp_path, recorder):
    recorder.key(2, 49, 49)
    recorder.event("keydown", 2, keyCode=40, charCode=0)
    recorder.key(2, 40)
    recorder.event("keydown", 2, keyCode=17, charCode=0)
    recorder.key(2, 65)
    recorder.key(2, 17)
    assert actions(tmp_path, recorder) == ['type(2, "1")', 'press("ArrowDown", 2)', 'press("Control+a")']


def test_a_click_beside_the_page(tmp_path, recorder):
    recorder.click(None, x=70, y=8)
    assert actions(tmp_path, recorder) == ["mouse_click(70, 8)"]


def test_a_page_numbered_anew_at_the_end_keeps_its_refs(tmp_path, recorder):
    recorder.click(5)

    def renumber(n):
        return n | {"ref": n["ref"] + 20, "children": [renumber(c) for c in n["children"]]}

    quiet = demo(tmp_path, recorder.states, rawReward=-1)
    assert (quiet.end_reason, quiet.truncated, quiet.terminated) == ("unknown", None, True)
    recorder.states[-1]["dom"] = renumber(recorder.states[-1]["dom"])
    got = demo(tmp_path, recorder.states, rawReward=-1)
    assert got.steps[-1].observation == got.steps[0].observation
    assert (got.end_reason, got.truncated, got.terminated) == ("env_done", False, True)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"states": []}, "no_steps"),
        ({"states": [{"time": 0, "action": None, "dom": PAGE}]}, "no_steps"),
        ({"states": None}, "missing_key"),
        ({"states": [3]}, "wrong_type"),
        ({"states": [{"time": 0, "dom": {"tag": "BODY"}}]}, "bad_node"),
        ({"states": [{"time": 0, "dom": PAGE, "action": {"type": "click", "timing": 1}}]}, "missing_key"),
        ({"rawReward": "1"}, "wrong_type"),
        ({"utterance": 5}, "wrong_type"),
    ],
)
def test_what_is_rejected(tmp_path, keys, reason):
    record = demo(tmp_path, **({"states": []} | keys))
    assert record.reason == reason
    assert record.message


def test_files_that_are_not_demonstrations(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[]")
    (tmp_path / "b.json").write_bytes(b"{")
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b"x" * 9999)[:20])
    assert [record.reason for record in read("miniwob_demos", tmp_path)] == [
        "not_an_object",
        "json_truncated",
        "damaged_file",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        list(read("miniwob_demos", tmp_path / "empty"))


def count(folder):
    counts = Counter()
    for record in read("miniwob_demos", folder):
        if isinstance(record, Episode):
            kind = "success" if record.success else "partial" if (record.raw_reward or 0) > 0 else "failure"
            counts += Counter({"steps": len(record.steps) - 1, kind: 1})
            for step in record.steps[:-1]:
                assert step.observation is not None
                assert "recordingTarget" not in step.observation
                if step.target is not None:
                    assert f"[{step.target['ref']}]" in step.observation
        else:
            counts[record.reason] += 1
    return counts


REAL = {
    "2017-09-29_first-turk": {"steps": 1039, "success": 273},
    "2017-10-16_second-turk": {"steps": 3241, "success": 764, "no_steps": 4},
    "2017-10-26_third-turk": {"steps": 142, "success": 11, "partial": 3, "failure": 6},
    "2017-11-05_fourth-turk": {
        "steps": 13993, "success": 1764, "partial": 310, "failure": 628, "no_steps": 98
    },
}  # fmt: skip


def test_the_real_totals_are_those_of_the_card():
    """The card counts rewards of all 3,861 files; 102 of them hold no action: 91 no state, 11 the first page
    only.

    Of the 102, 59 have reward 1, 9 a part of it, and 23 + 11 none.
    """
    total = sum((Counter(counts) for counts in REAL.values()), Counter())
    assert total["success"] + 59 == 2871
    assert total["partial"] + 9 == 322
    assert total["failure"] + 23 + 11 == 668
    assert total["no_steps"] == 91 + 11


@pytest.mark.parametrize("collection", REAL)
def test_real_demonstrations(shared_data, collection):
    assert count(shared_data / "miniwob-demos" / collection) == REAL[collection]
