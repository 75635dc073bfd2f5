"""WebRL rollouts and trajectories, written as its code writes them (no real sample is at hand)."""

import json
import pickle
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.logs import webrl
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Rejected


def turn(index: int, response: str, **keys) -> dict[str, Any]:
    return {
        "trace_id": "7",
        "index": index,
        "prompt": "Find the price" if index == 0 else "** Simplified html **",
        "html": f"<html> {index} </html>",
        "image": None,
        "response": response,
        "url": f"http://shop/{index}",
        "target": "Find the price",
        "parsed_action": {"operation": "do"},
    } | keys


TURNS = [
    turn(0, '# Element: the "Search" box\ndo(action="Search", argument="mug", element="13")'),
    turn(1, 'do(action="Click", element="99")', parsed_action=None),
    turn(2, 'exit(message="$9 (incl. tax)")<|eot_id|>'),
]


def read(path) -> list[Any]:
    return list(webrl.read(path))


def write(folder, turns=TURNS, score: Any = 1.0, kind="traces"):
    (folder / kind).mkdir(exist_ok=True)
    (folder / kind / "7.jsonl").write_text("\n".join(json.dumps(t) for t in turns))
    if score is not None:
        (folder / "actions").mkdir(exist_ok=True)
        (folder / "actions" / "7.json").write_text(json.dumps({"task_id": 7, "score": score}))
    return folder


def test_a_rollout(tmp_path):
    (episode,) = read(write(tmp_path))
    steps = episode.steps
    assert [s.action_name for s in steps] == ["do", "do", "exit"]
    assert steps[0].action == 'do(action="Search", argument="mug", element="13")'
    assert steps[0].action_args == {"action": "Search", "argument": "mug", "element": "13"}
    assert steps[0].thought == '# Element: the "Search" box'
    assert steps[0].response == TURNS[0]["response"]
    assert [s.action_valid for s in steps] == [True, False, True]
    assert (steps[1].observation, steps[1].observation_kind, steps[1].url) == (
        "<html> 1 </html>",
        "html",
        "http://shop/1",
    )
    assert (episode.native_id, episode.goal, episode.final_answer) == ("7", "Find the price", "$9 (incl. tax)")
    assert (episode.terminated, episode.truncated, episode.end_reason) == (True, False, "agent_stop")
    assert rows.convert(episode, "i").n_steps == 3


def test_the_score_of_actions_is_the_outcome(tmp_path):
    (episode,) = read(write(tmp_path))
    assert [s.reward for s in episode.steps] == [0, 0, 1]
    assert episode.steps[2].reward_source == "outcome"
    assert episode.outcome_reward == 1
    assert episode.success is True
    assert episode.extra == {"actions": {"task_id": 7}}


def test_a_score_on_every_line_counts_once(tmp_path):
    fixed = [t | {"score": 1.0, "fixed_response": t["response"]} for t in TURNS]
    (episode,) = read(write(write(tmp_path), fixed, kind="fixed_traces"))  # and traces/ is not read twice
    assert [s.reward for s in episode.steps] == [0, 0, 1]
    assert episode.outcome_reward == 1


def test_without_a_score_it_is_unlabelled(tmp_path):
    (episode,) = read(write(tmp_path, TURNS[:2], None))
    assert (episode.outcome_reward, episode.success, episode.terminated) == (None, None, None)
    assert episode.quality_flags == ("unlabelled",)
    assert episode.end_reason == "unknown"


