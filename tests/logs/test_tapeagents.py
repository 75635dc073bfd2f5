"""Tapes of TapeAgents: what becomes of each kind of entry, and the counts of the real ones."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.logs._adapters import Sample
from offline_lm.logs.tapeagents import detect
from offline_lm.store.rows import convert
from offline_lm.types import Episode, Rejected

TREE = "RootWebArea Shop, focused\n  BID:7 button Buy"


def entry(kind, other=None, **content):
    metadata = {"id": "x", "prompt_id": "p", "node": "act", "agent": "shopper", "other": other or {}}
    return {"metadata": metadata, "kind": kind} | content


def page(text=TREE, **keys):
    return entry("page_observation", {"screenshot_path": "a.png", "env_finished": False}, text=text, **keys)


STEPS = [
    page(current_page=1, total_pages=2),
    entry("task", task="Buy a mug"),
    entry("reasoning_thought", reasoning="A button."),
    entry("reflection_thought", page_state="open", are_we_stuck=False),
    entry("click_action", bid="7", button="left", modifiers=[]),
    entry("set_next_node", next_node="act"),
    page("", error="TimeoutError: 467ms"),
    entry("final_answer_action", text="Done."),
]


def tape(tmp_path, steps=STEPS, name="tape.json", **metadata) -> Any:
    value = {"metadata": {"id": "t1", "author": "me"} | metadata, "context": {"tools": []}, "steps": steps}
    (tmp_path / name).write_text(json.dumps(value))
    (result,) = logs.read("tapeagents", tmp_path)
    return result


def test_a_tape(tmp_path):
    got = tape(tmp_path, parent_id="t0", result={}, other={"timers": {"solve_task": 2.5}})
    assert (got.native_id, got.dataset, got.goal, got.agent) == ("t1", tmp_path.name, "Buy a mug", "shopper")
    assert (got.terminated, got.truncated, got.end_reason, got.final_answer) == (True, False, "agent_stop", "Done.")
    assert (got.outcome_reward, got.success, got.quality_flags) == (None, None, ("unlabelled",))
    assert (got.duration_s, got.extra["parent_id"]) == (2.5, "t0")
    first, second = got.steps
    assert (first.observation, first.observation_kind, first.title) == (TREE, "axtree", "Shop")
    assert first.screenshot == {"sha256": None, "mime": None, "status": "missing"}
    assert first.thought == 'A button.\n\n{"page_state":"open","are_we_stuck":false}'
    assert first.action == 'click(bid="7", button="left", modifiers=[])'
    assert (first.action_name, first.target) == ("click", {"ref": "7"})
    assert (first.action_error, first.action_valid, first.reward) == ("TimeoutError: 467ms", False, None)
    assert first.extra["pages"] == {"current_page": 1, "total_pages": 2}
    assert (second.observation, second.action) == ("", 'final_answer(text="Done.")')
    assert second.extra["control"] == [{"kind": "set_next_node", "next_node": "act"}]


def test_results_of_workarena_label_a_tape(tmp_path):
    name = "task5_seed1337_workarena.servicenow.create-incident.json"
    got = tape(tmp_path, name=name, result={"success": True, "reward": 0.5, "number": 5})
    assert (got.benchmark, got.task_id, got.seed) == ("workarena", "workarena.servicenow.create-incident", 1337)
    assert (got.outcome_reward, got.success, got.quality_flags) == (0.5, True, ())
    assert [step.reward for step in got.steps] == [0.0, 0.5]
    assert {step.reward_source for step in got.steps} == {"outcome"}


def test_an_answer_that_calls_itself_a_success_is_no_reward(tmp_path):
    got = tape(tmp_path, [entry("question", content="1+1?"), entry("gaia_answer_action", success=True, answer="2")])
    assert (got.self_reported_success, got.success, got.steps[0].reward) == (True, None, None)
    assert (got.final_answer, got.steps[0].observation, got.goal) == ("2", "1+1?", "1+1?")


def test_failures_and_unparsed_answers(tmp_path):
    got = tape(
        tmp_path,
        [
            entry("question", content="Q"),
            entry("watch_video_action", video_url="u"),
            entry("action_execution_failure", error="no format"),
            entry("llm_output_parsing_failure_action", error="no JSON", llm_output="click it"),
            entry("search_results_observation", query="q", serp=[{"title": "T"}], error=None),
        ],
    )
    video, unparsed, final = got.steps
    assert (video.action_error, unparsed.observation) == ("no format", "no format")
    assert (unparsed.action, unparsed.response, unparsed.action_valid) == (None, "click it", False)
    assert (final.is_final_observation, final.observation) == (True, '{"query":"q","serp":[{"title":"T"}]}')
    assert (got.end_reason, got.terminated) == ("unknown", None)


def test_pictures_beside_the_tape_and_none_outside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "out.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    steps = [page(), entry("click_action", bid="7")]
    assert tape(tmp_path / "in", steps).steps[0].screenshot["status"] == "ok"
    for name in ("../out.png", str(tmp_path / "out.png"), "a\0b"):
        steps[0]["metadata"]["other"]["screenshot_path"] = name
        assert tape(tmp_path / "in", steps).steps[0].screenshot["status"] == "missing"


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([], "no_steps"),
        ([page()], "no_steps"),
        (None, "missing_key"),
        ([3], "wrong_type"),
        ([{"metadata": {}}], "missing_key"),
        ([page(), entry("click_action"), entry("page_observation", {"env_finished": True}, text=""),
          entry("click_action")], "steps_after_end"),
        ([entry("page_observation", text=5), entry("click_action")], "wrong_type"),
    ],
)  # fmt: skip
def test_what_is_rejected(tmp_path, steps, reason):
    assert tape(tmp_path, steps).reason == reason


def test_only_tapes_are_recognised(tmp_path):
    tape(tmp_path)
    assert detect(Sample(tmp_path / "tape.json"))
    for text in ('{"metadata": {}, "steps": [{"action": "x"}]}', '{"metadata": {}, "steps": []}', "[1]", "{"):
        (tmp_path / "other.json").write_text(text)
        assert detect(Sample(tmp_path / "other.json")) is None


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_rejected(tmp_path, data):
    good = json.dumps({"metadata": {"id": "t"}, "steps": STEPS}).encode()
    at = data.draw(st.integers(0, len(good)))
    bad = good[:at] + data.draw(st.binary(max_size=8)) + good[at + data.draw(st.integers(0, 30)) :]
    (tmp_path / "x.json").write_bytes(bad)
    assert all(isinstance(record, Episode | Rejected) for record in logs.read("tapeagents", tmp_path))


def test_the_real_tapes(shared_data):
    """The card: 6 episodes, 44 steps, all unlabelled."""
    episodes: list[Any] = list(logs.read("auto", shared_data / "tapeagents"))
    steps = [step for episode in episodes for step in episode.steps if not step.is_final_observation]
    assert (len(episodes), len(steps)) == (6, 44)
    assert {episode.source for episode in episodes} == {"tapeagents"}
    for episode in episodes:
        convert(episode, "i")
        assert (episode.success, episode.outcome_reward, episode.quality_flags) == (None, None, ("unlabelled",))
    assert Counter(episode.benchmark for episode in episodes) == {"gaia": 4, "workarena": 2}
    assert sum(bool(step.action_error) for step in steps) == 20
    shots = [step.screenshot["status"] for episode in episodes for step in episode.steps if step.screenshot]
    assert Counter(shots) == {"missing": 30}
    incident = episodes[-1]
    assert (incident.seed, len(incident.steps), incident.steps[-1].is_final_observation) == (1337, 20, True)
    assert (incident.terminated, incident.truncated, incident.end_reason) == (False, None, "unknown")
    assert all("base64" not in (step.observation or "") for step in steps)
