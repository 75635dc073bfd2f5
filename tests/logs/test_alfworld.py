"""ALFWorld episodes of OpenManus-RL: admissible actions, cut actions, ends, and the totals of the real files."""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import alfworld
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected

GAME = "/data/json_2.1.1/train/pick_heat_then_place-Cup-None-SideTable-28/trial_T2019/game.tw-pddl"


def step(number: int, action: str, prompt: str, answer: str, reward=0.0, done=False) -> dict[str, Any]:
    return {
        "step": number,
        "state": {"observation": prompt, "admissible_actions": ["go to desk 1", "take cup 1 from desk 1", "help"]},
        "agent_output": {"raw_response": f"<think>Hm.</think><action>{action}</action>", "action": action},
        "transition": {"reward": reward, "done": done},
        "metadata": {"info": {"extra.gamefile": GAME, "won": done, "observation_text": answer, "is_action_valid": 0}},
    }


def run(*steps: dict[str, Any], success: Any = False, max_steps=2, **keys) -> dict[str, Any]:
    about = {
        "environment": "alfworld",
        "timestamp": "t",
        "config": {"max_steps": max_steps, "seed": 42},
        "version": "1.0",
    }
    total = sum(s["transition"]["reward"] for s in steps)
    return {
        "metadata": about,
        "trajectory": {"steps": list(steps), "total_reward": total, "success": success, "length": len(steps)} | keys,
    }


FIRST = step(1, "go to desk 1", "You see a desk.\n\nYour task is to: heat some cup.\nYour admissible actions", "A cup.")
SECOND = step(2, "take cup 1 from desk 1", "[Observation 1: 'x', Action 1: 'go to desk 1']\nA cup.", "You take it.")


def read(folder, value: Any) -> Any:
    path = folder / "traj_1.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    (found,) = alfworld.read(path)
    return found


def test_admissible_actions_are_complete_candidates(tmp_path):
    episode = read(tmp_path, run(FIRST, SECOND))
    shown = [(c.action, c.executed, c.source) for c in episode.steps[0].candidates]
    assert shown == [
        ("go to desk 1", True, "enumerated"),
        ("take cup 1 from desk 1", False, "enumerated"),
        ("help", False, "enumerated"),
    ]
    assert episode.steps[0].candidates_complete is True
    assert episode.steps[0].action_valid is True
    assert episode.steps[0].extra == {"step": 1, "is_action_valid": 0, "won": False}


def test_steps_and_names(tmp_path):
    episode = read(tmp_path, run(FIRST, SECOND))
    assert [s.action for s in episode.steps] == ["go to desk 1", "take cup 1 from desk 1", None]
    assert (episode.steps[0].thought, episode.steps[0].action_name) == ("Hm.", "go")
    assert episode.steps[2].observation == "You take it."
    assert episode.steps[2].is_final_observation
    assert (episode.goal, episode.native_id, episode.seed) == ("heat some cup", "traj_1", 42)
    assert episode.task_id == "alfworld/pick_heat_then_place-Cup-None-SideTable-28/trial_T2019"
    assert episode.task_family == "pick_heat_then_place"


def test_an_action_outside_the_list_is_not_valid(tmp_path):
    episode = read(tmp_path, run(step(1, "take fork 1", "p", "Nothing happens."), SECOND | {"state": FIRST["state"]}))
    assert episode.steps[0].action_valid is False
    assert not any(c.executed for c in episode.steps[0].candidates)


def test_an_action_that_the_parser_cut_was_not_taken(tmp_path):
    later = step(2, "help", "[Observation 1: 'x', Action 1: 'to desk 1']\nNothing happens.", "")
    episode = read(tmp_path, run(FIRST, later))
    cut = episode.steps[0]
    assert cut.action == "go to desk 1"
    assert cut.extra["sent"] == "to desk 1"
    assert cut.action_valid is False
    assert not any(c.executed for c in cut.candidates)
    assert episode.quality_flags == ("action_not_sent",)
    assert episode.steps[1].action_valid is True


