"""SWE-agent trajectories of both generations, their ends, and the totals of the real files."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import swe_agent
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected


def turn(action: str, answer: str, **keys) -> dict[str, Any]:
    text = f"I try.\n```\n{action}\n```"
    return {
        "action": f"{action}\n",
        "observation": answer,
        "response": text,
        "thought": "I try.\n",
        "state": "{}",
    } | keys


OLD = {
    "environment": "swe_main",
    "trajectory": [turn("ls", "a.py", state='{"open_file": "n/a"}'), turn("submit", "")],
    "history": [
        {"role": "system", "content": "You are a programmer.", "agent": "primary"},
        {"role": "user", "content": "A demonstration.", "is_demo": True},
        {"role": "assistant", "content": "Not mine.", "is_demo": True},
        {"role": "user", "content": "Fix the bug.", "agent": "primary"},
        {"role": "assistant", "content": "I try.", "thought": "", "action": "ls"},
    ],
    "info": {"exit_status": "submitted", "submission": "diff", "model_stats": {"instance_cost": 0, "tokens_sent": 0}},
}
NEW = {
    "trajectory": [
        turn(
            "str_replace_editor view /testbed",
            "files",
            state={"working_dir": "/testbed"},
            execution_time=0.5,
            extra_info={},
            query=[
                {"role": "system", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "Fix it."}]},
            ],
        ),
        turn("ls", "a.py", state={"working_dir": "/testbed"}, query=[]),
    ],
    "history": [],
    "info": {
        "exit_status": "submitted (exit_cost)",
        "submission": "diff",
        "model_stats": {"instance_cost": 1.5, "tokens_sent": 900, "tokens_received": 30, "api_calls": 2},
        "edited_files30": "a.py",
    },
    "replay_config": json.dumps({"agent": {"model": {"name": "claude-sonnet"}}}),
    "environment": "main",
}


def read(folder, value: Any, name="django__1.traj") -> Any:
    path = folder / name
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value, indent=1).encode())
    (found,) = swe_agent.read(path)
    return found


def test_old_files(tmp_path):
    episode = read(tmp_path, OLD)
    assert [s.observation for s in episode.steps] == ["Fix the bug.", "a.py"]  # an empty last answer is none
    assert [s.action for s in episode.steps] == ["ls", "submit"]
    assert (episode.steps[0].thought, episode.steps[0].response) == ("I try.", "I try.\n```\nls\n```")
    assert episode.steps[0].extra == {"state": {"open_file": "n/a"}}
    assert (episode.native_id, episode.final_answer, episode.goal) == ("django__1", "diff", "Fix the bug.")
    assert (episode.cost_usd, episode.tokens_in) == (None, None)
    assert episode.extra["system"] == "You are a programmer."


def test_new_files(tmp_path):
    episode = read(tmp_path, NEW)
    assert [s.observation for s in episode.steps] == ["Fix it.", "files", "a.py"]
    assert episode.steps[2].is_final_observation
    assert episode.steps[0].extra["execution_time"] == 0.5
    assert (episode.model, episode.cost_usd, episode.tokens_in, episode.tokens_out) == ("claude-sonnet", 1.5, 900, 30)
    assert (episode.terminated, episode.truncated, episode.end_reason) == (False, True, "step_limit")
    assert episode.extra["info"] == {"edited_files30": "a.py"}


def test_success_is_never_guessed(tmp_path):
    episode = read(tmp_path, OLD)
    assert (episode.outcome_reward, episode.success, episode.self_reported_success) == (None, None, None)
    assert episode.quality_flags == ("unlabelled",)
    assert {s.reward for s in episode.steps} == {None}


@pytest.mark.parametrize(
    ("status", "end"),
    [
        ("submitted", (True, False, "agent_stop")),
        ("exit_context", (False, True, "step_limit")),
        ("submitted (exit_total_execution_time)", (False, True, "time_limit")),
        ("exit_format", (None, None, "agent_error")),
        ("submitted (exit_environment_error)", (None, None, "env_error")),
        ("early_exit", (None, None, "unknown")),
        (None, (None, None, "unknown")),
    ],
)
def test_ends(tmp_path, status, end):
    episode = read(tmp_path, OLD | {"info": {"exit_status": status}})
    assert (episode.terminated, episode.truncated, episode.end_reason) == end
    assert (episode.steps[1].terminated, episode.steps[1].truncated) == end[:2]


def test_a_response_without_a_command(tmp_path):
    episode = read(tmp_path, OLD | {"trajectory": [turn("", "Try again."), turn("ls", "x", state="not JSON")]})
    assert (episode.steps[0].action, episode.steps[0].action_valid) == ("", False)
    assert episode.steps[1].extra == {"state": "not JSON"}


def test_the_folder_of_one_instance_is_not_the_dataset(tmp_path):
    (tmp_path / "gpt4" / "django__1").mkdir(parents=True)
    assert read(tmp_path / "gpt4" / "django__1", OLD).dataset == "gpt4"
    assert read(tmp_path / "gpt4", OLD).dataset == "gpt4"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty_file"),
        (b'{\n"trajectory": [', "json_truncated"),
        ({"trajectory": []}, "no_steps"),
        ({"history": []}, "missing_key"),
        ({"trajectory": [3]}, "wrong_type"),
        ({"trajectory": [turn("ls", "x")], "history": [{}]}, "missing_key"),
        ({"trajectory": [turn("ls", "x") | {"action": 1}]}, "wrong_type"),
    ],
)
def test_refused(tmp_path, value, reason):
    assert read(tmp_path, value).reason == reason


WHOLE = json.dumps(OLD).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE)), length=st.integers(0, 60), junk=st.binary(max_size=12))
def test_damaged_bytes(tmp_path, at, length, junk):
    path = tmp_path / "x.traj"
    path.write_bytes(WHOLE[:at] + junk + WHOLE[at + length :])
    for item in swe_agent.read(path):
        assert isinstance(item, Rejected) or rows.convert(item, "i").n_steps


def test_detect(tmp_path):
    (tmp_path / "a.traj").write_bytes(WHOLE)
    (tmp_path / "b.traj").write_bytes(b'{"trajectory": [1]}')
    assert swe_agent.detect(Sample(tmp_path / "a.traj"))
    assert swe_agent.detect(Sample(tmp_path / "b.traj")) is None


def test_real_files(shared_data):
    found = list(swe_agent.read(shared_data / "swe-agent-traj"))
    whole = [item for item in found if isinstance(item, Episode)]
    assert len(found) == len(whole) == 5
    assert sum(rows.convert(episode, "i").n_steps for episode in whole) == 62
    assert {(e.success, e.end_reason, e.terminated, e.quality_flags) for e in whole} == {
        (None, "agent_stop", True, ("unlabelled",))
    }
    assert {e.native_id: e.final_answer for e in whole}["flash"] == "flag{b3l0w_th3_r4dar}"
    assert all(e.steps[0].observation for e in whole)
