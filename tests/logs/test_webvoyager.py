"""WebVoyager conversations: replies taken apart, clipped observations, pictures, ends; and the real runs."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs._adapters import Sample
from offline_lm.logs.webvoyager import MESSAGES, SOURCE, detect, read
from offline_lm.store import Store
from offline_lm.store.media import Media
from offline_lm.store.rows import convert
from offline_lm.types import Episode, Rejected

PNG = b"\x89PNG\r\n\x1a\n"
TASK = "Now given a task: Find a red mug.  Please interact with https://shop.example/ and get the answer. \n"
ASKS = (
    "Observation:{} please analyze the attached screenshot and give the Thought and Action. I've provided the tag "
    "name of each element and the text it contains (if text exists).\n"
)
OMITTED = "Observation: A screenshot and some texts. (Omitted in context.)"
FAILED = "The action you have chosen cannot be exected. Please double-check if you have selected the wrong label."
ELEMENTS = '[0]: <button> "Menu";\t[16]: <input> "Search";\t[17]: "Mugs", "All mugs";'


def user(text, picture=True):
    if not picture:
        return {"role": "user", "content": text}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,{b64_img}"}}
    return {"role": "user", "content": [{"type": "text", "text": text}, image]}


def reply(action, thought="I see."):
    return {"role": "assistant", "content": f"Thought: {thought}\n\nAction: {action}"}


SYSTEM = {"role": "system", "content": "Imagine you are a robot browsing the web."}
RUN = [
    SYSTEM,
    user(TASK + OMITTED, picture=False),
    reply("Type [16]; red mug"),
    user(ASKS.format("note: it may not be a textbox.") + ELEMENTS),
    reply("Click [17] (to see the mugs)"),
    user(ASKS.format("") + ELEMENTS),
    reply("ANSWER; It is $9 [see the page].\n1. Red"),
]


def write(folder, messages, name="taskShop--3"):
    task = folder / "20241118" / name
    task.mkdir(parents=True)
    (task / MESSAGES).write_text(json.dumps(messages, indent=2))
    return task


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The rows of an episode, as the store makes them: pictures kept first."""
    media = Media(Store.create(tmp_path_factory.mktemp("media") / "store"))
    return lambda episode: convert(media.episode(episode), "i")


def one(path, **options) -> Any:
    (record,) = logs.read(SOURCE, path, **options)
    return record


def test_a_run(tmp_path, stored):
    task = write(tmp_path, RUN)
    (task / "screenshot1.png").write_bytes(PNG + b"1")
    got = one(tmp_path)
    assert (got.dataset, got.native_id, got.task_id, got.site) == (
        "20241118", "20241118/taskShop--3", "Shop--3", "Shop",
    )  # fmt: skip
    assert (got.goal, got.start_url) == ("Find a red mug.", "https://shop.example/")
    assert (got.terminated, got.truncated, got.end_reason) == (True, False, "agent_stop")
    assert (got.success, got.self_reported_success, got.outcome_reward) == (None, None, None)
    assert got.final_answer == "It is $9 [see the page].\n1. Red"
    assert got.quality_flags == ("unlabelled", "omitted_observations")
    assert got.extra == {"system_prompt": SYSTEM["content"]}
    first, second, third = got.steps
    assert (first.observation, first.screenshot["status"]) == (None, "ok")
    assert first.screenshot["path"] == task / "screenshot1.png"
    assert (first.action, first.thought, first.action_args) == (
        "Type [16]; red mug", "I see.", {"ref": "16", "text": "red mug"},
    )  # fmt: skip
    assert second.observation == "note: it may not be a textbox.\n" + ELEMENTS
    assert second.screenshot["status"] == "removed"
    assert (second.action, second.action_name, second.action_args) == (
        "Click [17] (to see the mugs)", "click", {"ref": "17"},
    )  # fmt: skip
    assert second.target == {"ref": "17", "tag": None, "text": "Mugs"}
    assert second.response == "Thought: I see.\n\nAction: Click [17] (to see the mugs)"
    assert (third.observation, third.observation_kind) == (ELEMENTS, "text")
    assert [s.terminated for s in got.steps] == [None, None, True]
    assert {s.reward for s in got.steps} == {None}
    stored(got)


