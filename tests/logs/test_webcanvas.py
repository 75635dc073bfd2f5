"""WebCanvas: progress becomes rewards of the actions that earned it; the real groups' counts."""

import json
from collections import Counter
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected


def step(index, action, rate, url, selector="", **keys):
    return {
        "step_index": index,
        "trace_description": {"thought": f"thought {index}", "action": f"described {index}"},
        "selector": selector,
        "action": action,
        "task_score": f"{rate * 4:g} / 4",
        "task_score_rate": rate,
        "current_reward_score_description": {"score": "8", "description": "good"},
        "url": url,
    } | keys


def task(steps, status="limit", number=3, name="Buy a mug"):
    return {"task_id": number, "task_name": name, "task_status": status, "step_list": steps}


def write(tmp_path, tasks, group="group-a"):
    (tmp_path / group).mkdir(exist_ok=True)
    (tmp_path / group / "out.json").write_text(json.dumps(tasks))


def read(tmp_path, **options) -> list[Any]:
    return list(logs.read("webcanvas", tmp_path, **options))


def test_the_episode(tmp_path):
    steps = [
        step(1, "goto[https://mugs.com]", 0.0, "https://mugs.com/"),
        step(2, "fill_search[7,red, small]", 0.25, "https://mugs.com/s?q=red", "#q"),
    ]
    write(tmp_path, [task(steps)])
    (got,) = read(tmp_path, model="gpt-4")
    assert (got.source, got.dataset, got.native_id, got.policy_id) == ("webcanvas", "group-a", "3", "group-a")
    assert (got.benchmark, got.task_id, got.goal, got.model) == ("mind2web-live", "Buy a mug", "Buy a mug", "gpt-4")
    assert (got.success, got.outcome_reward, got.raw_reward) == (False, 0.25, 0.25)
    assert (got.terminated, got.truncated, got.end_reason) == (False, True, "step_limit")
    assert (got.steps[-1].terminated, got.steps[-1].truncated) == (False, True)
    assert got.quality_flags == ("no_observations",)
    assert got.extra == {"task_status": "limit", "task_number": 3}
    first, second = got.steps
    assert (first.url, first.observation, first.observation_kind) == (None, "", "text")
    assert (second.url, second.observation) == ("https://mugs.com/", "url: https://mugs.com/")
    assert (second.action, second.action_name) == ("fill_search[7,red, small]", "fill_search")
    assert second.action_args == {"id": "7", "text": "red, small"}
    assert second.target == {"ref": "7", "selector": "#q"}
    assert (second.thought, second.response) == ("thought 2", None)
    assert second.extra is not None
    assert second.extra["url_after"] == "https://mugs.com/s?q=red"
    assert second.extra["task_score"] == "1 / 4"
    assert [s.reward_source for s in got.steps] == ["progress_delta"] * 2


def rewards(tmp_path, steps, status="limit"):
    write(tmp_path, [task(steps, status)])
    (got,) = read(tmp_path)
    return [s.reward for s in got.steps], [s.progress for s in got.steps]


def test_a_gain_on_a_new_page_is_of_the_action_that_led_there(tmp_path):
    """The score is taken before the step's action, so a gain at step t on a url new to step t is of action t-1."""
    steps = [step(1, "goto[a]", 0.0, "a"), step(2, "click[1]", 0.5, "b", "#x"), step(3, "click[2]", 0.5, "b", "#y")]
    assert rewards(tmp_path, steps) == ([0.5, 0.0, 0.0], [0.5, 0.5, 0.5])


def test_a_gain_on_the_same_page_is_of_the_element_acted_on(tmp_path):
    steps = [step(1, "goto[a]", 0.0, "a"), step(2, "click[1]", 0.0, "a", "#x"), step(3, "click[2]", 0.25, "b", "#y")]
    assert rewards(tmp_path, steps) == ([0.0, 0.0, 0.25], [0.0, 0.0, 0.25])


def test_an_unparsable_last_action_earns_nothing(tmp_path):
    steps = [step(1, "goto[a]", 0.0, "a"), step(2, "click[1]", 0.0, "a", "#x"), step(3, "None", 1.0, "")]
    write(tmp_path, [task(steps, "finished")])
    (got,) = read(tmp_path)
    assert [s.reward for s in got.steps] == [0.0, 1.0, 0.0]
    assert (got.success, got.terminated, got.truncated, got.end_reason) == (True, True, False, "env_done")
    assert (got.steps[2].action, got.steps[2].action_valid, got.steps[1].action_valid) == ("", False, None)


