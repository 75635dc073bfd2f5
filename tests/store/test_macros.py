"""SQL macros against plain Python recursions in float64."""

import math
import random

import pytest

from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Episode, Step

GAMMA, LAMBDA = 0.9, 0.8


def episode(name, rewards, *, final=False, last=None, **kwargs):
    """Steps with ``rewards``; ``last`` are the flags of the last one."""
    n = len(rewards)
    steps = [
        Step(step=t, observation=f"{name} {t}", action=f"a{t}", reward=r, **(last or {} if t == n - 1 else {}))
        for t, r in enumerate(rewards)
    ]
    if final:
        steps.append(Step(step=n, observation=f"{name} end", is_final_observation=True))
    return Episode(source="test", native_id=name, task_id=name, steps=tuple(steps), **kwargs)


def filled(tmp_path, *episodes):
    store = Store.create(tmp_path / "store")
    assert add(store, episodes)["accepted"] == len(episodes)
    db = store.connect()
    ids = dict(db.execute("SELECT task_id, episode_id FROM episodes").fetchall())
    return store, ids


def column(db, call, episode_id, name):
    sql = f'SELECT "{name}" FROM {call} WHERE episode_id = ? ORDER BY step'
    return [row[0] for row in db.execute(sql, [episode_id]).fetchall()]


def returns(rewards, gamma):
    result, later = [], 0.0
    for reward in reversed(rewards):
        later = reward + gamma * later
        result.append(later)
    return result[::-1]


@pytest.mark.parametrize(
    ("rewards", "gamma", "expected"),
    [([0, 0, 1], 0.5, 0.25), ([1, 2, 3], 1, 6), ([], 0.9, 0.0), ([1, None], 0.9, None), ([0.67], 0.9, 0.67)],
)
def test_discounted_return(tmp_path, rewards, gamma, expected):
    db = Store.create(tmp_path).connect()
    assert db.execute("SELECT discounted_return(?::DOUBLE[], ?)", [rewards, gamma]).fetchall() == [(expected,)]


def test_td_residual(tmp_path):
    db = Store.create(tmp_path).connect()
    calls = ("(1, 1, 0.5, 2, 0.9)", "(1, false, 0.5, NULL, 0.9)", "(1, 1, 0, NULL, 1)")
    sql = "SELECT " + ", ".join(f"td_residual{call}" for call in calls)
    ((inner, terminal, unknown),) = db.execute(sql).fetchall()
    assert inner == pytest.approx(1 + 0.9 * 2 - 0.5)
    assert terminal == 0.5
    assert unknown is None


def test_returns_by_hand(tmp_path):
    store, ids = filled(
        tmp_path,
        episode("won", [0, 0, 1], last={"terminated": True}, success=True),
        episode("flag of the episode", [0, 0, 2], terminated=True),
        episode("unlabelled", [0, None], last={"terminated": True}),
        episode("cut, labelled", [0, 0, 0.5], last={"truncated": True}, success=False),
        episode("cut, not labelled", [1, 0, 0], last={"truncated": True}),
        episode("known not to have ended", [1, 0], terminated=False),
        episode("no flags", [1, 1]),
    )
    db = store.connect()

    def g(name):
        return column(db, "discounted_returns(0.5)", ids[name], "return")

    assert g("won") == [0.25, 0.5, 1.0]
    assert g("flag of the episode") == [0.5, 1.0, 2.0]
    assert g("unlabelled") == [None, None]
    assert g("cut, labelled") == [0.125, 0.25, 0.5]
    assert g("cut, not labelled") == [None, None, None]
    assert g("known not to have ended") == [None, None]
    assert g("no flags") == [1.5, 1.0]


def test_two_thousand_steps_stay_finite_and_exact(tmp_path):
    rng = random.Random(0)
    rewards = [rng.gauss(0, 1) for _ in range(2000)]
    store, ids = filled(tmp_path, episode("long", rewards, last={"terminated": True}))
    got = column(store.connect(), "discounted_returns(0.9)", ids["long"], "return")
    assert got == pytest.approx(returns(rewards, 0.9), rel=1e-12, abs=1e-12)
    assert all(math.isfinite(value) for value in got)


