import dataclasses
import datetime
import math

import pyarrow.parquet as pq
import pytest

from offline_lm.errors import UserError
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Candidate, Episode, Label, Rejected, Step

REJECTED = Rejected(source="jsonl", uri="log.jsonl", offset=120, reason="json_syntax", message="not JSON")


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "store")


def step(t=0, **kwargs):
    return Step(**{"step": t, "observation": f"page {t}", "action": f"click[{t}]", "reward": 0, **kwargs})


def episode(name="1", *steps, **kwargs):
    kwargs = {"source": "jsonl", "native_id": name, "goal": f"goal {name}", "uri": "log.jsonl", **kwargs}
    return Episode(steps=steps or (step(0), step(1, reward=1, terminated=True)), **kwargs)


def rows(store, sql):
    return store.connect().sql(sql).fetchall()


def test_everything_read_is_accepted_duplicate_or_quarantined(store):
    records = [episode("1"), episode("2"), REJECTED, episode("1"), episode("3", step(5), step(5))]
    counts = add(store, records)
    assert counts == {
        "read": 5,
        "accepted": 2,
        "duplicates": 1,
        "quarantined": 2,
        "by_reason": {"json_syntax": 1, "step_order": 1},
        "episodes": 2,
        "steps": 4,
        "redacted": {},
    }
    assert rows(store, "SELECT count(*) FROM episodes") == [(2,)]
    assert rows(store, "SELECT count(*) FROM steps") == [(4,)]
    assert rows(store, "SELECT source_offset, reason, message FROM quarantine ORDER BY reason") == [
        (120, "json_syntax", "not JSON"),
        (0, "step_order", "episode '3': step 5 follows step 5: indices rise by one"),
    ]


def test_the_same_log_twice_adds_nothing(store):
    records = [episode("1"), REJECTED, episode("2", step(0, reward=math.nan))]
    add(store, records)
    versions = store.versions()
    counts = add(store, records)
    assert (counts["accepted"], counts["duplicates"], counts["quarantined"]) == (0, 1, 2)
    assert store.versions() == versions


def test_identical_content_is_stored_once_whatever_its_name_place_and_time(store):
    again = dataclasses.replace(
        episode("other", goal="goal 1"),
        dataset="copy",
        uri="copy.jsonl",
        started_at=datetime.datetime(2026, 1, 1),
        steps=(step(0, ts_start=datetime.datetime(2026, 1, 1)), step(1, reward=1.0, terminated=True)),
    )
    assert add(store, [episode("1"), again])["duplicates"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"goal": "g"},
        {"seed": 1},
        {"trial": 1},
        {"policy_id": "p"},
        {"success": True},
        {"outcome_reward": 0.5},
        {"steps": (step(0), step(1, reward=1, terminated=True, action="back"))},
    ],
)
def test_other_content_is_another_episode(store, change):
    other = dataclasses.replace(episode("2", goal="goal 1"), **change)
    assert add(store, [episode("1"), other])["accepted"] == 2


def test_the_same_identity_with_other_content_is_a_conflict(store):
    assert add(store, [episode("1")])["accepted"] == 1
    assert add(store, [episode("1", success=True)])["by_reason"] == {"id_conflict": 1}
    assert add(store, [episode("1", success=True, dataset="d")])["accepted"] == 1


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([Step(step=0, observation="x", is_final_observation=True)], "no_steps"),
        ([step(0), step(2)], "step_order"),
        ([step(1), step(0)], "step_order"),
        ([step(-1)], "step_order"),
        ([step(True)], "step_order"),
        ([step(0, is_final_observation=True), step(1)], "final_observation"),
        ([step(0, action=None)], "no_action"),
        ([step(0, observation=None)], "no_observation"),
        ([step(0, terminated=True), step(1)], "step_after_end"),
        ([step(0, truncated=True), step(1)], "step_after_end"),
        ([step(0, reward=math.inf)], "non_finite"),
        ([step(0, candidates=(Candidate(action="a", logprob=-math.inf),))], "non_finite"),
        ([step(0, response_logprobs=(0.0, math.nan))], "non_finite"),
        ([step(0, source_offset=2**63)], "int_range"),
        ([step(0, prompt_token_ids=(2**31,))], "int_range"),
        ([step(0, reward=10**400)], "int_range"),
        ([step(0, extra={"n": 2**70})], "int_range"),
        ([step(0, observation="\ud800")], "lone_surrogate"),
        ([step(0, extra={"\ud800": 1})], "lone_surrogate"),
        ([step(0, candidates=(Candidate(action="\ud800"),))], "lone_surrogate"),
        ([step(0, reward=True)], "bad_type"),
        ([step(0, reward="1")], "bad_type"),
        ([step(0, url=7)], "bad_type"),
        ([step(0, terminated="yes")], "bad_type"),
        ([step(0, target="button")], "bad_type"),
    ],
)
def test_what_would_crash_later_is_rejected_now(store, steps, reason):
    counts = add(store, [episode("bad", *steps), episode("good")])
    assert counts["by_reason"] == {reason: 1}
    assert counts["accepted"] == 1
    assert rows(store, "SELECT goal FROM episodes") == [("goal good",)]


