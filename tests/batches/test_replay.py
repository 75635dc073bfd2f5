"""What a run trains on: rows, returns and masks of a store, the same numbers as its SQL, and the split."""

import math

import numpy as np
import pytest
import torch

from offline_lm.batches.pack import pack
from offline_lm.batches.replay import episode_batches, select, split, steps, token_batches
from offline_lm.errors import UserError
from offline_lm.losses.returns import gae, next_values, td_residuals
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Episode, Step

GAMMA, LAMBDA = 0.5, 0.8
NAN = math.nan


def episode(name, rewards, *, final=False, end=None, observation="{name} {t}", task=None, **kwargs):
    n = len(rewards)
    steps = [
        Step(
            step=t,
            observation=observation.format(name=name, t=t),
            action=f"a{t}",
            reward=r,
            **(end or {} if t == n - 1 else {}),
        )
        for t, r in enumerate(rewards)
    ]
    if final:
        steps.append(Step(step=n, observation=observation.format(name=name, t=n), is_final_observation=True))
    return Episode(source="test", native_id=name, task_id=task or name, steps=tuple(steps), **kwargs)


ENDED, CUT = {"terminated": True}, {"truncated": True}
EPISODES = (
    episode("won", [0, 0, 1], end=ENDED, success=True),
    episode("won, final logged", [0, 0.67], end=ENDED, final=True, outcome_reward=0.67),
    episode("cut, labelled", [0, 0.5], end=CUT, success=False),
    episode("cut, labelled, final", [0, 0.5], end=CUT, final=True, success=False),
    episode("cut", [0, 0.5], end=CUT),
    episode("cut, final", [0, 0.5], end=CUT, final=True),
    episode("unlabelled", [0, None], end=ENDED),
    episode("the same page again and again", [0, 0, 1], end=ENDED, final=True, observation="page", success=True),
)


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("replay") / "store")
    assert add(store, EPISODES)["accepted"] == len(EPISODES)
    rng = np.random.default_rng(0)
    with store.connect() as reader:
        rows = reader.execute("SELECT episode_id, step FROM steps").fetchall()
    store.append("values", [{"run_id": "r", "episode_id": e, "step": t, "v": float(rng.normal())} for e, t in rows])
    with store.connect() as connection:
        yield connection


def selected(db, **options):
    return select(
        db, **{"where": "true", "gamma": GAMMA, "truncated": "outcome", "held_out": 0.0, "seed": 0, **options}
    )


def of(replay, name, column):
    e = replay.tasks.index(name)
    return getattr(replay, column)[replay.offsets[e] : replay.offsets[e + 1]].tolist()


def test_returns_by_hand(db):
    replay = selected(db)
    want = {
        "won": [0.25, 0.5, 1],
        "won, final logged": [0.335, 0.67, NAN],
        "cut, labelled": [0.25, 0.5],
        "cut, labelled, final": [0.25, 0.5, NAN],
        "cut": [NAN, NAN],
        "cut, final": [NAN, NAN, NAN],
        "unlabelled": [NAN, NAN],
        "the same page again and again": [0.25, 0.5, 1, NAN],
    }
    for name, returns in want.items():
        assert of(replay, name, "returns") == pytest.approx(returns, nan_ok=True), name


def test_a_step_limit_may_leave_the_return_unknown(db):
    replay = selected(db, truncated="unknown")
    assert of(replay, "cut, labelled", "returns") == pytest.approx([NAN, NAN], nan_ok=True)
    assert of(replay, "won", "returns") == [0.25, 0.5, 1]


def test_only_termination_stops_bootstrapping(db):
    replay = selected(db)
    want = {
        "won": [True, True, True],
        "won, final logged": [True, True, False],
        "cut, labelled": [True, False],
        "cut, labelled, final": [True, True, False],
        "cut": [True, False],
        "cut, final": [True, True, False],
        "unlabelled": [True, False],
    }
    for name, mask in want.items():
        assert of(replay, name, "bootstraps") == mask, name
    assert of(replay, "won", "terminated") == [False, False, True]
    assert of(replay, "won, final logged", "terminated") == [False, True, False]
    assert of(replay, "cut, labelled, final", "terminated") == [False, False, False]


def test_the_reward_is_counted_once_in_its_own_type_at_its_own_step(db):
    replay = selected(db)
    assert of(replay, "won", "reward") == [0, 0, 1]
    assert of(replay, "won, final logged", "reward") == [0, 0.67, 0]
    assert of(replay, "the same page again and again", "reward") == [0, 0, 1, 0]
    assert of(replay, "unlabelled", "reward") == pytest.approx([0, NAN], nan_ok=True)
    assert of(replay, "won, final logged", "acted") == [True, True, False]
    assert replay.success[replay.tasks.index("won, final logged")] == 0.67
    assert replay.steps_to_end[replay.offsets[:-1]].tolist() == (np.diff(replay.offsets) - 1).tolist()


