"""Online-Mind2Web result folders: sentences as actions, pictures before or after them, and the real submissions."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs._adapters import Sample
from offline_lm.logs.online_mind2web import SOURCE, detect, read
from offline_lm.store import Store
from offline_lm.store.media import Media
from offline_lm.store.rows import convert
from offline_lm.types import Episode, Label, Rejected

RECORD: dict[str, Any] = {
    "task_id": "0a1b",
    "task": "Find a red mug.",
    "final_result_response": "It is $9.",
    "result_status": "success",
    "action_history": ["Navigate to https://shop.example/", "Click at (600, 47.5)", 'Type "red mug"', "Press ENTER"],
    "thoughts": ["", "Search for it.", "Search for it.", "Search for it."],
}
PNG = b"\x89PNG\r\n\x1a\n"


def write(folder, record, pictures=()):
    (folder / "trajectory").mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(record, indent=4))
    for number, data in pictures:
        (folder / "trajectory" / f"{number}_full_screenshot.png").write_bytes(PNG + data)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The rows of an episode, as the store makes them: pictures kept first."""
    media = Media(Store.create(tmp_path_factory.mktemp("media") / "store"))
    return lambda episode: convert(media.episode(episode), "i")


def one(folder) -> Any:
    (record,) = logs.read(SOURCE, folder)
    return record


def test_a_submission(tmp_path, stored):
    got = one(write(tmp_path / "run" / "0a1b", RECORD))
    assert (got.dataset, got.native_id, got.task_id, got.goal) == ("run", "0a1b", "0a1b", "Find a red mug.")
    assert (got.terminated, got.truncated, got.end_reason) == (True, False, "agent_stop")
    assert (got.success, got.self_reported_success, got.outcome_reward) == (None, None, None)
    assert got.final_answer == "It is $9."
    assert got.quality_flags == ("unlabelled", "no_observations")
    assert got.extra == {"result_status": "success"}
    assert [(s.action_name, s.action_args) for s in got.steps] == [
        ("navigate", {"url": "https://shop.example/"}),
        ("click", {"x": 600.0, "y": 47.5}),
        ("type", {"text": "red mug"}),
        ("press", {"key": "ENTER"}),
    ]
    assert [s.thought for s in got.steps] == [None, *["Search for it."] * 3]
    assert {(s.reward, s.response, s.observation, s.screenshot) for s in got.steps} == {(None, None, "", None)}
    assert [s.terminated for s in got.steps] == [None, None, None, True]
    stored(got)


@pytest.mark.parametrize(
    ("text", "name", "args"),
    [
        ("Scroll (delta_x=0, delta_y=-400)", "scroll", {"delta_x": 0.0, "delta_y": -400.0}),
        ("Navigate back", "navigate", {"to": "back"}),
        ("Navigate to about:blank", "navigate", {"url": "about:blank"}),
        ("Hover at (95, 280)", "hover", {"x": 95.0, "y": 280.0}),
        ("Drag from (88, 590) to (225, 590)", "drag", {"x1": 88.0, "y1": 590.0, "x2": 225.0, "y2": 590.0}),
        ("Select picker sp_1 -> Select option(s) [3]", "select", {"ref": "sp_1", "option": "Select option(s) [3]"}),
        ("Select picker sp_10 -> CANCEL", "select", {"ref": "sp_10", "option": "CANCEL"}),
        ("Slider (horizontal) set to 30 [range 18-85]", "slider",
         {"orientation": "horizontal", "value": 30.0, "range": "18-85"}),
        ("Press CONTROL+a", "press", {"key": "CONTROL+a"}),
        ('Type "12023"', "type", {"text": "12023"}),
        ('<input type="text"> City -> TYPE: Rome', "type", {"text": "Rome"}),
        ("[a] Sort By -> CLICK", "click", {}),
        ("think hard", None, None),
    ],
)  # fmt: skip
def test_actions(tmp_path, text, name, args):
    (step,) = one(write(tmp_path / "x", RECORD | {"action_history": [text], "thoughts": ["t"]})).steps
    assert (step.action, step.action_name, step.action_args) == (text, name, args)