@pytest.mark.parametrize(
    ("action", "name", "args"),
    [
        ("Click 9", "click", {"ref": "9"}),
        ("Type [2]; [Baked Salmon]", "type", {"ref": "2", "text": "Baked Salmon"}),
        ("Scroll WINDOW; down", "scroll", {"ref": "WINDOW", "direction": "down"}),
        ("Scroll [4]; [up]", "scroll", {"ref": "4", "direction": "up"}),
        ("GoBack.", "goback", {}),
        ("Wait", "wait", {}),
        ("Google", "google", {}),
        ("Restart", "restart", {}),
        ("ANSWER; [42]", "answer", {"text": "42"}),
        ("Hover [3]", None, None),
    ],
)
def test_commands(tmp_path, action, name, args):
    (step,) = one(write(tmp_path, [SYSTEM, user(TASK + ASKS.format("") + ELEMENTS), reply(action)])).steps
    assert (step.action, step.action_name, step.action_args) == (action, name, args)
    assert step.action_valid is (name is not None)


def test_what_the_runner_says_of_a_failed_action(tmp_path, stored):
    messages = [*RUN[:3], user(FAILED, picture=False), {"role": "assistant", "content": "Action: Click [1]"},
                user("Format ERROR: Both 'Thought' and 'Action' should be included in your reply.", picture=False),
                {"role": "assistant", "content": None}, *RUN[3:5]]  # fmt: skip
    got = one(write(tmp_path, messages))
    assert [s.action_error and s.action_error[:10] for s in got.steps] == ["The action", "Format ERR", None, None]
    assert [(s.action, s.action_valid) for s in got.steps] == [
        ("Type [16]; red mug", True), (None, False), ("", False), ("Click [17] (to see the mugs)", True),
    ]  # fmt: skip
    assert got.steps[1].observation == FAILED
    assert got.steps[1].screenshot is None
    assert got.steps[1].response == "Action: Click [1]"
    stored(got)


def test_openwebvoyager(tmp_path):
    asks = "Observation:{} please analyze the attached Accessibility Tree & screenshot and give the Thought and Action."
    tree = "[1] RootWebArea 'Shop' focused: true\n\t[12] link 'Mugs'"
    messages = [
        SYSTEM,
        user(TASK + asks.format("") + f" I've provided the Accessibility Tree and Screenshot.\n{tree}\nScreenshot:\n"),
        reply("Click [12]"),
        user(asks.format(FAILED) + f"\n{tree}\nScreenshot:\n"),
        reply("Restart"),
    ]
    first, second = one(write(tmp_path, messages)).steps
    assert (first.observation, first.observation_kind) == (tree, "axtree")
    assert first.target == {"ref": "12", "role": "link", "text": "Mugs"}
    assert first.action_error == FAILED
    assert second.observation == f"{FAILED}\n{tree}"


def test_an_omitted_tree_is_read_from_its_file(tmp_path, stored):
    omitted = user(TASK + "Observation: An accessibility tree. (Omitted in context.)", picture=False)
    task = write(tmp_path, [SYSTEM, omitted, reply("Wait"), omitted, reply("ANSWER; 1")])
    (task / "accessibility_tree2.txt").write_text("[1] RootWebArea 'Shop'\n")
    got = one(task)
    first, second = got.steps
    assert (first.observation, first.screenshot) == (None, None)
    assert first.observation_error == "An accessibility tree. (Omitted in context.)"
    assert (second.observation, second.observation_kind) == ("[1] RootWebArea 'Shop'", "axtree")
    stored(got)
    (task / "accessibility_tree2.txt").write_bytes(b"\xff")
    assert one(task).reason == "invalid_utf8"