def test_episode_fields_are_checked_too(store):
    bad = [
        episode("1", seed=2**63),
        episode("2", cost_usd=math.nan),
        episode("3\ud800"),
        episode("4", goal=3),
    ]
    bad.append(episode("5", labels=(Label(kind="judge", value=math.inf),)))
    counts = add(store, bad)
    assert counts["by_reason"] == {"int_range": 1, "non_finite": 2, "lone_surrogate": 1, "bad_type": 1}


def test_strict_stops_at_the_first_and_commits_nothing_more(store):
    with pytest.raises(UserError, match=r"log\.jsonl, at 120: json_syntax: not JSON"):
        add(store, [episode("1"), REJECTED, episode("2")], mode="strict")
    assert store.versions() == {"episodes": 0}


def test_rewards_are_float64_whatever_came_first(store):
    add(store, [episode("1", step(0, reward=1, terminated=True))])
    add(store, [episode("2", step(0, reward=0.67, terminated=True))])
    assert rows(store, "SELECT reward FROM steps ORDER BY reward") == [(0.67,), (1.0,)]
    for file in store.files("steps"):
        assert str(pq.read_schema(file).field("reward").type) == "double"


def test_a_crash_between_the_commits_leaves_nothing_to_see(store, monkeypatch):
    checked = Store.append_checked

    def crash(self, table, make):
        if table == "episodes":
            raise RuntimeError("power cut")
        checked(self, table, make)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "append_checked", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            add(store, [episode("1")])
    assert store.versions()["steps"] == 1
    assert rows(store, "FROM steps") == []
    assert add(store, [episode("1")])["accepted"] == 1
    assert rows(store, "SELECT step, reward FROM steps ORDER BY step") == [(0, 0.0), (1, 1.0)]


def test_batches_are_bounded_by_count_and_by_bytes(store, tmp_path):
    add(store, [episode(str(i)) for i in range(5)], batch=2)
    assert store.versions()["steps"] == 3
    other = Store.create(tmp_path / "other")
    add(other, [episode(str(i), step(0, observation="x" * 1000)) for i in range(4)], batch_bytes=1)
    assert other.versions()["steps"] == 4


def test_all_that_was_logged_comes_back(store):
    full = step(
        0,
        screenshot={"sha256": "a", "mime": "image/png", "width": 3},
        target={"ref": 4, "tag": "a"},
        action_args={"x": [1, None]},
        sub_actions=("a", "b"),
        candidates=(Candidate(action="a", score=1, executed=True),),
        prompt_token_ids=(1, 2),
        extra={"k": "v\x00"},
        ts_start=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    )
    add(
        store,
        [episode("1", full, sampling={"temperature": 1, "stop": ["x"]}, labels=(Label(kind="env", value=1),))],
    )
    assert rows(
        store,
        "SELECT screenshot.mime, target.ref, action_args->>'$.x[0]', sub_actions, candidates[1].score,"
        " prompt_token_ids, extra->>'$.screenshot.width', extra->>'k', ts_start, is_final_observation"
        " FROM steps",
    ) == [("image/png", "4", "1", ["a", "b"], 1.0, [1, 2], "3", "v\x00", datetime.datetime(2026, 1, 1), False)]
    assert rows(
        store,
        "SELECT sampling.temperature, extra->>'$.sampling.stop[0]', labels[1].value, provenance.native_id,"
        " n_steps, success, truncated FROM episodes",
    ) == [(1.0, "x", 1.0, "1", 1, None, None)]


def test_excerpts_are_redacted_and_readable(store):
    excerpt = '{"api_key": "sk-abc123", "mail": "ann@example.org"} \ud800'
    add(store, [dataclasses.replace(REJECTED, excerpt=excerpt)])
    ((kept,),) = rows(store, "SELECT excerpt FROM quarantine")
    assert "abc123" not in kept
    assert "ann@" not in kept
    assert kept.endswith("?")


def test_ids_do_not_change_between_versions(store):
    add(store, [episode("1")])
    assert rows(store, "SELECT episode_id, content_hash FROM episodes") == [
        (
            "b3560918-45a0-5293-9609-7b7fae9713a8",
            "4abb54d839eac74024ddb430a53f2b1e01e8faea79026077561b5bd31a358209",
        )
    ]