def table(db, sql, replay):
    """A column of a table macro on the rows of `replay`, NaN where it has none."""
    found = {(e, t): x for e, t, x in db.execute(sql).fetchall()}
    ids = np.asarray(replay.episode_ids)[replay.episode_of]
    return np.array([found.get(key) for key in zip(ids, replay.step.tolist(), strict=True)], float)


def test_returns_are_those_of_sql(db):
    replay = selected(db)
    sql = table(db, f'SELECT episode_id, step, "return" FROM discounted_returns({GAMMA})', replay)
    np.testing.assert_allclose(replay.returns, sql, rtol=1e-12)
    assert np.isfinite(sql).sum() == 3 + 2 + 2 + 2 + 3


def test_residuals_and_advantages_are_those_of_sql(db):
    """How the tensors are called: a step whose end was not logged counts as r = V, continue = 0, then is masked.

    Its residual is 0 and the trace behind it is cut, so that the sum of the step before ends there, bootstrapped.
    """
    replay = selected(db)
    v = torch.from_numpy(table(db, "SELECT episode_id, step, v FROM stored_values", replay))
    offsets, known = torch.from_numpy(replay.offsets), torch.from_numpy(replay.bootstraps)
    later = next_values(v, offsets)
    rewards = torch.from_numpy(replay.reward).where(known, v)
    continues = torch.from_numpy(1.0 - replay.terminated).where(known, 0.0)
    delta = td_residuals(rewards, continues, v, later, gamma=GAMMA)
    advantage = gae(rewards, continues, v, later, offsets, gamma=GAMMA, lam=LAMBDA)
    sql = {
        "td_residual": table(db, f"SELECT episode_id, step, td_residual FROM td_residuals('r', {GAMMA})", replay),
        "advantage": table(
            db, f"SELECT episode_id, step, advantage FROM gae_advantages('r', {GAMMA}, {LAMBDA})", replay
        ),
    }
    for got, want in zip((delta, advantage), sql.values(), strict=True):
        np.testing.assert_array_equal(np.isnan(want), ~replay.bootstraps)
        np.testing.assert_allclose(got[known], want[replay.bootstraps], rtol=1e-12, atol=1e-14)
    # a truncated end with its final observation bootstraps from it, and one without is not treated as an end
    e = replay.tasks.index("cut, final")
    n = int(replay.offsets[e])
    assert sql["td_residual"][n + 1] == pytest.approx(0.5 + GAMMA * v[n + 2].item() - v[n + 1].item())
    n = int(replay.offsets[replay.tasks.index("cut")])
    assert sql["advantage"][n] == pytest.approx(GAMMA * v[n + 1].item() - v[n].item())


def test_texts_of_some_episodes_alone(db):
    replay = selected(db)
    wanted = [replay.episode_ids[i] for i in (5, 1)]
    found = list(steps(db, "task_id LIKE '%' OR true", wanted))
    assert {row["episode_id"] for row in found} == set(wanted)
    assert found == [row for row in steps(db, "true") if row["episode_id"] in wanted]
    assert list(steps(db, "true", [])) == []


def test_where_selects_episodes(db):
    replay = selected(db, where="task_id LIKE 'won%'")
    assert sorted(replay.tasks) == ["won", "won, final logged"]
    texts = list(steps(db, "task_id LIKE 'won%'"))
    won = replay.episode_ids[replay.tasks.index("won")]
    assert [row["observation"] for row in texts if row["episode_id"] == won] == ["won 0", "won 1", "won 2"]
    assert [row["episode_id"] for row in texts] == list(np.asarray(replay.episode_ids)[replay.episode_of])


@pytest.mark.parametrize(
    "where",
    [
        "no_such_column = 1",
        "task_id =",
        "task_id = 3",
        "no_such_function(task_id)",
        "regexp_matches(task_id, '(')",
        "task_id = $a",
        "99999999999999999999::INT > 1",
        "task_id = 'x'; DROP VIEW episodes",
    ],
)
def test_what_is_no_condition_is_the_users_mistake_told_in_one_line(db, where):
    with pytest.raises(UserError) as error:
        selected(db, where=where)
    message = str(error.value)
    assert message.startswith(f"data.where={where!r} is not a condition over the view `episodes`: ")
    assert "\n" not in message
    assert "LINE" not in message
    assert "JOIN" not in message  # our query around it