def test_what_matched_decides_where_it_is_logged(tmp_path):
    url, path = "[{'url_included_match': 'a'}]", "[{'url_included_match': 'a'}, {'element_path_exactly_match': 'b'}]"
    steps = [
        step(1, "goto[a]", 0.0, "a", match_result="[]"),
        step(2, "click[1]", 0.25, "b", "#x", match_result=url),
        step(3, "click[2]", 0.5, "b", "#y", match_result=path),
    ]
    assert rewards(tmp_path, steps)[0] == [0.25, 0.0, 0.25]


def test_a_null_action_and_a_loss_of_progress(tmp_path):
    steps = [step(1, None, 0.0, "a"), step(2, "click[1]", 0.5, "a", "#x"), step(3, "click[1]", 0.25, "a", "#x")]
    assert rewards(tmp_path, steps, "error")[0] == [0.5, 0.0, -0.25]


def test_one_number_twice_is_two_runs(tmp_path):
    steps = [step(1, "goto[a]", 0.0, "a")]
    write(tmp_path, [task(steps), task(steps), task(steps, number=4)])
    assert [(e.native_id, e.trial) for e in read(tmp_path)] == [("3", 0), ("3/1", 1), ("4", 0)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (task([]), "no_steps"),
        (task([step(1, "goto[a]", 1.5, "a")]), "out_of_range"),
        (task([step(1, "goto[a]", 0.0, "a")], "won"), "bad_value"),
        (task([step(1, 5, 0.0, "a")]), "wrong_type"),
        (task([{"action": "goto[a]"}]), "missing_key"),
        (task([7]), "wrong_type"),
        ({"task_id": 1, "task_name": "x"}, "missing_key"),
        (task([step(1, "goto[a]", 0.0, "a")]) | {"task_id": "3"}, "wrong_type"),
    ],
)
def test_what_is_rejected(tmp_path, record, reason):
    write(tmp_path, [record])
    (got,) = read(tmp_path)
    assert isinstance(got, Rejected)
    assert got.reason == reason


def test_detect(tmp_path):
    write(tmp_path, [task([step(1, "goto[a]", 0.0, "a")])])
    (tmp_path / "other.json").write_text('{"task_name": 1}')
    detect = logs.format_of("webcanvas").detect
    assert detect(Sample(tmp_path / "group-a" / "out.json"))
    assert detect(Sample(tmp_path / "other.json")) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_bytes_crash_it(tmp_path, data):
    good = json.dumps([task([step(1, "goto[a]", 0.0, "a"), step(2, "click[1]", 0.5, "a", "#x")])]).encode()
    at = data.draw(st.integers(0, len(good)))
    mutated = good[:at] + data.draw(st.binary(max_size=6)) + good[at + data.draw(st.integers(0, 4)) :]
    (tmp_path / "out.json").write_bytes(mutated)
    for record in read(tmp_path):
        assert isinstance(record, Episode | Rejected)


def test_the_real_groups(shared_data):
    counts: Counter[str] = Counter()
    ids = set()
    for got in logs.read("webcanvas", shared_data / "webcanvas"):
        assert isinstance(got, Episode)
        assert rows.convert(got, "i").n_steps == len(got.steps)
        ids.add((got.dataset, got.native_id))
        assert got.outcome_reward is not None
        partial = 0 < got.outcome_reward < 1
        counts += Counter(
            {
                "episodes": 1,
                "steps": len(got.steps),
                "success": int(bool(got.success)),
                "failure": int(got.success is False),
                "partial": int(partial),
                str(got.extra["task_status"]): 1,
                "unparsable": sum(s.action_valid is False for s in got.steps),
            }
        )
        assert sum(s.reward or 0 for s in got.steps) == pytest.approx(got.outcome_reward)
        assert all(orjson.dumps(s.extra) for s in got.steps)
        assert not any(s.reward for s in got.steps if s.action_valid is False)  # earned by nothing that was done
    assert counts == {
        "episodes": 185,
        "steps": 1616,
        "success": 37,
        "failure": 148,
        "partial": 124,
        "finished": 37,
        "error": 27,
        "limit": 121,
        "unparsable": 168,
    }
    assert len(ids) == 185
