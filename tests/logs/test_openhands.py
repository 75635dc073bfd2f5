"""OpenHands outputs of three generations, written as its evaluation code writes them (no real sample is at hand)."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import openhands
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)


def action(number: int, kind: str, source="agent", **args) -> dict[str, Any]:
    event = {
        "id": number,
        "timestamp": f"2024-11-02T10:00:{number:02}.5",
        "source": source,
        "message": "",
        "action": kind,
    }
    return event | {"args": args}


def answer(number: int, kind: str, content: str, **extras) -> dict[str, Any]:
    event = {"id": number, "source": "agent", "cause": number - 1, "observation": kind, "content": content}
    return event | {"extras": extras}


CALL = {"function_name": "execute_bash", "model_response": {"choices": [{"message": {"content": "Let me look."}}]}}
EVENTS = [
    action(0, "system", content="You are an agent."),
    action(1, "message", "user", content="Fix the bug."),
    answer(2, "agent_state_changed", "", agent_state="running"),
    action(3, "run", command="ls", thought="Look.", hidden=False) | {"tool_call_metadata": CALL},
    answer(4, "run", "a.py", metadata={"exit_code": 0}),
    action(5, "browse_interactive", browser_actions='click("7")', thought=""),
    answer(
        6,
        "browse",
        "A page",
        url="http://x/1",
        screenshot=base64.b64encode(PNG).decode(),
        last_browser_action_error="no such element",
    ),
    action(7, "edit", path="a.py"),
    answer(8, "error", "ERROR: no such file"),
    action(9, "finish", outputs={}, thought="Done.", message="All good"),
]
METADATA = {
    "agent_class": "CodeActAgent",
    "llm_config": {"model": "gpt-4o", "api_key": "**********", "temperature": 0.0},
    "max_iterations": 30,
    "dataset": "swe-bench-lite",
}


def run(history: list[Any], **keys) -> dict[str, Any]:
    about = {"instance_id": "django-1", "instruction": "Fix the bug.", "metadata": METADATA, "error": None}
    costs = {"accumulated_cost": 0.25, "accumulated_token_usage": {"prompt_tokens": 90, "completion_tokens": 9}}
    return about | {"history": history, "test_result": {"git_patch": "diff"}, "metrics": costs} | keys


def stored(episode: Episode) -> rows.Rows:
    """As the store converts it, once it has the pictures."""
    shots = [{k: v for k, v in (s.screenshot or {}).items() if k != "data"} or None for s in episode.steps]
    steps = [replace(step, screenshot=shot) for step, shot in zip(episode.steps, shots, strict=True)]
    return rows.convert(replace(episode, steps=tuple(steps)), "i")


def read(folder, *values: Any) -> list[Any]:
    path = folder / "output.jsonl"
    path.write_bytes(b"\n".join(v if isinstance(v, bytes) else json.dumps(v).encode() for v in values))
    return list(openhands.read(path))


def test_events(tmp_path):
    (episode,) = read(tmp_path, run(EVENTS))
    steps = episode.steps
    assert [s.action_name for s in steps] == ["run", "browse_interactive", "edit", "finish"]
    assert [s.observation for s in steps] == ["Fix the bug.", "a.py", "A page", "ERROR: no such file"]
    assert (steps[0].action, steps[0].thought, steps[0].response) == ('run(command="ls")', "Look.", "Let me look.")
    assert steps[2].url == "http://x/1"
    assert steps[2].screenshot["status"] == "ok"
    assert steps[1].action_error == "no such element"
    assert steps[1].action_valid is None
    assert (steps[2].action_valid, steps[2].action_error) == (False, "ERROR: no such file")
    assert (episode.goal, episode.model, episode.agent) == ("Fix the bug.", "gpt-4o", "CodeActAgent")
    assert (episode.cost_usd, episode.tokens_in, episode.duration_s) == (0.25, 90, 6)
    assert (episode.final_answer, episode.end_reason, episode.terminated) == ("All good", "agent_stop", True)
    assert stored(episode).n_steps == 4


def test_a_patch_alone_is_no_outcome(tmp_path):
    (episode,) = read(tmp_path, run(EVENTS))
    assert (episode.outcome_reward, episode.success) == (None, None)
    assert episode.quality_flags == ("unlabelled",)
    assert {s.reward for s in episode.steps} == {None}


@pytest.mark.parametrize(
    ("keys", "reward"),
    [
        ({"test_result": {"git_patch": "d", "report": {"resolved": True}}}, 1),
        ({"report": {"resolved": False}}, 0),
        ({"test_result": {"reward": 0.5}}, 0.5),
        ({"test_result": {"result": True}}, 1),
        ({"test_result": False}, 0),
        ({"test_result": 1}, 1),
    ],
)
def test_outcomes(tmp_path, keys, reward):
    (episode,) = read(tmp_path, run(EVENTS, **keys))
    assert episode.outcome_reward == reward
    assert episode.success is (reward == 1)
    assert [s.reward for s in episode.steps] == [0, 0, 0, reward]


def test_pairs(tmp_path):
    history = [
        [EVENTS[1], answer(2, "null", "")],
        [EVENTS[3], EVENTS[4]],
        [action(5, "message", content="Which file?", wait_for_response=True), None],
        [action(6, "message", "user", content="a.py"), answer(7, "null", "")],
        [EVENTS[9], answer(10, "null", "")],
    ]
    (episode,) = read(tmp_path, run(history))
    assert [s.action_name for s in episode.steps] == ["run", "message", "finish"]
    assert [s.observation for s in episode.steps] == ["Fix the bug.", "a.py", "a.py"]


def test_events_of_the_sdk(tmp_path):
    text = [{"type": "text", "text": "Fix it."}]
    history = [
        {"kind": "SystemPromptEvent", "source": "agent", "system_prompt": {"type": "text", "text": "S"}},
        {"kind": "MessageEvent", "source": "user", "llm_message": {"role": "user", "content": text}},
        {
            "kind": "ActionEvent",
            "source": "agent",
            "thought": [{"type": "text", "text": "Look."}],
            "action": {"kind": "TerminalAction", "command": "ls"},
            "tool_name": "terminal",
            "tool_call_id": "c1",
            "tool_call": {"id": "c1", "name": "terminal", "arguments": '{"command": "ls"}'},
        },
        {
            "kind": "ObservationEvent",
            "source": "environment",
            "tool_name": "terminal",
            "observation": {"kind": "TerminalObservation", "content": [{"type": "text", "text": "a.py"}]},
        },
        {"kind": "ActionEvent", "source": "agent", "thought": [], "action": None, "tool_name": "edit"},
        {"kind": "AgentErrorEvent", "source": "agent", "error": "bad arguments", "tool_name": "edit"},
        {"kind": "ConversationStateUpdateEvent", "source": "environment", "key": "k", "value": 1},
        {"kind": "ActionEvent", "source": "agent", "thought": [], "action": {"message": "Done"}, "tool_name": "finish"},
    ]
    (episode,) = read(tmp_path, run(history, instruction=None))
    assert [s.observation for s in episode.steps] == ["Fix it.", "a.py", "bad arguments"]
    assert [s.action for s in episode.steps] == ['terminal(command="ls")', "edit()", 'finish(message="Done")']
    assert episode.steps[0].thought == "Look."
    assert episode.steps[1].action_valid is False
    assert (episode.goal, episode.final_answer, episode.end_reason) == ("Fix it.", "Done", "agent_stop")


@pytest.mark.parametrize(
    ("error", "end"),
    [
        ("Agent reached maximum iteration in headless mode", (False, True, "step_limit")),
        ("Evaluation timed out", (False, True, "time_limit")),
        ("AgentStuckInLoopError", (None, None, "agent_error")),
    ],
)
def test_ends(tmp_path, error, end):
    (episode,) = read(tmp_path, run(EVENTS[:5], error=error))
    assert (episode.terminated, episode.truncated, episode.end_reason) == end
    assert episode.steps[1].is_final_observation
    assert episode.steps[0].truncated is end[1]


def test_attempts_at_one_instance_have_other_names(tmp_path):
    assert [e.native_id for e in read(tmp_path, run(EVENTS), run(EVENTS))] == ["django-1", "django-1#2"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"instance_id": "x", "history": [', "json_truncated"),
        (run([]), "outcome_only"),
        (run([EVENTS[0], EVENTS[1]]), "no_steps"),
        (run([3]), "wrong_type"),
        (run([{"kind": "ObservationEvent"}]), "missing_key"),
        ({"history": EVENTS}, "missing_key"),
        (run([action(1, "run") | {"args": "x"}]), "wrong_type"),
        (b"[]", "wrong_type"),
    ],
)
def test_refused(tmp_path, value, reason):
    assert [item.reason for item in read(tmp_path, value)] == [reason]


WHOLE = json.dumps(run(EVENTS)).encode()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE)), length=st.integers(0, 60), junk=st.binary(max_size=12))
def test_damaged_bytes(tmp_path, at, length, junk):
    for item in read(tmp_path, WHOLE[:at] + junk + WHOLE[at + length :]):
        assert isinstance(item, Rejected) or stored(item).n_steps


def test_detect(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(WHOLE)
    (tmp_path / "b.jsonl").write_bytes(b'{"instance_id": 1, "history": []}')
    assert openhands.detect(Sample(tmp_path / "a.jsonl"))
    assert openhands.detect(Sample(tmp_path / "b.jsonl")) is None