def test_selecting_nothing_is_the_users_mistake(db, tmp_path):
    with pytest.raises(UserError, match="selects none of the store's 8 episodes"):
        selected(db, where="task_id = 'x'")
    with pytest.raises(UserError, match="the store holds no episodes"):
        selected(Store.create(tmp_path).connect())


# -- the split -------------------------------------------------------------------------------------------------

TASKS = [f"task {i % 10}" for i in range(40)]


def both_sides(held_out):
    sides = [{t for t, h in zip(TASKS, held_out, strict=True) if h == side} for side in (True, False)]
    return sides[0] & sides[1]


@pytest.mark.parametrize("seed", range(5))
def test_no_task_is_on_both_sides(seed):
    held_out = split(TASKS, 0.3, seed)
    assert both_sides(held_out) == set()
    assert held_out.sum() == 12
    by_file_order = np.arange(40) >= 28
    assert len(both_sides(by_file_order)) == 10  # what is guarded against


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    assert (split(TASKS, 0.3, 0) == split(TASKS[::-1], 0.3, 0)[::-1]).all()
    assert len({split(TASKS, 0.3, seed).tobytes() for seed in range(8)}) > 1


@pytest.mark.parametrize(
    ("tasks", "share", "n"), [(["a"], 0.5, 0), (["a", "b"], 0.01, 1), (["a", "b"], 0.99, 1), (["a", "b"], 0, 0)]
)
def test_a_split_leaves_something_to_train_on(tasks, share, n):
    assert split(tasks, share, 0).sum() == n


def test_batches_are_whole_training_episodes(db):
    replay = selected(db, held_out=0.4)
    assert replay.held_out.sum() == 3
    batches = episode_batches(replay, 6, seed=0)
    seen = np.zeros(len(replay), int)
    for _ in range(40):
        rows = next(batches)
        assert 6 <= len(rows) < 6 + 4
        starts = np.flatnonzero(np.isin(rows, replay.offsets[:-1]))
        for part in np.split(rows, starts[1:]):
            e = int(replay.episode_of[part[0]])
            assert part.tolist() == list(range(replay.offsets[e], replay.offsets[e + 1]))
        np.add.at(seen, rows, 1)
    assert (seen[replay.held_out_rows] == 0).all()
    trained = seen[~replay.held_out_rows]
    assert trained.min() > 5
    assert trained.max() - trained.min() <= 1


def test_token_batches_are_whole_episodes_within_a_budget_of_packed_tokens(shop):
    replay, tokens = shop.replay, shop.tokens
    size = {}
    for e in np.flatnonzero(~replay.held_out).tolist():
        rows = np.arange(replay.offsets[e], replay.offsets[e + 1])
        responses = [[tokens.branch_ptr[n]] if tokens.acted[n] else [] for n in rows]
        prompts, _ = pack(tokens, rows, [[] for _ in rows])
        size[e] = len(prompts) + sum(len(tokens.response(a)) for several in responses for a in several)
        ids, _ = pack(tokens, rows, responses)
        assert len(ids) <= size[e]  # fewer where an episode repeats state and action
    budget = int(np.quantile(list(size.values()), 0.8)) * 2
    batches = token_batches(replay, tokens, budget, seed=0)
    later = token_batches(replay, tokens, budget, seed=0, start=5)
    drawn = [next(token_batches(replay, tokens, budget, seed=0, start=step)).tolist() for step in range(5)]
    assert [next(batches).tolist() for _ in range(6)] == [*drawn, next(later).tolist()]
    batches = token_batches(replay, tokens, budget, seed=0)
    seen, fill = [], []
    while len(seen) < 3 * len(size):
        rows = next(batches)
        episodes = replay.episode_of[rows]
        in_order = episodes[np.r_[True, np.diff(rows) != 1] | np.isin(rows, replay.offsets[:-1])].tolist()
        parts = [np.arange(replay.offsets[e], replay.offsets[e + 1]) for e in in_order]
        assert rows.tolist() == np.concatenate(parts).tolist()
        held = sum(size[e] for e in in_order)
        assert held <= budget or len(in_order) == 1
        if fill:
            assert fill[-1] + size[in_order[0]] > budget  # the batch before had no room for it
        fill.append(held)
        seen += in_order
    whole = [sorted(seen[i * len(size) : (i + 1) * len(size)]) for i in range(3)]
    assert whole == [sorted(size)] * 3
    assert seen[: len(size)] != seen[len(size) : 2 * len(size)]
