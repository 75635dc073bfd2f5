"""Messages to steps and back: what a decision saw, said, thought and did, in the ways that writers log it."""

import base64
import hashlib
from typing import Any

import orjson
import pytest

from offline_lm.logs import _chat, _template
from offline_lm.logs._adapters import numbered
from offline_lm.logs._records import Bad

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 20
USER = {"role": "user", "content": "hi"}
_IS = "the next action I will perform is"


def said(content: Any = None, **keys: Any) -> dict[str, Any]:
    """The step of one assistant message."""
    (step,) = _chat.split([{"role": "assistant", "content": content} | keys])
    return step


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_step_is_an_assistant_message_and_what_came_before_it():
    tool = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    steps = _chat.split([{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, tool])
    assert [orjson.loads(step["messages"]) for step in steps] == [[{"role": "system", "content": "s"}, USER], [tool]]
    assert (steps[0]["response"], steps[0]["action"], steps[0]["action_grammar"]) == ("a", "a", "text")
    assert steps[1]["is_final_observation"]
    assert "response" not in steps[1]


def test_context_messages_of_the_assistant_are_no_decisions():
    ok = {"role": "assistant", "content": "Ok."}
    steps = _chat.split([USER, ok, USER, {"role": "assistant", "content": "go"}], context={1})
    assert len(steps) == 1
    assert orjson.loads(steps[0]["messages"]) == [USER, ok, USER]


def test_the_context_hash_tells_conversations_apart():
    one, two = ([USER, {"role": "assistant", "content": text}, USER, USER, said_a] for text in "xy")
    first, second = _chat.split(one), _chat.split(two)
    assert first[0]["context_hash"] == second[0]["context_hash"]
    assert first[1]["context_hash"] != second[1]["context_hash"]


said_a = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [call("search", '{"query": "mug", "page": 2}')]},
        {"tool_calls": [call("search", {"query": "mug", "page": 2})]},
        {"tool_calls": [{"name": "search", "args": {"query": "mug", "page": 2}}]},
        {"function_call": {"name": "search", "arguments": '{"query": "mug", "page": 2}'}},
        {"content": [{"type": "tool_use", "id": "1", "name": "search", "input": {"query": "mug", "page": 2}}]},
        {"content": '<tool_call>\n{"name": "search", "arguments": {"query": "mug", "page": 2}}\n</tool_call>'},
    ],
)
def test_a_tool_call_is_the_action_however_it_is_logged(message):
    step = said(**message)
    assert step["action"] == 'search(query="mug", page=2)'
    assert (step["action_name"], step["action_args"]) == ("search", {"query": "mug", "page": 2})
    assert step["action_grammar"] == "tool_call"
    assert '"name":' in step["response"]


def test_several_tool_calls_are_one_action_with_parts():
    step = said("Both.", tool_calls=[call("a", "{}"), call("b", "not JSON")])
    assert step["sub_actions"] == ("a()", 'b("not JSON")')
    assert step["action"] == 'a(); b("not JSON")'
    assert step["thought"] == "Both."


@pytest.mark.parametrize(
    ("text", "thought", "action", "grammar", "name"),
    [
        ("plain", None, "plain", "text", None),
        ("Thought:\nI think.\n\nAction:\nclick[Buy Now] ", "I think.", "click[Buy Now]", "react", "click"),
        ("Action: search[x]\nno\nAction: click[y]", "Action: search[x]\nno", "click[y]", "react", "click"),
        ("an Action: inside a line", None, "an Action: inside a line", "text", None),
        ("Action:", None, "Action:", "text", None),
        ("<think> deep </think>\nAction: go", "deep", "go", "react", "go"),
        ("<think>a</think><action>look</action>", "a", "look", "action_tag", "look"),
        ("x <act>click[1]</act> y", "x", "click[1]", "action_tag", "click"),
        ("So the next action I will perform is ```click [12]```.", f"So {_IS}", "click [12]", "webarena", "click"),
        ("my next action will be\n```stop [N/A]``````", "my next action will be", "stop [N/A]", "webarena", "stop"),
        ("```see. next action is ```new_tab``` ```", "```see. next action is", "new_tab", "webarena", "new_tab"),
        ("<tool_call>{broken</tool_call>", None, "<tool_call>{broken</tool_call>", "text", None),
    ],
)
def test_the_command_in_a_text(text, thought, action, grammar, name):
    step = said(text)
    assert step["response"] == text
    assert (step["thought"], step["action"], step["action_grammar"]) == (thought, action, grammar)
    assert step.get("action_name") == name


