"""browser-use: histories of today and of 2024, conversations of three versions, message lists, and the real files."""

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs._adapters import Sample
from offline_lm.logs.browser_use import SOURCE, detect, read
from offline_lm.store import Store
from offline_lm.store.media import Media
from offline_lm.store.rows import convert
from offline_lm.types import Label, Rejected

PNG = b"\x89PNG\r\n\x1a\n"
PROMPT = (
    "<agent_history>\n</agent_history>\n<agent_state>\n<user_request>\nFind a red mug.\n</user_request>\n"
    "<step_info>Step{} maximum:{}</step_info>\n</agent_state>\n<browser_state>\nCurrent tab: 45AB\nAvailable tabs:\n"
    "Tab 45AB: https://shop.example/ - Shop\n\n[3]<button aria-label=Search />\n</browser_state>\n"
)
ELEMENT = {
    "node_id": 7, "backend_node_id": 3, "frame_id": None, "node_type": 1, "node_value": "", "node_name": "BUTTON",
    "attributes": {"role": "button", "aria-label": "Search"}, "x_path": "html/body/button", "element_hash": 1,
    "stable_hash": 2, "bounds": None, "ax_name": "Search",
}  # fmt: skip
TAB = {"url": "https://shop.example/", "title": "Shop", "tab_id": "45AB"}


def item(n, actions, results, *, elements=(None,), limit=30) -> dict[str, Any]:
    output = {"evaluation_previous_goal": "Fine.", "memory": "m", "next_goal": "g", "action": actions, "thinking": "t"}
    return {
        "model_output": output,
        "result": results,
        "state": {
            "tabs": [TAB],
            "screenshot_path": f"/home/someone/agent/screenshots/step_{n}.png",
            "interacted_element": list(elements),
            "url": "https://shop.example/",
            "title": "Shop",
        },
        "metadata": {"step_start_time": 1000.0 + n, "step_end_time": 1000.5 + n, "step_number": n,
                     "step_interval": None},
        "state_message": PROMPT.format(n, limit),
    }  # fmt: skip


