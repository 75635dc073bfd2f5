import math
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from offline_lm.errors import UserError
from offline_lm.logs import jsonl
from offline_lm.store import Store, rows
from offline_lm.store.episodes import read_episodes
from offline_lm.types import Candidate, Episode, Label, Step

SHOP = Path(__file__).resolve().parents[2] / "datasets" / "shop" / "sample.jsonl.gz"
NOON = datetime(2026, 11, 21, 12, 0, 0, 123456, UTC)

STEP = Step(
    step=0,
    ts_start=NOON,
    ts_end=NOON,
    url="https://shop.test/?q=1",
    title="Shop",
    observation="a page\0 with ünïcode \N{PILE OF POO}",
    observation_kind="axtree",
    observation_error="late",
    screenshot={"sha256": "ab", "status": "missing", "width": 640},
    messages='[{"role":"user","content":"go"}]',
    context_hash="c0",
    response="I click.\nclick[4]",
    thought="I click.",
    action="click[4]",
    action_name="click",
    action_args={"ref": 4, "deep": {"list": [1, None, "x"]}},
    action_grammar="shop",
    sub_actions=("a", ""),
    target={"ref": "4", "tag": "button", "colour": "red"},
    action_valid=True,
    action_error="",
    candidates=(Candidate(action="click[4]", response="r", logprob=-0.5, score=2.0, source="sampled", executed=True),),
    candidates_complete=False,
    prompt_token_ids=(1, 2, 3),
    response_token_ids=(),
    response_logprobs=(-0.1, -math.pi),
    behavior_logprob=-0.25,
    tokenizer_id="gpt2",
    reward=0.1,
    reward_source="env",
    progress=0.5,
    terminated=False,
    truncated=False,
    source_offset=7,
    extra={"more": [1, {"a": None}]},
)
FULL = Episode(
    source="chat",
    native_id="run 7",
    dataset="d",
    steps=(
        STEP,
        Step(step=1, observation="", response="", reward=1.0, terminated=True, truncated=False),
        Step(step=2, messages="[]", is_final_observation=True, screenshot={"sha256": "cd", "status": "stored"}),
    ),
    benchmark="b",
    task_id="t",
    task_family="f",
    site="s",
    start_url="u",
    goal="g",
    seed=-(2**63),
    trial=0,
    policy_id="p",
    policy_kind="llm",
    model="m",
    agent="a",
    sampling={"temperature": 0.7, "top_k": 5, "beams": 2},
    outcome_reward=1.1,
    raw_reward=-2.0,
    success=False,
    self_reported_success=True,
    terminated=True,
    truncated=False,
    end_reason="env_done",
    final_answer="42",
    labels=(Label(kind="judge", labeler="gpt", name="n", value=0.5, reason="so"), Label(kind="human")),
    parent_episode_id="parent",
    branch_step=3,
    started_at=NOON,
    duration_s=1.5,
    tokens_in=10,
    tokens_out=0,
    cost_usd=0.01,
    uri="/logs/x.jsonl",
    sha256="ff",
    licence="MIT",
    adapter_version="3",
    quality_flags=("odd", "odder"),
    extra={"k": {"nested": [True, None, 1.5]}},
)
BARE = Episode(source="chat", native_id="run 8", steps=(Step(step=0, observation="o", action="a"),))


def stored(folder: Path, episodes: list[Episode]) -> Store:
    """A store without the ingest: `add` redacts, and has tests of its own."""
    store = Store.create(folder / "store")
    heads, steps = rows.arrow([rows.convert(episode, "i") for episode in episodes])
    store.append("steps", pa.Table.from_batches([steps]))
    store.append("episodes", pa.Table.from_batches([heads]))
    return store


def test_the_episode_with_everything_has_everything():
    """So that a new field cannot be forgotten."""
    for item in (FULL, STEP):
        assert [f.name for f in fields(item) if getattr(item, f.name) is None] == []


def test_every_field_comes_back(tmp_path):
    store = stored(tmp_path, [BARE, FULL])
    episodes = list(read_episodes(store))
    assert [e.native_id for e in episodes] == ["run 7", "run 8"]  # a null dataset is last
    assert episodes == [FULL, BARE]
    for episode, row in zip(episodes, store.connect().sql("FROM episodes ORDER BY dataset").fetchall(), strict=True):
        assert rows.convert(episode, "x").content_hash == row[1]


@pytest.mark.parametrize(
    ("given", "back"),
    [
        ({"screenshot": {"sha256": None, "status": "missing"}}, {"screenshot": {"status": "missing"}}),
        ({"target": {"ref": 4}}, {"target": {"ref": "4"}}),  # a ref is text in the store
        ({"target": {}}, {}),
        ({"target": None, "extra": {"target": {"mine": 1}}}, {}),  # an extra that only looks like a moved key
        ({"target": {"tag": "a"}, "extra": {"target": "mine"}}, {}),
        ({"candidates": ()}, {}),
        ({"extra": {}}, {"extra": None}),
    ],
)
def test_what_the_store_writes_otherwise(tmp_path, given, back):
    episode = replace(BARE, steps=(replace(BARE.steps[0], **given),))
    (got,) = read_episodes(stored(tmp_path, [episode]))
    assert got == replace(BARE, steps=(replace(BARE.steps[0], **(given | back)),))
    assert rows.convert(got, "x").content_hash == rows.convert(episode, "x").content_hash


def test_the_shop_comes_back_in_order_and_in_batches(tmp_path):
    episodes = [e for e in jsonl.read(SHOP) if isinstance(e, Episode)][::20]
    store = stored(tmp_path, episodes)
    ids = [row[0] for row in store.connect().sql("SELECT episode_id FROM episodes ORDER BY episode_id").fetchall()]
    whole = list(read_episodes(store))
    assert [rows.episode_id(e.source, e.dataset, e.native_id) for e in whole] == ids
    assert len(whole) == 50
    assert {e.native_id: e for e in whole} == {e.native_id: e for e in episodes}
    assert list(read_episodes(store, batch=7)) == whole


def test_where(tmp_path):
    store = stored(tmp_path, [BARE, FULL])
    assert [e.native_id for e in read_episodes(store, "success IS NULL -- none said")] == ["run 8"]
    assert [e.native_id for e in read_episodes(store, "false OR n_steps = 2")] == ["run 7"]
    assert list(read_episodes(store, "false")) == []
    for wrong in ("colour = 3", "success AND", "goal::INT > 0"):
        with pytest.raises(UserError, match="no condition on the view episodes"):
            list(read_episodes(store, wrong))