def test_the_arguments_in_brackets():
    step = said("The next action I will perform is ```type [3] [a b] [1]```")
    assert (step["action_name"], step["action_args"]) == ("type", {"arguments": ["3", "a b", "1"]})
    step = said("Action: stop [a [b]]")  # brackets inside: the name is known, the arguments are not
    assert (step["action_name"], step.get("action_args")) == ("stop", None)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "go", "reasoning_content": "why"},
        {"content": "go", "reasoning": "why"},
        {"content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "go"}]},
        {"content": "<think>why</think>\ngo"},
    ],
)
def test_reasoning_is_part_of_the_response_and_not_of_the_action(message):
    step = said(**message)
    assert (step["response"], step["thought"], step["action"]) == ("<think>why</think>\ngo", "why", "go")


def test_pictures_leave_the_messages():
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    sha256 = hashlib.sha256(PNG).hexdigest()
    shown = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}]
    nested = [{"type": "tool_result", "content": [{"type": "image", "source": {"type": "base64", "data": url}}]}]
    for content in (shown, nested):
        step = _chat.split([{"role": "user", "content": content}, said_a])[0]
        assert step["screenshot"] == {"sha256": sha256, "mime": "image/png", "status": "ok", "data": PNG}
        assert f"[image {sha256}]" in step["messages"]
        assert "base64" not in step["messages"].replace('"base64"', "")
    sound = [{"type": "input_audio", "input_audio": {"data": "UklGR" * 100, "format": "wav"}}]
    assert "UklGR" not in _chat.split([{"role": "user", "content": sound}, said_a])[0]["messages"]


@pytest.mark.parametrize(
    ("message", "reason", "place"),
    [
        ({"content": "x"}, "missing_key", "messages[0].role"),
        ({"role": 3}, "wrong_type", "messages[0].role"),
        ("text", "wrong_type", "messages[0]"),
        ({"role": "user", "content": 3}, "wrong_type", "messages[0].content"),
        ({"role": "user", "content": [{"type": 3}]}, "wrong_type", "messages[0].content[0].type"),
        ({"role": "assistant", "tool_calls": {}}, "wrong_type", "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "missing_key", "messages[0].tool_calls[0].name"),
    ],
)
def test_a_message_of_another_shape_is_refused_by_its_place(message, reason, place):
    with pytest.raises(Bad) as caught:
        _chat.split([message])
    assert caught.value.reason == reason
    assert caught.value.message.startswith(place)


def test_other_keys_of_an_assistant_message_are_kept():
    step = said("a", name="buyer", refusal=None, tool_calls=None)
    assert step["extra"] == {"message": {"name": "buyer"}}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, said_a],
        [USER, said_a, USER],
        [said_a, said_a],
        [USER, {"role": "assistant", "content": "t", "tool_calls": [call("f", '{"x": 1}'), call("g", "bad")]}, USER],
        [USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}],
        [USER, {"role": "assistant", "content": "go", "reasoning_content": "why", "name": "n"}],
    ],
)
def test_join_undoes_split(messages):
    steps = numbered(_chat.split(messages))
    again, decisions = _chat.join(steps)
    assert numbered(_chat.split(again)) == steps
    assert decisions == [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def test_join_says_an_observation_as_the_user():
    steps = numbered([{"observation": "page", "action": "click[1]"}, {"observation": "", "is_final_observation": True}])
    messages, decisions = _chat.join(steps)
    assert [(m["role"], m["content"]) for m in messages] == [("user", "page"), ("assistant", "click[1]"), ("user", "")]
    assert decisions == [1]


def test_a_rendered_template_is_read_back():
    chatml = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu\nv<|im_end|>\n<|im_start|>assistant\n"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u\nv"}]
    assert _template.messages(chatml) == turns
    assert _template.messages(chatml + "a<|im_end|>\n") == [*turns, {"role": "assistant", "content": "a"}]
    assert _template.messages(chatml + "cut") == [*turns, {"role": "assistant", "content": "cut"}]
    llama = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|>"
    assert _template.messages(llama) == [{"role": "user", "content": "u"}]
    assert _template.messages("user: hello") is None