@pytest.mark.parametrize(
    ("second", "success", "max_steps", "end"),
    [
        (SECOND, False, 2, (False, True, "step_limit")),
        (step(2, "help", "p", "", 10.0, True), True, 2, (True, False, "env_done")),
        (step(2, "help", "p", "", 0.0, True), False, 9, (True, False, "env_done")),
        (step(2, "help", "p", "", 0.0, True), False, 2, (False, True, "step_limit")),
        (SECOND, False, 9, (None, None, "unknown")),
    ],
)
def test_ends(tmp_path, second, success, max_steps, end):
    episode = read(tmp_path, run(FIRST, second, success=success, max_steps=max_steps))
    assert (episode.terminated, episode.truncated, episode.end_reason) == end
    assert (episode.steps[1].terminated, episode.steps[1].truncated) == end[:2]


def test_rewards_keep_their_scale(tmp_path):
    episode = read(tmp_path, run(FIRST, step(2, "help", "p", "", 10.0, True), success=True))
    assert [s.reward for s in episode.steps] == [0, 10, None]
    assert episode.outcome_reward == 10
    assert episode.extra["reward_scale"] == 10
    assert episode.success is True


def test_rewards_that_were_not_logged_stay_null(tmp_path):
    value = copy.deepcopy(run(FIRST, SECOND))
    value["trajectory"] |= {"total_reward": None, "success": None}
    for item in value["trajectory"]["steps"]:
        item["transition"]["reward"] = None
    episode = read(tmp_path, value)
    assert episode.steps[0].reward is None
    assert episode.outcome_reward is None
    assert episode.success is None
    assert episode.quality_flags == ("unlabelled",)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty_file"),
        (b'{"metadata": {}, "trajectory": {"steps": [', "json_truncated"),
        ([], "empty_file"),
        (run(), "no_steps"),
        ({"metadata": {}}, "missing_key"),
        (run(step(1, "help", "p", "", 0.0, True), SECOND), "steps_after_end"),
        (run(FIRST | {"state": {"observation": "p", "admissible_actions": [1]}}), "wrong_type"),
        (run(FIRST | {"agent_output": {}}), "missing_key"),
        (run(FIRST, success="yes"), "wrong_type"),
        (run(*[step(i, "help", "p", "", 1e308) for i in (1, 2)], total_reward=0), "json_number"),
    ],
)
def test_refused(tmp_path, value, reason):
    assert read(tmp_path, value).reason == reason


WHOLE = json.dumps(run(FIRST, SECOND)).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE)), length=st.integers(0, 60), junk=st.binary(max_size=12))
def test_damaged_bytes(tmp_path, at, length, junk):
    path = tmp_path / "traj.json"
    path.write_bytes(WHOLE[:at] + junk + WHOLE[at + length :])
    for item in alfworld.read(path):
        assert isinstance(item, Rejected) or rows.convert(item, "i").n_steps


def test_detect(tmp_path):
    (tmp_path / "a.json").write_bytes(WHOLE)
    (tmp_path / "b.json").write_bytes(b'{"metadata": 3, "trajectory": []}')
    assert alfworld.detect(Sample(tmp_path / "a.json"))
    assert alfworld.detect(Sample(tmp_path / "b.json")) is None


def test_real_episodes(shared_data):
    found = list(alfworld.read(shared_data / "openmanus-alfworld"))
    whole = [item for item in found if isinstance(item, Episode)]
    assert len(found) == len(whole) == 6
    stored = [rows.convert(episode, "i") for episode in whole]
    assert sum(row.n_steps for row in stored) == 180
    assert len({row.episode_id for row in stored}) == 6
    assert [e.success for e in whole] == [False] * 6
    assert {e.end_reason for e in whole} == {"step_limit"}
    assert {e.seed for e in whole} == {42}
    assert len({e.task_id for e in whole}) == 3  # each task was run twice
    acting = [s for e in whole for s in e.steps if not s.is_final_observation]
    assert sum(s.action_valid is False for s in acting) == 12
    assert sum("sent" in (s.extra or {}) for s in acting) == 10
    assert sum(s.candidates_complete is True for s in acting) == 180
    assert sum("action_not_sent" in e.quality_flags for e in whole) == 2
    assert sum(c.executed is True for s in acting for c in s.candidates or ()) == 180 - 12