JUDGEMENT = {"reasoning": "long", "verdict": False, "failure_reason": "Wrong mug.", "impossible_task": False}
HISTORY: dict[str, Any] = {
    "history": [
        item(1, [{"input": {"index": 3, "text": "<secret>pw</secret>", "clear": True}}, {"click": {"index": 3}}],
             [{"is_done": False, "long_term_memory": "Typed."}, {"error": "Element 3 is gone"}],
             elements=[ELEMENT, ELEMENT]),
        {"model_output": None, "result": [{"error": "Rate limit reached."}], "state": item(2, [], [])["state"],
         "metadata": None, "state_message": PROMPT.format(2, 30)},
        item(3, [{"done": {"text": "It is $9.", "success": True, "files_to_display": []}}],
             [{"is_done": True, "success": True, "extracted_content": "It is $9.", "judgement": JUDGEMENT,
               "images": [{"name": "a.png", "data": base64.b64encode(PNG).decode()}]}]),
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The rows of an episode, as the store makes them: pictures kept first."""
    media = Media(Store.create(tmp_path_factory.mktemp("media") / "store"))
    return lambda episode: convert(media.episode(episode), "i")


def write(folder, value, name="agent_history.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value, indent=2))
    return folder / name


def one(path, **options) -> Any:
    (record,) = logs.read(SOURCE, path, **options)
    return record


def test_a_history(tmp_path, stored):
    (tmp_path / "run" / "screenshots").mkdir(parents=True)
    (tmp_path / "run" / "screenshots" / "step_1.png").write_bytes(PNG)
    got = one(write(tmp_path / "run", HISTORY))
    assert (got.dataset, got.native_id, got.goal) == ("run", "run/agent_history", "Find a red mug.")
    assert (got.terminated, got.truncated, got.end_reason) == (True, False, "agent_stop")
    assert (got.success, got.outcome_reward, got.self_reported_success) == (None, None, True)
    assert got.final_answer == "It is $9."
    assert got.labels == (Label(kind="judge", name="verdict", value=0.0, reason="Wrong mug."),)
    assert got.quality_flags == ("unlabelled",)
    assert got.started_at == datetime(1970, 1, 1, 0, 16, 41, tzinfo=UTC)
    assert (got.duration_s, got.tokens_in) == (2.5, None)
    first, second, third = got.steps
    texts = ('input(index=3, text="<secret>pw</secret>", clear=true)', "click(index=3)")
    assert (first.action, first.sub_actions) == ("; ".join(texts), texts)
    assert (first.action_name, first.action_args["text"]) == ("input", "<secret>pw</secret>")
    assert first.target == {"ref": "3", "tag": "BUTTON", "role": "button", "text": "Search"}
    assert first.thought == "t\nFine.\nm\ng"
    assert json.loads(first.response) == HISTORY["history"][0]["model_output"]
    assert (first.action_error, first.action_valid) == ("Element 3 is gone", None)
    assert (first.url, first.title, first.observation) == ("https://shop.example/", "Shop", PROMPT.format(1, 30))
    assert first.extra["interacted_element"] == [ELEMENT, ELEMENT]
    assert (first.screenshot["status"], third.screenshot["status"]) == ("ok", "missing")
    assert (second.action, second.response, second.action_valid) == ("", None, False)
    assert second.action_error == "Rate limit reached."
    assert (third.action_name, third.terminated, third.reward) == ("done", True, None)
    assert third.extra["result"][0]["images"][0]["sha256"].startswith("4c4b6a3be1314ab8")
    assert "judgement" not in third.extra["result"][0]
    stored(got)


def test_a_history_without_prompts(tmp_path, stored):
    history = [step | {"state_message": None} for step in HISTORY["history"]]
    got = one(write(tmp_path, {"history": history}), goal="Find it", model="m", dataset="d")
    assert (got.goal, got.model, got.dataset) == ("Find it", "m", "d")
    assert got.quality_flags == ("unlabelled", "no_observations")
    assert got.steps[0].observation == "url: https://shop.example/\ntitle: Shop\ntab: https://shop.example/"
    stored(got)


def test_how_a_history_ends(tmp_path):
    click = [{"click": {"index": 3}}]
    runs = {
        "limit": ([item(30, click, [{}])], (False, True, "step_limit")),
        "open": ([item(2, click, [{}])], (None, None, "unknown")),
        "failed": (HISTORY["history"][:2], (None, None, "agent_error")),
    }
    for name, (history, end) in runs.items():
        got = one(write(tmp_path / name, {"history": history}))
        assert (got.terminated, got.truncated, got.end_reason) == end
        assert (got.steps[-1].terminated, got.steps[-1].truncated) == end[:2]


def test_a_screenshot_is_only_looked_for_beside_the_log(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    step = item(1, [{"wait": {"seconds": 3}}], [{}])
    for name in (str(tmp_path / "secret.png"), "../secret.png", "..", "C:\\x\\..", "\0", ""):
        step["state"]["screenshot_path"] = name
        (made,) = one(write(tmp_path / "run", {"history": [step]})).steps
        assert made.screenshot is None or made.screenshot["status"] == "missing"


@pytest.mark.parametrize(
    ("output", "action", "valid"),
    [
        ({"current_state": {"memory": "m"}, "action": [{"go_back": {}}]}, "go_back()", None),
        ({"action": [{"go_back": None}]}, "go_back()", None),
        ({"action": [{"wait": 3, "click": None}]}, "wait(3)", None),
        ({"action": [{}]}, "", False),
        ({"action": []}, "", False),
        ({"action": {"done": {"text": "x"}}}, 'done(text="x")', None),
    ],
)
def test_outputs(tmp_path, output, action, valid, stored):
    got = one(write(tmp_path, {"history": [item(1, [], [{}]) | {"model_output": output}]}))
    assert (got.steps[0].action, got.steps[0].action_valid) == (action, valid)
    stored(got)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_output": []}, "wrong_type"),
        ({"model_output": {"action": 3}}, "wrong_type"),
        ({"model_output": {"action": ["x"]}}, "wrong_type"),
        ({"result": "x"}, "wrong_type"),
        ({"result": [{"images": 3}]}, "wrong_type"),
        ({"state": {"url": 3}}, "wrong_type"),
        ({"state": {"items": [{"depth": "x"}]}, "state_message": None}, "wrong_type"),
        ({"metadata": {"step_start_time": 1e300}}, "out_of_range"),
    ],
)
def test_what_is_rejected(tmp_path, change, reason):
    got = one(write(tmp_path, {"history": [HISTORY["history"][0] | change]}))
    assert isinstance(got, Rejected)
    assert got.reason == reason


def test_an_empty_history(tmp_path):
    assert one(write(tmp_path, {"history": []})).reason == "no_steps"
    assert one(write(tmp_path, {"messages": []})).reason == "missing_key"


# --- conversations ------------------------------------------------------------------------------------------

OUTPUT = {"current_state": {"memory": "m"}, "action": [{"click": {"index": 3}}]}
DONE = {"memory": "m", "action": [{"done": {"text": "It is $9.", "success": False}}]}


def test_conversations_of_2024(tmp_path, stored):
    folder = tmp_path / "runs" / "mug"
    folder.mkdir(parents=True)
    seen = "3:<button>Search</button>\n, Url history: ['data:,', 'https://shop.example/'], User input: it's 'red'"
    reply = {"action": "click", "params": {"text": None, "id": 3}, "goal": "Search.", "valuation_previous_goal": "OK"}
    for n, answer in ((0, json.dumps(reply)), (2, "I cannot.")):
        prompt = f"system: \n  You act.\nuser: Your task is:  find a mug.\nuser: Current interactive elements: {seen}"
        (folder / f"conversation_{n}.txt").write_text(f"{prompt}\n\n\nModel output:\n{answer}")
    (folder / "current_state_3.html").write_text("<p>Done</p>")
    got = one(tmp_path)
    assert (got.dataset, got.native_id, got.goal) == ("runs", "mug", "find a mug.")
    assert got.quality_flags == ("unlabelled", "missing_steps")
    assert (got.terminated, got.truncated, got.end_reason) == (None, None, "unknown")
    first, second, final = got.steps
    assert (first.action, first.action_name, first.target) == ("click(id=3)", "click", {"ref": "3"})
    assert (first.thought, first.url) == ("OK\nSearch.", "https://shop.example/")
    assert first.observation == f"Current interactive elements: {seen}"
    assert (second.action, second.response, second.action_valid) == (None, "I cannot.", False)
    assert (final.is_final_observation, final.observation) == (True, "<p>Done</p>")
    stored(got)


def test_conversations_of_2025(tmp_path, stored):
    older = (
        ' SystemMessage \nYou act.\n\n HumanMessage \nYour ultimate task is: """Find a mug.""". If you achieved it, '
        "stop.\n\n HumanMessage \nCurrent url: https://shop.example/\n[3]<button>\n\n RESPONSE\n"
    )
    newer = f" system \nYour request stands in <user_request>.\n\n user \n{PROMPT.format(1, 30)}\n\n"
    (tmp_path / "conversation_1.txt").write_text(older + json.dumps(OUTPUT, indent=2))
    (tmp_path / "conversation_06a-b_1.txt").write_text(newer + json.dumps(OUTPUT, indent=2))
    (tmp_path / "conversation_06a-b_2.txt").write_text(newer + json.dumps(DONE, indent=2))
    write(tmp_path, HISTORY)
    records: list[Any] = list(logs.read(SOURCE, tmp_path))
    history, new, old = records
    assert history.final_answer == "It is $9."
    assert (old.goal, old.steps[0].url, old.steps[0].action) == (
        "Find a mug.", "https://shop.example/", "click(index=3)",
    )  # fmt: skip
    assert old.steps[0].observation == "Current url: https://shop.example/\n[3]<button>"
    assert new.native_id == f"{tmp_path.name}/06a-b"
    assert (new.goal, new.end_reason, new.self_reported_success, new.final_answer) == (
        "Find a red mug.", "agent_stop", False, "It is $9.",
    )  # fmt: skip
    assert [(s.url, s.title) for s in new.steps] == [("https://shop.example/", "Shop")] * 2
    for episode in (history, new, old):
        stored(episode)


def test_conversations_that_cannot_be_read(tmp_path):
    (tmp_path / "conversation_1.txt").write_bytes(b"user: \xff")
    assert one(tmp_path).reason == "invalid_utf8"
    (tmp_path / "conversation_1.txt").write_bytes(b"")
    assert one(tmp_path).reason == "no_actions"


# --- message lists ------------------------------------------------------------------------------------------


def message_lists(folder, *replies, **meta):
    write(folder, {"id": "Shop--0", "question": "Find a mug.", "source": "webvoyager"} | meta, "meta.json")
    for n, reply in enumerate(replies, 1):
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}}
        user = {"role": "user", "content": [{"type": "text", "text": PROMPT.format(n, 30)}, image]}
        messages = [{"role": "system", "content": "You act."}, user, *([reply] if reply else [])]
        write(folder / f"step_{n:03}", {"messages": messages}, "messages.json")
    return folder


def test_message_lists_with_replies(tmp_path, stored):
    called = {"id": "1", "type": "function", "function": {"name": "AgentOutput", "arguments": json.dumps(OUTPUT)}}
    call = {"role": "assistant", "content": None, "tool_calls": [called]}
    text = {"role": "assistant", "content": json.dumps(OUTPUT)}
    got = one(message_lists(tmp_path / "runs" / "a", call, text, None, status="timeout", num_steps=8))
    assert (got.task_id, got.goal, got.benchmark) == ("Shop--0", "Find a mug.", "webvoyager")
    assert (got.terminated, got.truncated, got.end_reason) == (False, True, "time_limit")
    assert got.quality_flags == ("unlabelled", "missing_steps")
    assert [s.action for s in got.steps] == ["click(index=3)", "click(index=3)", None]
    assert [s.is_final_observation for s in got.steps] == [False, False, True]
    assert [(s.url, s.screenshot["mime"]) for s in got.steps] == [("https://shop.example/", "image/png")] * 3
    assert "base64" not in got.steps[0].observation
    stored(got)


def test_message_lists_without_replies(tmp_path):
    got = one(message_lists(tmp_path / "a", None, None))
    assert (got.reason, got.message[:22]) == ("no_actions", "2 prompts and no reply")
    write(tmp_path / "a" / "step_002", {"messages": [1]}, "messages.json")
    assert one(tmp_path / "a").message.startswith("step_002/messages.json: ")


# --- all of them --------------------------------------------------------------------------------------------


def test_detect(tmp_path):
    assert detect(Sample(write(tmp_path, HISTORY)))
    assert detect(Sample(write(tmp_path, {"history": [{"action": 1}]}, "other.json"))) is None
    assert detect(Sample(write(tmp_path, [1], "list.json"))) is None
    assert detect(Sample(message_lists(tmp_path / "lists", None)))
    assert detect(Sample(tmp_path)) is None
    (tmp_path / "conversation_1.txt").write_text("")
    assert detect(Sample(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no history"):
        list(read(tmp_path / "empty"))


def cut(data):
    return st.tuples(st.integers(0, len(data)), st.binary(max_size=3)).map(
        lambda at: data[: at[0]] + at[1] + data[at[0] + 1 :]
    )


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(st.binary(max_size=60), cut(json.dumps(HISTORY).encode())),
    st.one_of(st.binary(max_size=60), cut(f" user \n{PROMPT}\n RESPONSE\n{json.dumps(DONE)}".encode())),
    st.one_of(st.binary(max_size=60), cut(json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode())),
)
def test_garbage(tmp_path_factory, stored, history, conversation, messages):
    folder = tmp_path_factory.mktemp("fuzz")
    for name, data in (
        ("agent_history.json", history), ("talk/conversation_1.txt", conversation),
        ("lists/meta.json", history), ("lists/step_001/messages.json", messages),
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)
    for got in read(folder):
        assert isinstance(got, Rejected) or stored(got)


def test_the_real_files(shared_data, stored):
    """Four episodes and 36 steps: 4 steps of a history, 29 of a conversation; the last two episodes are 3 prompts,
    whose replies were not kept, and go to quarantine."""
    records: list[Any] = list(logs.read(SOURCE, shared_data / "browser-use"))
    history, conversation, *prompts = records
    assert stored(history).n_steps == 4
    assert [s.action_name for s in history.steps] == ["search_google", "click_element", "click_element", "done"]
    assert (history.end_reason, history.self_reported_success, history.success) == ("agent_stop", None, None)
    assert [s.screenshot["mime"] for s in history.steps] == ["image/png"] * 4
    assert history.steps[0].thought == "Unknown\nSearch for 'elon musk' on Google."  # valuation_previous_goal
    assert history.steps[3].observation.splitlines()[0].strip().startswith('[0] <span class="mw-page-title-main">')
    assert stored(conversation).n_steps == 29
    assert (conversation.end_reason, conversation.terminated, conversation.truncated) == ("unknown", None, None)
    assert conversation.goal.startswith("find a flight from Zürich")
    assert {s.action_name for s in conversation.steps[:-1]} == {
        "ask_user", "search_google", "click", "text_input", "go_back",
    }  # fmt: skip
    assert conversation.steps[28].url.startswith("https://www.ebookers.ch/Flights-Search?")
    assert conversation.steps[29].is_final_observation
    assert [(p.reason, p.message.split()[0]) for p in prompts] == [("no_actions", "2"), ("no_actions", "1")]
