"""What a run writes back: every number stands beside the step that it belongs to, and what is unknown is null."""

from dataclasses import replace

import numpy as np
import pytest

from offline_lm.batches.replay import select, steps
from offline_lm.batches.tokens import tokenize
from offline_lm.models.backbone import train_tokenizer
from offline_lm.ope.diagnostics import Estimates, judge
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Candidate, Episode, Step
from offline_lm.values import candidate_values, compare, critic_alarms, log_alarms, stated_rewards, values

GAMMA = 0.5
OFFER = tuple(Candidate(action=a) for a in ("back", "click", "back"))


def episode(name, end, *, final):
    steps = [
        Step(step=0, observation="one", action="click", reward=0.0, candidates=OFFER),
        Step(step=1, observation="two", action="buy", reward=1.0, **end),
    ]
    if final:
        steps.append(Step(step=2, observation="three", is_final_observation=True))
    return Episode(source="test", native_id=name, task_id=name, goal="g", steps=tuple(steps), success=True)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("values") / "store")
    ended, cut = {"terminated": True}, {"truncated": True}
    log = [episode("won", ended, final=False), episode("cut", cut, final=True), episode("cut off", cut, final=False)]
    assert add(store, log)["accepted"] == 3
    db = store.connect()
    replay = select(db, where="true", gamma=GAMMA, truncated="outcome", held_out=0.0, seed=0)
    tokens = tokenize(list(steps(db, "true")), train_tokenizer(["one two three click buy back"], 300))
    yield store, db, replay, tokens
    db.close()


def estimates(replay, tokens, *, with_q=True):
    """V is the row's number in tenths; member i of Q is the response's number plus i."""
    v = np.arange(len(replay)) / 10
    if not with_q:
        return Estimates(v, None)
    ensemble = np.arange(len(tokens.response_ptr) - 1) + np.array([[1.0], [0.0]])
    return Estimates(v, ensemble.min(axis=0), ensemble)


def row_of(replay, task, step):
    return int(replay.offsets[replay.tasks.index(task)]) + step


def by_step(table, replay):
    """Row of the table for each (task, step)."""
    tasks = dict(zip(replay.episode_ids, replay.tasks, strict=True))
    return {(tasks[row["episode_id"]], row["step"]): row for row in table.to_pylist()}


def test_every_step_has_its_own_numbers(logged):
    _, _, replay, tokens = logged
    got = by_step(values("r", replay, tokens, estimates(replay, tokens), GAMMA), replay)
    assert len(got) == len(replay) == 7
    for (task, step), row in got.items():
        n = row_of(replay, task, step)
        assert (row["run_id"], row["split"], row["v"]) == ("r", "train", n / 10)
        if (task, step) == ("cut", 2):  # a final observation has V alone
            assert [row[k] for k in ("q", "q_ensemble", "advantage", "td_error", "return")] == [None] * 5
            continue
        q = float(tokens.branch_ptr[n])  # the executed response is a state's first
        assert row["q"] == q
        assert row["q_ensemble"] == [q + 1, q]
        assert row["advantage"] == pytest.approx(q - n / 10)
        assert row["return"] == (0.5, 1.0)[step]
        assert row["return_mask"] is True


def test_td_errors_by_hand(logged):
    _, _, replay, tokens = logged
    got = by_step(values("r", replay, tokens, estimates(replay, tokens, with_q=False), GAMMA), replay)
    v = {key: row["v"] for key, row in got.items()}
    want = {
        ("won", 0): 0 + GAMMA * v["won", 1] - v["won", 0],
        ("won", 1): 1 - v["won", 1],
        ("cut", 0): 0 + GAMMA * v["cut", 1] - v["cut", 0],
        ("cut", 1): 1 + GAMMA * v["cut", 2] - v["cut", 1],  # a step limit bootstraps from the final observation
        ("cut", 2): None,
        ("cut off", 0): 0 + GAMMA * v["cut off", 1] - v["cut off", 0],
        ("cut off", 1): None,  # and is unknown where there is none
    }
    for key, td in want.items():
        assert got[key]["td_error"] == (None if td is None else pytest.approx(td)), key
        assert got[key]["bootstrap_mask"] == (td is not None), key
        assert got[key]["advantage"] == got[key]["td_error"], key  # of a critic of states alone
        assert got[key]["q"] is got[key]["q_ensemble"] is None


def test_a_step_that_was_too_long_to_read_has_no_value(logged):
    _, _, replay, tokens = logged
    n = row_of(replay, "won", 1)
    usable = np.arange(len(replay)) != n
    lacking = replace(tokens, usable=usable)
    got = by_step(values("r", replay, lacking, estimates(replay, tokens, with_q=False), GAMMA), replay)
    assert got["won", 1]["v"] is got["won", 1]["td_error"] is got["won", 0]["td_error"] is None
    assert got["won", 0]["v"] is not None


def test_every_candidate_has_the_q_of_its_response(logged):
    _, db, replay, tokens = logged
    got = by_step_and_candidate = {}
    table = candidate_values(db, "r", replay, tokens, estimates(replay, tokens))
    tasks = dict(zip(replay.episode_ids, replay.tasks, strict=True))
    for row in table.to_pylist():
        by_step_and_candidate[tasks[row["episode_id"]], row["step"], row["candidate"]] = row
    assert set(got) == {(task, 0, c) for task in replay.tasks for c in range(3)}
    for (task, _, c), row in got.items():
        first = int(tokens.branch_ptr[row_of(replay, task, 0)])
        assert row["action"] == OFFER[c].action
        assert row["executed"] == (c == 1)
        assert row["q"] == first + (0 if c == 1 else 1)  # "back" twice is one response