def test_the_step_limit(tmp_path):
    messages = [SYSTEM, *[m for _ in range(15) for m in (user(ASKS.format("") + ELEMENTS), reply("Click [16]"))]]
    task = write(tmp_path, messages)
    got = one(task)
    assert (got.terminated, got.truncated, got.end_reason) == (False, True, "step_limit")
    assert (got.steps[-1].terminated, got.steps[-1].truncated) == (False, True)
    got = one(task, max_iter=20)
    assert (got.terminated, got.truncated, got.end_reason) == (None, None, "unknown")


def test_a_last_observation_without_a_reply(tmp_path, stored):
    got = one(write(tmp_path, RUN[:-1]))
    assert (got.terminated, got.truncated, got.end_reason) == (None, None, "agent_error")
    assert [s.is_final_observation for s in got.steps] == [False, False, True]
    assert got.steps[-1].observation == ELEMENTS
    stored(got)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"{}", "wrong_type"),
        (b"[", "json_truncated"),
        (b"[1]", "wrong_type"),
        (b'[{"role": "user"}]', "wrong_type"),
        (b'[{"content": "x"}]', "missing_key"),
        (b'[{"role": "user", "content": "x"}]', "no_steps"),
        (b'[{"role": "assistant", "content": 3}]', "wrong_type"),
        (b"\xff", "invalid_utf8"),
    ],
)
def test_what_is_rejected(tmp_path, data, reason):
    (tmp_path / MESSAGES).write_bytes(data)
    got = one(tmp_path)
    assert isinstance(got, Rejected)
    assert got.reason == reason


def test_detect(tmp_path):
    task = write(tmp_path, RUN)
    assert detect(Sample(task))
    assert detect(Sample(task / MESSAGES))
    assert detect(Sample(tmp_path)) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=MESSAGES):
        list(read(tmp_path / "empty"))


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.tuples(st.integers(0, 2500), st.binary(max_size=3)).map(
            lambda cut: (data := json.dumps(RUN).encode())[: cut[0]] + cut[1] + data[cut[0] + 1 :]
        ),
        st.lists(
            st.fixed_dictionaries({
                "role": st.sampled_from(["user", "assistant", "system", "tool", None]),
                "content": st.sampled_from([
                    None, "", "Thought:Action:", "Thought: a Action: ANSWER; ", TASK, OMITTED, [], [1], [{}],
                    [{"type": "text", "text": "x"}], FAILED,
                ]),
            })
        ).map(lambda value: json.dumps(value).encode()),
    )
)  # fmt: skip
def test_garbage(tmp_path_factory, stored, data):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / MESSAGES).write_bytes(data)
    for got in read(folder):
        assert isinstance(got, Rejected) or stored(got)


def test_the_real_runs(shared_data, stored):
    counts: Counter[Any] = Counter()
    ids = set()
    for got in logs.read(SOURCE, shared_data / "webvoyager"):
        assert isinstance(got, Episode)
        rows = stored(got)
        ids.add(rows.episode_id)
        counts["episodes", got.dataset if got.dataset == "examples" else "baselines"] += 1
        counts["steps"] += rows.n_steps
        counts["answered"] += got.final_answer is not None
        counts["labelled"] += got.success is not None
        counts[got.end_reason, got.terminated, got.truncated] += 1
        counts["goals"] += bool(got.goal and got.start_url)
        for step in got.steps:
            counts["picture", step.screenshot and step.screenshot["status"]] += 1
            counts["omitted"] += step.observation is None
            counts["not valid"] += step.action_valid is not True
            if step.observation is not None:
                assert step.observation.startswith("[")
            if step.action_args and step.action_args.get("ref", "").isdigit() and step.observation:
                counts["target", "text" in (step.target or {})] += 1
    assert len(ids) == 18
    assert counts.pop(("target", True)) > counts.pop(("target", False), 0)
    assert counts == {
        ("episodes", "baselines"): 10,
        ("episodes", "examples"): 8,
        "steps": 105,
        "answered": 16,
        "labelled": 0,
        ("agent_stop", True, False): 16,
        ("step_limit", False, True): 2,
        "goals": 18,
        ("picture", "ok"): 11,
        ("picture", "removed"): 94,
        "omitted": 51,
        "not valid": 0,
    }
