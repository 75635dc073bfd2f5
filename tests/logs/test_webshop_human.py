"""WebShop sessions of people: actions inferred from visits that follow each other, and the totals of the real ones."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.logs import webshop_human
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected

GOAL = {"asin": "B1", "category": "garden", "instruction_text": "a red mug", "attributes": ["red"], "price_upper": 9.0}


def visit(page: str, url: str = "", **keys) -> dict[str, Any]:
    return {"page": page, "url": f"http://shop/{page}/s1/{url}", "goal": GOAL} | keys


def results(words: str, page: Any = 1) -> dict[str, Any]:
    return visit("search_results", content={"keywords": words.split(), "page": page, "search_result_asins": ["B1"]})


def item(asin="B1", page="item_page", url="", **options) -> dict[str, Any]:
    return visit(page, url, content={"asin": asin, "keywords": "['mug']", "page": "1", "options": options})


DONE = visit("done", content={"asin": "B1", "options": {}, "price": 5.0}, reward=0.5, reward_info={"r_att": 0.5})
SESSION = [visit("index"), results("mug"), item(), DONE]


def read(folder, visits: list[Any] | bytes) -> Any:
    path = folder / "s1.jsonl"
    path.write_bytes(visits if isinstance(visits, bytes) else b"\n".join(json.dumps(v).encode() for v in visits))
    (found,) = webshop_human.read(path)
    return found


@pytest.mark.parametrize(
    ("before", "after", "action"),
    [
        (visit("index"), results("red mug"), "search[red mug]"),
        (results("mug"), results("red mug"), "search[red mug]"),
        (results("mug", 1), results("mug", "2"), "click[Next >]"),
        (results("mug", 2), results("mug", 1), "click[< Prev]"),
        (results("mug", 1), results("mug", 5), "goto[http://shop/search_results/s1/]"),
        (item(), results("mug"), "click[< Prev]"),
        (item(), visit("index"), "click[Back to Search]"),
        (results("mug"), item("B7"), "click[B7]"),
        (item(size="8"), item(size="8", color="red"), "click[red]"),
        (item(size="8"), item(size="9"), "click[9]"),
        (item(), item(a="1", b="2"), "goto[http://shop/item_page/s1/]"),
        (item(), item("B2"), "goto[http://shop/item_page/s1/]"),
        (item(), item(page="item_sub_page", url="B1/1/Description/%7B%7D"), "click[Description]"),
        (item(page="item_sub_page"), item(), "click[< Prev]"),
        (item(), DONE, "click[Buy Now]"),
    ],
)
def test_inferred_actions(tmp_path, before, after, action):
    episode = read(tmp_path, [before, after])
    assert episode.steps[0].action == action
    assert episode.steps[1].is_final_observation


def test_session(tmp_path):
    episode = read(tmp_path, SESSION)
    assert [step.action for step in episode.steps] == ["search[mug]", "click[B1]", "click[Buy Now]", None]
    assert [step.reward for step in episode.steps] == [0, 0, 0.5, None]
    assert (episode.native_id, episode.goal, episode.policy_kind) == ("s1", "a red mug", "human")
    assert (episode.success, episode.terminated, episode.end_reason) == (False, True, "env_done")
    assert episode.extra == {"goal": GOAL, "reward_info": {"r_att": 0.5}}
    assert episode.steps[1].url == "http://shop/search_results/s1/"


def test_the_hidden_answer_is_not_in_what_was_seen(tmp_path):
    seen = "".join(step.observation or "" for step in read(tmp_path, SESSION).steps)
    assert "attributes" not in seen
    assert "reward" not in seen
    assert "price_upper" not in seen


def test_a_session_without_end_is_unlabelled(tmp_path):
    episode = read(tmp_path, SESSION[:-1])
    assert (episode.outcome_reward, episode.success, episode.terminated) == (None, None, None)
    assert "unlabelled" in episode.quality_flags
    assert episode.steps[0].reward is None


@pytest.mark.parametrize(
    ("visits", "reason"),
    [
        (b"", "empty_file"),
        ([visit("index")], "no_steps"),
        ([*SESSION, visit("index")], "steps_after_end"),
        ([visit("cart"), DONE], "bad_value"),
        ([{"page": "index"}], "missing_key"),
        ([[1]], "wrong_type"),
        ([visit("index", goal=3), DONE], "wrong_type"),
        (json.dumps(SESSION[0]).encode() + b'\n{"page": ', "json_truncated"),
    ],
)
def test_refused(tmp_path, visits, reason):
    assert read(tmp_path, visits).reason == reason


WHOLE = b"\n".join(json.dumps(v).encode() for v in SESSION)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE)), length=st.integers(0, 60), junk=st.binary(max_size=12))
def test_damaged_bytes(tmp_path, at, length, junk):
    found = read(tmp_path, WHOLE[:at] + junk + WHOLE[at + length :])
    assert isinstance(found, Rejected) or rows.convert(found, "i").n_steps


def test_detect(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(WHOLE)
    (tmp_path / "b.jsonl").write_bytes(b'{"page": 1, "url": "", "goal": {}}')
    assert webshop_human.detect(Sample(tmp_path / "a.jsonl"))
    assert webshop_human.detect(Sample(tmp_path / "b.jsonl")) is None


def test_real_sessions(shared_data):
    found = list(webshop_human.read(shared_data / "webshop-human"))
    whole = [item for item in found if isinstance(item, Episode)]
    assert len(found) == len(whole) == 5
    assert sum(rows.convert(episode, "i").n_steps for episode in whole) == 23
    assert [sum(e.success is s for e in whole) for s in (True, False)] == [1, 4]
    assert sum(e.outcome_reward or 0 for e in whole) / 5 == pytest.approx(0.683, abs=5e-4)
    actions = {e.native_id: [step.action for step in e.steps[:-1]] for e in whole}
    assert actions["20220427_1_23"][1:] == ["click[Next >]", "click[B08CZ8WS38]", "click[red]", "click[Buy Now]"]
    assert actions["20220427_1_7"][2:4] == ["click[Description]", "click[< Prev]"]
    assert actions["20220427_1_12"][1] == "click[Back to Search]"
    assert not [a for acted in actions.values() for a in acted if a and a.startswith("goto")]