def with_values(tmp_path):
    store, ids = filled(
        tmp_path,
        episode("ended", [0.0, 0.5, 1.0], final=True, last={"terminated": True}),
        episode("cut with final", [0.0, 0.5, 1.0], final=True, last={"truncated": True}),
        episode("cut without", [0.0, 0.5, 1.0], last={"truncated": True}),
        episode("not scored", [0.0], last={"terminated": True}),
    )
    v = {
        "ended": [0.1, 0.2, 0.3, 9.0],
        "cut with final": [0.1, 0.2, 0.3, 0.4],
        "cut without": [0.1, 0.2, 0.3],
    }
    rows = [
        {"run_id": run, "episode_id": ids[name], "step": t, "v": x + shift}
        for run, shift in (("r", 0.0), ("other", 100.0))
        for name, values in v.items()
        for t, x in enumerate(values)
    ]
    store.append("values", rows)
    return store.connect(), ids


def test_td_residuals_by_hand(tmp_path):
    db, ids = with_values(tmp_path)

    def delta(name):
        return column(db, f"td_residuals('r', {GAMMA})", ids[name], "td_residual")

    first, second = 0 + 0.9 * 0.2 - 0.1, 0.5 + 0.9 * 0.3 - 0.2
    assert delta("ended") == pytest.approx([first, second, 1 - 0.3])
    assert delta("cut with final") == pytest.approx([first, second, 1 + 0.9 * 0.4 - 0.3])
    assert delta("cut without")[:2] == pytest.approx([first, second])
    assert delta("cut without")[2] is None
    assert delta("not scored") == []


def test_gae_by_hand(tmp_path):
    db, ids = with_values(tmp_path)

    def gae(name, lam=LAMBDA):
        return column(db, f"gae_advantages('r', {GAMMA}, {lam})", ids[name], "advantage")

    first, second = 0 + 0.9 * 0.2 - 0.1, 0.5 + 0.9 * 0.3 - 0.2
    gl = GAMMA * LAMBDA
    assert gae("ended") == pytest.approx([first + gl * (second + gl * 0.7), second + gl * 0.7, 0.7])
    cut = 1 + 0.9 * 0.4 - 0.3
    assert gae("cut with final") == pytest.approx([first + gl * (second + gl * cut), second + gl * cut, cut])
    assert gae("cut without")[:2] == pytest.approx([first + gl * second, second])
    assert gae("cut without")[2] is None
    assert gae("ended", 0) == pytest.approx([first, second, 0.7])
    v = [0.1, 0.2, 0.3]
    monte_carlo = [g - x for g, x in zip(returns([0.0, 0.5, 1.0], GAMMA), v, strict=True)]
    assert gae("ended", 1) == pytest.approx(monte_carlo)


def test_gae_of_two_thousand_steps(tmp_path):
    rng = random.Random(1)
    rewards, v = ([rng.gauss(0, 1) for _ in range(2000)] for _ in range(2))
    store, ids = filled(tmp_path, episode("long", rewards, last={"terminated": True}))
    store.append("values", [{"run_id": "r", "episode_id": ids["long"], "step": t, "v": x} for t, x in enumerate(v)])
    following = [*v[1:], 0.0]
    deltas = [r + GAMMA * n - x for r, n, x in zip(rewards, following, v, strict=True)]
    got = column(store.connect(), f"gae_advantages('r', {GAMMA}, {LAMBDA})", ids["long"], "advantage")
    assert got == pytest.approx(returns(deltas, GAMMA * LAMBDA), rel=1e-10, abs=1e-12)


def test_gae_starts_anew_where_a_residual_is_unknown(tmp_path):
    store, ids = filled(
        tmp_path,
        episode("no reward", [0.0, None, 1.0], last={"terminated": True}),
        episode("no value", [0.0, 0.0, 0.0, 1.0], last={"terminated": True}),
    )
    scored = {"no reward": {0: 0.1, 1: 0.2, 2: 0.3}, "no value": {0: 0.1, 1: 0.2, 3: 0.3}}
    store.append(
        "values",
        [
            {"run_id": "r", "episode_id": ids[name], "step": t, "v": v}
            for name, values in scored.items()
            for t, v in values.items()
        ],
    )
    call = f"gae_advantages('r', {GAMMA}, {LAMBDA})"
    first = 0.9 * 0.2 - 0.1
    for name in scored:
        got = column(store.connect(), call, ids[name], "advantage")
        assert got[1] is None
        assert [got[0], got[2]] == pytest.approx([first, 0.7])
