"""ReAct's transcripts of WebShop: rewards, ends, invalid actions, cut output, and the totals of the real transcript."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import webshop_react
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected

BOUGHT = """-----------------
0
Action: reset
Observation: 
Webshop 
Instruction:  
i want a usb microphone, and price lower than 50.00 dollars 
[Search] 

Action: search[usb microphone]
Observation: 
[Back to Search] 
[B0972Q1T8T] 
$32.99 

Action: think[B0972Q1T8T is good.
Observation: OK.

Action: click[Add to cart]
Observation: Invalid action!

Action: click[B0972Q1T8T]
Observation: 
[Buy Now] 

Action: click[Buy Now]
Observation: Your score (min 0.0, max 1.0): 0.75

1 0.75 0.0 0.0
-------------
"""
FIRST_PAGE = "\nWebshop \nInstruction:  \ni want a usb microphone, and price lower than 50.00 dollars \n[Search] "


def episodes(folder, text: str | bytes) -> list[Any]:
    path = folder / "run.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(webshop_react.read(path))


def header(number: int) -> str:
    return f"-----------------\n{number}\nAction: reset\nObservation: \nWebshop \nInstruction:  \na mug \n[Search] \n\n"


def test_steps_see_the_answer_before(tmp_path):
    (episode,) = episodes(tmp_path, BOUGHT)
    steps = episode.steps
    assert [step.action_name for step in steps] == ["search", "think", "click", "click", "click", None]
    assert steps[0].observation == FIRST_PAGE
    assert steps[1].observation == "\n[Back to Search] \n[B0972Q1T8T] \n$32.99 "
    assert steps[2].observation == "OK."
    assert steps[3].observation == "Invalid action!"
    assert steps[5].is_final_observation
    assert steps[5].observation == "Your score (min 0.0, max 1.0): 0.75"
    assert episode.goal == "i want a usb microphone, and price lower than 50.00 dollars"
    assert (episode.native_id, episode.dataset, episode.task_id) == ("0", "run", "webshop/fixed_0")


def test_reward_goes_to_buy_now(tmp_path):
    (episode,) = episodes(tmp_path, BOUGHT)
    assert [step.reward for step in episode.steps] == [0, 0, 0, 0, 0.75, None]
    assert {step.reward_source for step in episode.steps[:-1]} == {"env"}
    assert (episode.outcome_reward, episode.success) == (0.75, False)
    assert (episode.terminated, episode.truncated, episode.end_reason) == (True, False, "env_done")
    assert episode.steps[4].terminated is True
    assert episode.steps[3].terminated is None


def test_invalid_and_unclosed_actions(tmp_path):
    (episode,) = episodes(tmp_path, BOUGHT)
    assert [step.action_valid for step in episode.steps[:-1]] == [True, True, False, True, True]
    assert episode.steps[2].action_error == "Invalid action!"
    think = episode.steps[1]
    assert think.action == think.response == "think[B0972Q1T8T is good."
    assert think.thought == "B0972Q1T8T is good."
    assert think.action_args == {"thought": "B0972Q1T8T is good."}


def closed(turns: str) -> str:
    return f"{header(0)}{turns}\n\n1 0.0 0.0 0.0\n-------------\n"


def test_text_that_is_no_action_has_no_name(tmp_path):
    (episode,) = episodes(tmp_path, closed("Action: exit\nObservation: Invalid action!"))
    assert (episode.steps[0].action, episode.steps[0].action_name) == ("exit", None)
    assert episode.end_reason == "env_error"
    assert episode.truncated is None


def test_never_bought_is_zero_and_truncated(tmp_path):
    turns = "Action: search[mug]\nObservation: Invalid action!\n\n" * 14
    (episode,) = episodes(tmp_path, header(7) + turns + "8 0.5 0.5 0.0\n-------------\n")
    assert len(episode.steps) == 15
    assert (episode.outcome_reward, episode.success, episode.quality_flags) == (0, False, ("no_score",))
    assert (episode.terminated, episode.truncated, episode.end_reason) == (False, True, "step_limit")
    assert episode.steps[13].truncated is True
    assert episode.steps[13].terminated is False


def test_empty_score_page_counts_zero_as_the_harness_does(tmp_path):
    (episode,) = episodes(tmp_path, closed("Action: click[Buy Now]\nObservation: "))
    assert (episode.outcome_reward, episode.success) == (0, False)
    assert episode.quality_flags == ("no_score", "empty_score_page")
    assert episode.end_reason == "env_error"


def test_a_cut_episode_is_unlabelled(tmp_path):
    (episode,) = episodes(tmp_path, header(0) + "Action: search[mug]\nObservation: OK.\n\nAction: clic")
    assert [step.action for step in episode.steps] == ["search[mug]", None]
    assert episode.steps[1].observation == "OK."
    assert (episode.outcome_reward, episode.success, episode.truncated) == (None, None, None)
    assert episode.quality_flags == ("cut_log", "unlabelled")
    assert episode.extra == {"cut_action": "clic"}
    assert episode.steps[0].reward is None


def test_two_runs_in_one_file_have_other_names(tmp_path):
    assert [e.native_id for e in episodes(tmp_path, BOUGHT + BOUGHT)] == ["0", "0#2"]


def test_carriage_returns(tmp_path):
    (episode,) = episodes(tmp_path, BOUGHT.replace("\n", "\r\n"))
    assert episode.steps[0].observation == FIRST_PAGE
    assert episode.outcome_reward == 0.75


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("", ["empty_file"]),
        ("hello", ["unknown_format"]),
        ("hello\n" + BOUGHT, ["unknown_format"]),
        (header(0), ["no_steps"]),
        (BOUGHT.replace("1.0): 0.75", "1.0): 1e999"), ["out_of_range"]),
        (BOUGHT.encode().replace(b"good", b"\xff"), ["invalid_utf8"]),
    ],
)
def test_refused(tmp_path, text, reasons):
    assert [item.reason for item in episodes(tmp_path, text) if isinstance(item, Rejected)] == reasons


def test_detect(tmp_path):
    (tmp_path / "a.txt").write_text(BOUGHT)
    (tmp_path / "b.txt").write_text("Action: reset\n")
    assert webshop_react.detect(Sample(tmp_path / "a.txt"))
    assert webshop_react.detect(Sample(tmp_path / "b.txt")) is None
    assert webshop_react.detect(Sample(tmp_path)) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(BOUGHT)), length=st.integers(0, 60), junk=st.binary(max_size=12))
def test_damaged_bytes(tmp_path, at, length, junk):
    data = BOUGHT.encode()
    for item in episodes(tmp_path, data[:at] + junk + data[at + length :]):
        assert isinstance(item, Rejected) or rows.convert(item, "i").n_steps


def test_real_transcript(shared_data):
    found = list(webshop_react.read(shared_data / "webshop-react"))
    whole = [item for item in found if isinstance(item, Episode)]
    assert len(found) == len(whole) == 250
    assert sum(rows.convert(episode, "i").n_steps for episode in whole) == 1700
    assert [sum(e.success is s for e in whole) for s in (True, False, None)] == [87, 163, 0]
    assert sum(0 < e.outcome_reward < 1 for e in whole if e.outcome_reward is not None) == 137
    assert sum("no_score" in e.quality_flags for e in whole) == 18
    assert [sum(e.end_reason == r for e in whole) for r in ("step_limit", "env_error", "env_done")] == [15, 3, 232]
    assert [e.native_id for e in whole if e.end_reason == "env_error"] == ["0", "155", "239"]
    assert sum(e.outcome_reward or 0 for e in whole) / 250 == pytest.approx(0.6462, abs=1e-9)  # the last closing line
    assert sum(step.action_valid is False for e in whole for step in e.steps) == 143
    assert sum(step.action_name == "think" for e in whole for step in e.steps) == 540
    assert len({episode.native_id for episode in whole}) == 250