def shots(episode):
    return [step.screenshot and step.screenshot["sha256"] for step in episode.steps]


def test_pictures_numbered_from_1_show_the_page_after(tmp_path, stored):
    # Three actions of one call share the picture after the last of them, and saw the one before the call.
    got = one(write(tmp_path / "x", RECORD, [(1, b"home"), (2, b"hits"), (3, b"hits"), (4, b"hits")]))
    seen = shots(got)
    assert len(got.steps) == 5
    assert got.steps[-1].is_final_observation
    assert seen[0] is None
    assert seen[1] == seen[2] == seen[3] != seen[4]
    stored(got)


def test_the_same_picture_under_another_thought_is_another_call(tmp_path):
    record = RECORD | {"thoughts": ["a", "b", "c", "d"]}
    seen = shots(one(write(tmp_path / "x", record, [(1, b"1"), (2, b"2"), (3, b"2"), (4, b"3")])))
    assert len(set(seen)) == 4
    assert seen[2] == seen[3]


def test_pictures_numbered_from_0_show_the_page_before(tmp_path, stored):
    pictures = [(i, bytes([i])) for i in range(5) if i != 2]
    got = one(write(tmp_path / "x", RECORD, pictures))
    assert [s.screenshot["status"] for s in got.steps] == ["ok", "ok", "missing", "ok", "ok"]
    assert [s.is_final_observation for s in got.steps] == [False] * 4 + [True]
    stored(got)


@pytest.mark.parametrize(
    ("status", "end"),
    [
        ("error_max_turns", (False, True, "step_limit")),
        ("error_during_execution", (None, None, "agent_error")),
        ("odd", (None, None, "unknown")),
        (None, (True, False, "agent_stop")),
    ],
)
def test_ends(tmp_path, status, end):
    got = one(write(tmp_path / "x", RECORD | {"result_status": status}))
    assert (got.terminated, got.truncated, got.end_reason) == end
    assert (got.steps[-1].terminated, got.steps[-1].truncated) == end[:2]


def test_no_status_and_no_answer_is_an_unknown_end(tmp_path):
    got = one(write(tmp_path / "x", RECORD | {"result_status": None, "final_result_response": ""}))
    assert (got.terminated, got.truncated, got.end_reason, got.final_answer) == (None, None, "unknown", None)


def test_thoughts_that_do_not_match_are_kept_apart(tmp_path):
    got = one(write(tmp_path / "x", RECORD | {"thoughts": ["a", "b"]}))
    assert "length_mismatch" in got.quality_flags
    assert got.extra["thoughts"] == ["a", "b"]
    assert {s.thought for s in got.steps} == {None}


def test_a_judge_is_a_label(tmp_path):
    got = one(write(tmp_path / "x", RECORD | {"judge": {"score": 100, "reasoning": "found it"}}))
    assert got.labels == (Label(kind="judge", name="score", value=100.0, reason="found it"),)
    assert got.success is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"action_history": None}, "outcome_only"),
        ({"action_history": [], "final_result_response": ""}, "no_steps"),
        ({"action_history": "Click"}, "wrong_type"),
        ({"action_history": [3], "thoughts": None}, "wrong_type"),
        ({"thoughts": [1, 2, 3, 4]}, "wrong_type"),
        ({"task": None}, "missing_key"),
        ({"judge": 1}, "wrong_type"),
        ({"result_status": 1}, "wrong_type"),
    ],
)
def test_what_is_rejected(tmp_path, change, reason):
    got = one(write(tmp_path / "x", RECORD | change))
    assert isinstance(got, Rejected)
    assert got.reason == reason