def test_screenshots_lie_beside_the_traces(tmp_path):
    (tmp_path / "screenshots").mkdir()
    (tmp_path / "screenshots" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    images = ["/home/someone/temp/a.png", "C:\\temp\\b.png", "x" * 5000]
    (episode,) = read(write(tmp_path, [turn(i, "go_backward()", image=image) for i, image in enumerate(images)]))
    assert [s.screenshot["status"] for s in episode.steps] == ["ok", "missing", "missing"]


def test_pages_that_were_not_logged(tmp_path):
    bare = [{k: v for k, v in t.items() if k != "html"} for t in TURNS]
    (episode,) = read(write(tmp_path, bare))
    assert [s.observation for s in episode.steps] == ["Find the price", "", ""]
    (episode,) = read(write(tmp_path, bare[1:]))
    assert "no_observations" in episode.quality_flags


@pytest.mark.parametrize(
    ("response", "name", "args"),
    [
        ("go_backward()", "go_backward", {}),
        ("scroll_page(direction='down')", "scroll_page", {"direction": "down"}),
        ("do(x=[1])", "do", {"arguments": "x=[1]"}),
        ('do(argument="a \\" b")', "do", {"argument": 'a \\" b'}),
        ("I do not know", None, None),
    ],
)
def test_actions(tmp_path, response, name, args):
    (episode,) = read(write(tmp_path, [turn(0, response)]))
    assert (episode.steps[0].action_name, episode.steps[0].action_args) == (name, args)
    assert episode.steps[0].action == response


def move(i: int, reward: float, done: bool, **keys) -> dict[str, Any]:
    return {
        "observation": f"page {i}",
        "next_observation": f"page {i + 1}",
        "action": 'do(action="Click", element="1")',
        "reward": reward,
        "done": done,
        "task": "Find it",
        "trajectory_reward": 1,
        "mc_return": 0.5,
    } | keys


def test_trajectories(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps([move(0, 1, False), move(1, 1, True)]))
    (episode,) = read(tmp_path)
    assert [s.reward for s in episode.steps] == [0, 1, None]
    assert episode.quality_flags == ("copied_reward",)
    assert [s.observation for s in episode.steps] == ["page 0", "page 1", "page 2"]
    assert (episode.goal, episode.terminated, episode.success, episode.outcome_reward) == ("Find it", True, True, 1)


def test_rewards_of_single_steps_stand(tmp_path):
    twice = move(1, 1, True, next_observation="page 1")
    (tmp_path / "t.jsonl").write_text(json.dumps([move(0, 0, False), twice]) + "\n" + json.dumps([move(0, 0, False)]))
    first, second = read(tmp_path)
    assert [s.reward for s in first.steps] == [0, 1]
    assert first.steps[0].reward_source == "env"
    assert (second.terminated, second.end_reason, second.outcome_reward) == (None, "unknown", 0)
    assert first.native_id != second.native_id


def test_pickles_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps([print]))
    (found,) = read(tmp_path)
    assert found.reason == "pickle_refused"
    assert "weights_only=True" in found.message
    assert logs.format_of("webrl").detect(Sample(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty_file"),
        ('{"trace_id": 1, "response": ', "json_truncated"),
        ('{"trace_id": 1}', "missing_key"),
        ("[]", "no_steps"),
        ("3", "wrong_type"),
        ("[3]", "wrong_type"),
        (json.dumps([move(0, 1e308, False), move(1, 1.1e308, True)]), "json_number"),
        (json.dumps([move(0, 0, True), move(1, 0, True)]), "steps_after_end"),
        (json.dumps(TURNS[0] | {"score": 1}) + "\n" + json.dumps(TURNS[1] | {"score": 0}), "reward_conflict"),
    ],
)
def test_refused(tmp_path, text, reason):
    (tmp_path / "7.jsonl").write_text(text)
    assert [item.reason for item in read(tmp_path)] == [reason]


@pytest.mark.parametrize(("score", "reason"), [("high", "wrong_type"), (None, None)])
def test_a_damaged_score(tmp_path, score, reason):
    write(tmp_path, score=score or "high")
    if score is None:
        (tmp_path / "actions" / "7.json").write_text("{")
        reason = "json_truncated"
    assert [item.reason for item in read(tmp_path / "traces")] == [reason]


WHOLE = "\n".join(json.dumps(t) for t in TURNS).encode()
MOVES = json.dumps([move(0, 1, False), move(1, 1, True)]).encode()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whole=st.sampled_from([WHOLE, MOVES]),
    at=st.integers(0, len(WHOLE)),
    length=st.integers(0, 60),
    junk=st.binary(max_size=12),
)
def test_damaged_bytes(tmp_path, whole, at, length, junk):
    path = tmp_path / "x.jsonl"
    path.write_bytes(whole[:at] + junk + whole[at + length :])
    for item in read(path):
        assert isinstance(item, Rejected) or rows.convert(item, "i").n_steps


def test_a_folder_is_claimed_with_its_scores(tmp_path):
    assert webrl.detect(Sample(write(tmp_path)))
    assert [type(item).__name__ for item in logs.read("auto", tmp_path)] == ["Episode"]
    (tmp_path / "traces" / "7.jsonl").write_text("{}")
    assert webrl.detect(Sample(tmp_path)) is None


def test_detect(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(WHOLE)
    (tmp_path / "b.jsonl").write_bytes(MOVES)
    (tmp_path / "c.jsonl").write_bytes(b'{"trace_id": 1, "span_id": 2}')
    assert webrl.detect(Sample(tmp_path / "a.jsonl"))
    assert webrl.detect(Sample(tmp_path / "b.jsonl"))
    assert webrl.detect(Sample(tmp_path / "c.jsonl")) is None