def test_no_q_no_candidates(logged):
    _, db, replay, tokens = logged
    assert candidate_values(db, "r", replay, tokens, estimates(replay, tokens, with_q=False)).num_rows == 0


def test_both_sides_are_judged_and_the_held_out_one_is_returned(logged):
    store, _, replay, tokens = logged
    sides = replace(replay, held_out=np.array([task == "won" for task in replay.tasks]))
    said = {"mine": estimates(replay, tokens), "constant": Estimates(np.full(len(replay), 0.5), None)}
    table = compare(store, "judged", sides, tokens, said, gamma=GAMMA, extra={"rank_v": 7.0})
    assert set(table) == {"mine", "constant"}
    v = said["mine"].v[sides.held_out_rows]
    assert table["mine"]["v_rmse"] == pytest.approx(np.sqrt(np.mean((v - [0.5, 1.0]) ** 2)))
    with store.connect() as db:
        rows = db.execute(
            "SELECT \"group\", split, value, n FROM diagnostics WHERE run_id = 'judged' AND name = 'v_rmse'"
        ).fetchall()
    train = judge(said["constant"], sides, tokens, ~sides.held_out_rows, gamma=GAMMA)["v_rmse"]
    got = {(critic, split): (value, n) for critic, split, value, n in rows}
    assert got["constant", "train"] == (pytest.approx(train), 5)
    assert got["mine", "held_out"] == (pytest.approx(table["mine"]["v_rmse"]), 2)
    assert len(got) == 4


def test_numbers_by_turn_and_site_stand_beside(logged):
    store, _, replay, tokens = logged
    said = {"mine": estimates(replay, tokens)}
    site = np.array(["shop", None, None], object)
    compare(store, "parts", replay, tokens, said, gamma=GAMMA, extra={"rank_v": 7.0}, site=site)
    with store.connect() as db:
        rows = db.sql("SELECT suite, name, value, n, extra FROM diagnostics WHERE run_id = 'parts'").fetchall()
    own = {name: value for suite, name, value, _, _ in rows if suite == "fit"}
    assert own["rank_v"] == 7.0
    parts = {(name, extra): (value, n) for suite, name, value, n, extra in rows if suite == "parts"}
    v, g = said["mine"].v[replay.acted], replay.returns[replay.acted]
    first = np.array([0, 2, 4])  # of the decisions
    assert parts["v_bias", '{"turn": "0"}'] == (pytest.approx((v - g)[first].mean()), 3)
    assert parts["v_bias", '{"site": "shop"}'] == (pytest.approx((v - g)[:2].mean()), 2)
    assert parts["td_rms", '{"steps_to_end": "1"}'][1] == 3


def test_alarms_are_rows_with_their_sentences(logged):
    store, db, replay, tokens = logged
    dead = Estimates(np.full(len(replay), 0.5), np.full(len(tokens.response_ptr) - 1, 0.5))
    table = compare(store, "alarmed", replay, tokens, {"q_mc": dead}, gamma=GAMMA)
    compared, raised = critic_alarms(
        store, "alarmed", replay, tokens, {"q_mc": dead}, table, log_alarms(db, replay, tokens), estimand="returns"
    )
    assert compared == {}  # three episodes are too few
    assert {alarm.name for alarm in raised} == {"dead_head"}
    with store.connect() as read:
        rows = read.sql(
            "SELECT name, \"group\", split, value, extra ->> 'sentence', (extra ->> 'threshold')::DOUBLE"
            " FROM diagnostics WHERE run_id = 'alarmed' AND suite = 'alarms'"
        ).fetchall()
    want = [(a.name, "q_mc", "train", a.value, a.sentence, a.threshold) for a in raised]
    assert sorted(rows) == sorted(want)


def test_rewards_that_pages_state(tmp_path):
    store = Store.create(tmp_path / "store")
    pages = {"won": "Your Score: 1.0", "lost": "Score: 0.5", "cut": "score:  1.0 and Score: 1.0"}

    def played(name, page):
        steps = (
            Step(step=0, observation=f"start of {name}", action="go", reward=0.0),
            Step(step=1, observation=page, action="stop", reward=1.0, terminated=True),
            Step(step=2, observation="reward: 7", is_final_observation=True),
        )
        return Episode(source="test", native_id=name, task_id=name, goal="g", steps=steps, success=True)

    log = [played(f"{kind}{i}", page) for kind, page in pages.items() for i in range(6 if kind == "won" else 3)]
    assert add(store, log)["accepted"] == 12
    with store.connect() as db:
        replay = select(db, where="true", gamma=GAMMA, truncated="outcome", held_out=0.0, seed=0)
        said = stated_rewards(db, replay.episode_ids)
        assert set(said) == {"score: 1.0"}  # the others stand in three episodes, or at an end
        won = {i for i, task in enumerate(replay.tasks) if task[:3] in ("won", "cut")}
        assert set(said["score: 1.0"].tolist()) == won
        assert len(said["score: 1.0"]) == len(won)
        assert stated_rewards(db, replay.episode_ids[:3]) == {}