def test_the_list_of_tasks(tmp_path):
    folder = write(tmp_path / "x", RECORD)
    listed = [{"task_id": "0a1b", "website": "https://www.shop.example/", "level": "easy", "reference_length": 4}]
    (tmp_path / "tasks.json").write_text(json.dumps(listed))
    (got,) = logs.read(SOURCE, folder, tasks=str(tmp_path / "tasks.json"))
    assert isinstance(got, Episode)
    assert (got.site, got.start_url) == ("www.shop.example", "https://www.shop.example/")
    assert got.extra == {"result_status": "success", "level": "easy", "reference_length": 4}
    for wrong in ("{}", "[1]", '[{"website": "https://["}]', "["):
        (tmp_path / "tasks.json").write_text(wrong)
        with pytest.raises(UserError, match=r"Online_Mind2Web\.json"):
            list(logs.read(SOURCE, folder, tasks=str(tmp_path / "tasks.json")))


def test_an_action_without_words_is_kept(tmp_path):
    (step,) = one(write(tmp_path / "x", RECORD | {"action_history": [None], "thoughts": ["t"]})).steps
    assert (step.action, step.action_valid) == ("", False)


def test_detect(tmp_path):
    folder = write(tmp_path / "x", RECORD)
    assert detect(Sample(folder / "result.json"))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "result.json").write_bytes(b'{"task": 1}')
    assert detect(Sample(tmp_path / "y" / "result.json")) is None
    assert detect(Sample(folder)) is None
    with pytest.raises(UserError, match=r"result\.json"):
        list(logs.read(SOURCE, folder / "trajectory"))


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.tuples(st.integers(0, 400), st.binary(max_size=3)).map(
            lambda cut: (data := json.dumps(RECORD).encode())[: cut[0]] + cut[1] + data[cut[0] + 1 :]
        ),
        st.fixed_dictionaries({key: st.sampled_from([None, 1, "a", [], [1], ["a"], {}, {"score": "x"}])
                               for key in (*RECORD, "judge")}).map(lambda value: json.dumps(value).encode()),
    )
)  # fmt: skip
def test_garbage(tmp_path_factory, stored, data):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "result.json").write_bytes(data)
    for got in read(folder):
        assert isinstance(got, Rejected) or stored(got)


def test_the_real_submissions(shared_data, stored):
    folder = shared_data / "online-mind2web"
    counts: Counter[Any] = Counter()
    ids = set()
    for got in logs.read(SOURCE, folder, tasks=str(folder / "Online_Mind2Web.json")):
        if isinstance(got, Rejected):
            counts[got.reason] += 1
            counts["judge 100" if "score 100)" in got.message else got.message] += 1
            continue
        assert isinstance(got, Episode)
        rows = stored(got)
        ids.add(rows.episode_id)
        counts["steps"] += rows.n_steps
        counts[got.extra["result_status"], got.end_reason, got.truncated, got.steps[rows.n_steps - 1].truncated] += 1
        counts["labelled"] += got.success is not None or got.outcome_reward is not None
        counts["actions not taken apart"] += sum(s.action_name is None for s in got.steps if not s.is_final_observation)
        counts["pictures"] += sum((s.screenshot or {}).get("status") == "lfs_pointer" for s in got.steps)
        counts["sites"] += got.site is not None
        counts["final observations"] += got.steps[-1].is_final_observation
        assert got.dataset == "abp"
    zero = next(key for key in counts if type(key) is str and "score 0)" in key)
    assert counts.pop(zero) == 4
    assert len(ids) == 161
    assert counts == {
        "steps": 3172,
        "outcome_only": 161,
        "judge 100": 157,
        ("success", "agent_stop", False, False): 146,
        ("error_max_turns", "step_limit", True, True): 15,
        # Three episodes have pictures, 24 + 14 + 21: none before the first action, one after the last.
        "final observations": 3,
        "sites": 161,
        "pictures": 59,
        "labelled": 0,
        "actions not taken apart": 0,
    }


def test_a_real_episode_sees_what_came_before(shared_data):
    folder = shared_data / "online-mind2web" / "abp" / "0059adc6b12a3822305deb68929b2de8"
    episode = one(folder)
    seen = shots(episode)
    assert [s and s[:4] for s in seen[:6]] == [None, "0a69", "0a69", "0a69", "a159", "0041"]
    assert seen[12:15] != seen[13:16]
    assert (len(seen), seen[-1][:4]) == (25, "1956")
