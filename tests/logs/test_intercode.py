"""InterCode results: scores of states become gains, ends, and the totals of the real file."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import intercode
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected


def item(scores: list[Any], limit=10, **keys) -> dict[str, Any]:
    n = len(scores)
    return {
        "environment": "ic_bash",
        "dataset": "./data/nl2bash/nl2bash_fs_1.json",
        "task_id": 0,
        "query": "count the files",
        "turn_history": {
            "actions": [f"ls {i}" for i in range(n)],
            "observations": [f"out {i}" for i in range(n)],
            "rewards": scores,
            "valid_action": [True] * n,
        }
        | keys,
        "summary": {"max_reward": max(scores, default=0), "turns_taken": n, "turns_max": limit},
    }


def read(folder, value: Any) -> list[Any]:
    path = folder / "ic_bash.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return list(intercode.read(path))


def test_a_score_counts_once(tmp_path):
    (episode,) = read(tmp_path, {"0": item([0.5, 0.75, 0.25, 0.75, 1.0])})
    assert [s.progress for s in episode.steps] == [0.5, 0.75, 0.25, 0.75, 1.0, None]
    assert [s.reward for s in episode.steps] == [0.5, 0.25, 0, 0, 0.25, None]
    assert {s.reward_source for s in episode.steps[:-1]} == {"progress_delta"}
    assert episode.outcome_reward == episode.raw_reward == 1
    assert episode.success is True
    assert (episode.terminated, episode.truncated, episode.end_reason) == (True, False, "env_done")


def test_the_limit_truncates(tmp_path):
    (episode,) = read(tmp_path, {"3": item([0.5, 0.5], limit=2)})
    assert (episode.terminated, episode.truncated, episode.end_reason) == (False, True, "step_limit")
    assert episode.success is False
    assert episode.steps[1].truncated is True
    assert episode.native_id == "3"


def test_an_end_before_the_limit_is_unknown(tmp_path):
    (episode,) = read(tmp_path, {"3": item([0.5])})
    assert (episode.terminated, episode.truncated, episode.end_reason) == (None, None, "unknown")


def test_steps_see_the_answer_before(tmp_path):
    (episode,) = read(tmp_path, {"0": item([0.5, 1.0], valid_action=[False, True], thoughts=["Hm.", None])})
    assert [s.observation for s in episode.steps] == ["count the files", "out 0", "out 1"]
    assert [s.action_valid for s in episode.steps] == [False, True, None]
    assert (episode.steps[0].action, episode.steps[0].action_name, episode.steps[0].thought) == ("ls 0", "ls", "Hm.")
    assert episode.steps[0].action_grammar == "shell"
    assert episode.task_id == "ic_bash/nl2bash_fs_1/0"
    assert episode.dataset == "ic_bash"


def test_scores_that_were_not_logged_stay_null(tmp_path):
    value = item([0.5, 1.0], rewards=[None, 1.0])
    (episode,) = read(tmp_path, {"0": value})
    assert [s.reward for s in episode.steps] == [None, 1, None]
    assert episode.quality_flags == ("missing_rewards",)
    assert episode.success is None


@pytest.mark.parametrize(
    ("value", "reasons"),
    [
        (b"", ["empty_file"]),
        (b'{"0": {"query"', ["json_truncated"]),
        ({"0": item([])}, ["no_steps"]),
        ({"0": item([1.0], actions=["a", "b"])}, ["length_mismatch"]),
        ({"0": item([1.0], rewards=["1"])}, ["wrong_type"]),
        ({"0": item([0.5]) | {"summary": {"max_reward": 0.9}}}, ["bad_value"]),
        ({"0": 3}, ["wrong_type"]),
        ({"0": {"query": "x"}, "1": item([1.0])}, ["missing_key"]),
    ],
)
def test_refused(tmp_path, value, reasons):
    assert [found.reason for found in read(tmp_path, value) if isinstance(found, Rejected)] == reasons


WHOLE = json.dumps({"0": item([0.5, 1.0]), "1": item([0.5], limit=1)}).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE)), length=st.integers(0, 60), junk=st.binary(max_size=12))
def test_damaged_bytes(tmp_path, at, length, junk):
    for found in read(tmp_path, WHOLE[:at] + junk + WHOLE[at + length :]):
        assert isinstance(found, Rejected) or rows.convert(found, "i").n_steps


def test_detect(tmp_path):
    (tmp_path / "a.json").write_bytes(WHOLE)
    (tmp_path / "b.json").write_bytes(b'{"0": {"query": 1}}')
    (tmp_path / "c.json").write_bytes(b"{}")
    assert intercode.detect(Sample(tmp_path / "a.json"))
    assert intercode.detect(Sample(tmp_path / "b.json")) is None
    assert intercode.detect(Sample(tmp_path / "c.json")) is None


def test_real_results(shared_data):
    found = list(intercode.read(shared_data / "intercode"))
    whole = [item for item in found if isinstance(item, Episode)]
    assert len(found) == len(whole) == 60
    stored = [rows.convert(episode, "i") for episode in whole]
    assert sum(row.n_steps for row in stored) == 401
    assert len({row.episode_id for row in stored}) == 60
    assert [sum(e.success is s for e in whole) for s in (True, False)] == [25, 35]
    assert [sum(e.end_reason == r for e in whole) for r in ("env_done", "step_limit")] == [25, 35]
    for episode in whole:
        assert sum(s.reward or 0 for s in episode.steps) == pytest.approx(episode.raw_reward or 0)
