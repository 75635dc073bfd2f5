"""`advantages(method)` by hand, against the tensor functions of losses/, and against ope/credit.py."""

import json

import duckdb
import numpy as np
import pytest
import torch

from offline_lm.envs.exact import End, TextMDP
from offline_lm.losses.groups import group_advantages
from offline_lm.losses.returns import discounted_returns, gae, next_values, td_residuals
from offline_lm.ope import credit
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Episode, Step

LAMBDA = 0.8
ENDED, CUT = {"terminated": True}, {"truncated": True}


def episode(name, task, rewards, end, *, final=False, **kwargs):
    last = len(rewards) - 1
    steps = [
        Step(step=t, observation=f"{name} {t}", action=f"a{t}", reward=r, **(end if t == last else {}))
        for t, r in enumerate(rewards)
    ]
    if final:
        steps.append(Step(step=last + 1, observation=f"{name} end", is_final_observation=True))
    return Episode(source="test", native_id=name, task_id=task, steps=tuple(steps), **kwargs)


def filled(folder, episodes):
    """A store, and the id of each episode."""
    store = Store.create(folder / "store")
    assert add(store, episodes)["accepted"] == len(episodes)
    ids = dict(store.connect().execute("SELECT provenance.native_id, episode_id FROM episodes").fetchall())
    return store, [ids[e.native_id] for e in episodes]


def scored(store, run, ids, v, q=None, **config):
    """Values of a run: `v` of each step of each episode, a final observation included, and `q` of each decision."""
    store.append("runs", [{"run_id": run, "status": "finished", "config": json.dumps(config)}])
    rows = []
    for e, values in v.items():
        after = [*(q[e] if q else []), *[None] * len(values)]
        for t, x in enumerate(values):
            rows.append({"run_id": run, "episode_id": ids[e], "step": t, "v": x, "q": after[t]})
    store.append("values", rows)


def asked(db, call):
    """(run, episode) -> advantages in order of steps; None is NaN."""
    found = {}
    for run, e, advantage in db.execute(f"SELECT run_id, episode_id, advantage FROM {call} ORDER BY step").fetchall():
        found.setdefault((run, e), []).append(np.nan if advantage is None else advantage)
    return found


# -- by hand -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    episodes = [
        episode("won", "t", [0.0, 0.5, 1.0], ENDED, success=True),
        episode("cut", "t", [0.0, 0.5], CUT, final=True, success=False),
        episode("alone", "u", [1.0], ENDED, success=True),
    ]
    store, ids = filled(tmp_path_factory.mktemp("small"), episodes)
    v, q = {0: [0.1, 0.2, 0.3], 1: [0.4, 0.5, 0.6]}, {0: [0.3, 0.1, 0.9], 1: [0.2, 0.7]}
    scored(store, "r", ids, v, q, algo={"gamma": 0.5}, data={"truncated": "outcome"})
    scored(store, "no discount", ids, {0: [0.1, 0.2, 0.3]})
    with store.connect() as db:
        yield db, ids


@pytest.mark.parametrize(
    ("call", "won", "cut"),
    [
        ("'reinforce'", [0.5, 1.0, 1.0], [0.25, 0.5]),
        ("'reinforce_trajectory'", [0.5, 0.5, 0.5], [0.25, 0.25]),
        ("'mc'", [0.4, 0.8, 0.7], [-0.15, 0.0]),
        ("'reinforce_v'", [0.4, 0.8, 0.7], [-0.15, 0.0]),
        ("'td'", [0.0, 0.45, 0.7], [-0.15, 0.3]),
        ("'td0'", [0.0, 0.45, 0.7], [-0.15, 0.3]),
        ("'gae', lambda_ := 0.8", [0.4 * (0.45 + 0.4 * 0.7), 0.45 + 0.4 * 0.7, 0.7], [-0.15 + 0.4 * 0.3, 0.3]),
        ("'gae'", [0.475 * (0.45 + 0.475 * 0.7), 0.45 + 0.475 * 0.7, 0.7], [-0.15 + 0.475 * 0.3, 0.3]),
        ("'archer'", [0.2, -0.1, 0.6], [-0.2, 0.2]),
        ("'grpo'", [0.5**0.5] * 3, [-(0.5**0.5)] * 2),
        ("'dr_grpo'", [0.5] * 3, [-0.5] * 2),
        ("'td', gamma := 1", [0.1, 0.6, 0.7], [0.1, 0.6]),
        ("'reinforce', gamma := 1", [1.5, 1.5, 1.0], [0.5, 0.5]),
    ],
)
def test_by_hand(small, call, won, cut):
    db, ids = small
    found = asked(db, f"advantages({call})")
    assert found["r", ids[0]] == pytest.approx(won, abs=1e-15)
    assert found["r", ids[1]] == pytest.approx(cut, abs=1e-15)
    assert ("r", ids[2]) not in found  # it did not score this one


def test_a_row_says_what_it_was_made_of(small):
    db, ids = small
    sql = "SELECT step, method, target, baseline FROM advantages(?) WHERE run_id = 'r' AND episode_id = ? ORDER BY step"

    def parts(method):
        return db.execute(sql.replace("?", f"'{method}'", 1), [ids[1]]).fetchall()

    assert parts("mc") == [(0, "mc", 0.25, 0.4), (1, "mc", 0.5, 0.5)]
    assert parts("archer") == [(0, "archer", 0.2, 0.4), (1, "archer", 0.7, 0.5)]
    assert parts("dr_grpo") == [(0, "dr_grpo", 0.5, 1.0), (1, "dr_grpo", 0.5, 1.0)]
    assert parts("reinforce") == [(0, "reinforce", 0.25, 0.0), (1, "reinforce", 0.5, 0.0)]
    (_, _, first, _), (_, _, last, _) = parts("gae")  # TD(lambda)'s target
    assert [first, last] == pytest.approx([0.5 * (0.05 * 0.5 + 0.95 * 0.8), 0.5 + 0.5 * 0.6])


def test_without_a_critic_no_run_is_needed(small):
    db, ids = small
    assert asked(db, "advantages('reinforce')")[None, ids[0]] == [1.5, 1.5, 1.0]
    assert asked(db, "advantages('reinforce', gamma := 0.5)")[None, ids[2]] == [1.0]
    assert asked(db, "advantages('grpo')")[None, ids[2]] == [0.0]
    assert {run for run, _ in asked(db, "advantages('mc')")} == {"r", "no discount"}


def test_a_run_without_a_discount_has_none_until_one_is_given(small):
    db, ids = small
    key = "no discount", ids[0]
    assert np.isnan(asked(db, "advantages('td')")[key][:2]).all()
    assert asked(db, "advantages('td', gamma := 0.5)")[key] == pytest.approx([0.0, 0.45, 0.7])
    assert asked(db, "advantages('grpo')")[key] == [0.0] * 3  # the other episode of the task is none of its own


def test_an_unknown_method_is_refused(small):
    with pytest.raises(duckdb.Error, match="no method ppo: there are reinforce, reinforce_trajectory, mc"):
        small[0].sql("FROM advantages('ppo')").fetchall()


# -- against the tensor functions ----------------------------------------------------------------------------------

RUNS = {"a": (0.9, "outcome", 1), "b": (0.5, "unknown", 2)}  # discount, data.truncated, every n-th episode is scored


def ragged():
    """Episodes of 1 to 7 steps of 8 tasks with every end, and some rewards that were not logged."""
    rng = np.random.default_rng(3)
    kinds = [(ENDED, {"success": True}), (ENDED, {}), (CUT, {"success": False}), (CUT, {})]
    episodes = []
    for i in range(48):
        rewards = rng.normal(size=rng.integers(1, 8)).tolist()
        if rng.random() < 0.15:
            rewards[rng.integers(len(rewards))] = None
        end, outcome = kinds[rng.integers(4)]
        task = 7 if i == 0 else i % 7  # a group of one
        if task == 6:
            rewards = [0.1, 0.2] if i % 3 else [0.3]  # a group without spread, but for rounding
        episodes.append(episode(f"e{i}", f"t{task}", rewards, end, final=bool(rng.integers(2)), **outcome))
    return episodes


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    episodes = ragged()
    store, ids = filled(tmp_path_factory.mktemp("ragged"), episodes)
    rng = np.random.default_rng(4)
    critics = {}
    for run, (gamma, truncated, every) in RUNS.items():
        v = {i: rng.normal(size=len(e.steps)).tolist() for i, e in enumerate(episodes) if i % every == 0}
        q = {i: rng.normal(size=sum(not s.is_final_observation for s in episodes[i].steps)).tolist() for i in v}
        scored(store, run, ids, v, q, algo={"gamma": gamma}, data={"truncated": truncated})
        critics[run] = v, q
    with store.connect() as db:
        yield db, episodes, ids, critics


def by_tensors(episodes, v, q, gamma, truncated):
    """Method -> advantages [n] of the decisions of the episodes in `v`, in float64; NaN where unknown."""
    decisions = {i: [s for s in episodes[i].steps if not s.is_final_observation] for i in v}
    flat = [step for steps in decisions.values() for step in steps]
    offsets = torch.tensor([0, *np.cumsum([len(steps) for steps in decisions.values()])])
    reward = torch.tensor([np.nan if s.reward is None else s.reward for s in flat], dtype=torch.float64)
    continues = torch.tensor([0.0 if s.terminated else 1.0 for s in flat], dtype=torch.float64)
    value = torch.tensor([x for i in v for x in v[i][: len(decisions[i])]], dtype=torch.float64)
    # after the last decision: the value of the final observation, or unknown
    final = torch.tensor([[*x, np.nan][len(decisions[i])] for i, x in v.items()], dtype=torch.float64)
    later = next_values(value, offsets, final_values=final)

    counts = {i: not s[-1].truncated or (episodes[i].success is not None and truncated == "outcome")
              for i, s in decisions.items()}  # fmt: skip
    lengths = offsets.diff()
    cut_off = torch.tensor([not x for x in counts.values()]).repeat_interleave(lengths)
    returns = discounted_returns(reward.masked_fill(cut_off, torch.nan), continues, offsets, gamma=gamma)
    residuals = td_residuals(reward, continues, value, later, gamma=gamma)
    # as in tests/batches/test_replay.py: a step without a residual ends the sum, and is masked
    known = ~residuals.isnan()
    args = reward.where(known, value), continues.where(known, 0.0), value, later.nan_to_num(0.0)
    decayed = gae(*args, offsets, gamma=gamma, lam=LAMBDA).masked_fill(~known, torch.nan)

    total = torch.stack([x.sum() for x in reward.masked_fill(cut_off, torch.nan).split(lengths.tolist())])
    labelled = ~total.isnan()
    groups = torch.tensor([int(episodes[i].task_id[1:]) for i in v])[labelled]
    relative = {}
    for name in ("grpo", "dr_grpo"):
        of_episode = torch.full_like(total, torch.nan)
        of_episode[labelled], _ = group_advantages(total[labelled], groups, divide_by_std=name == "grpo")
        relative[name] = of_episode.repeat_interleave(lengths)
    return relative | {
        "reinforce": returns,
        "reinforce_trajectory": returns[offsets[:-1]].repeat_interleave(lengths),
        "mc": returns - value,
        "td": residuals,
        f"gae', lambda_ := '{LAMBDA}": decayed,
        "archer": torch.tensor([x for i in v for x in q[i][: len(decisions[i])]], dtype=torch.float64) - value,
    }


@pytest.mark.parametrize("run", RUNS)
def test_every_method_is_that_of_the_tensors(logged, run):
    db, episodes, ids, critics = logged
    gamma, truncated, _ = RUNS[run]
    v, q = critics[run]
    for method, want in by_tensors(episodes, v, q, gamma, truncated).items():
        found = {e: x for (name, e), x in asked(db, f"advantages('{method}')").items() if name == run}
        assert found.keys() == {ids[i] for i in v}, method
        got = np.concatenate([found[ids[i]] for i in v])
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13, err_msg=method)
        assert 0 < np.isnan(got).sum() < len(got) / 2 or method == "archer", method
    assert {len(found[ids[i]]) for i in v} >= {1, 2, 5}


def test_groups_without_a_run_are_all_episodes_of_a_task(logged):
    db, episodes, ids, _ = logged
    everything = {i: [0.0] * len(e.steps) for i, e in enumerate(episodes)}
    want = by_tensors(episodes, everything, everything, 1.0, "outcome")
    for method in ("grpo", "dr_grpo", "reinforce"):
        found = asked(db, f"advantages('{method}')")
        got = np.concatenate([found[None, e] for e in ids])
        np.testing.assert_allclose(got, want[method], rtol=1e-11, atol=1e-13)


def test_one_episode_has_the_rows_that_it_has_among_all(logged):
    """A filter reaches the files, but not the group that an episode is held against."""
    db, _, ids, _ = logged
    for method in ("gae", "grpo"):
        found = asked(db, f"advantages('{method}')")
        one = asked(db, f"advantages('{method}') WHERE run_id = 'a' AND episode_id = '{ids[12]}'")
        assert list(one) == [("a", ids[12])]
        assert one["a", ids[12]] == pytest.approx(found["a", ids[12]], nan_ok=True)


# -- against ope/credit.py -----------------------------------------------------------------------------------------


def hall():
    """Two doors in a row, of which one may walk on and on; four steps at most."""
    moves = {
        ("a",): [("left", End(0.0, 0.0)), ("right", ("b",))],
        ("b",): [("stay", ("b",)), ("back", ("a",)), ("door", End(1.0, 0.0))],
    }
    return TextMDP.explore(("a",), lambda s: (s[0], moves[s]), benchmark="hall", seed=0, number=0, goal="Out.", limit=4)


def test_estimators_are_those_of_credit(tmp_path):
    """The critic is `td_table` of the log itself. At the limit an episode has failed; TD goes on from its last page."""
    gamma, lam, n = 0.9, 0.6, 24
    mdp = hall()
    tasks = credit.Tasks.stack([mdp], [np.where(mdp.next != -2, 0.5, 0.0)])
    logs = credit.sample(tasks, episodes=n, resamples=1, seed=0)
    assert (logs.continues[logs.ends] == 1).any()
    episodes = [
        episode(f"e{i}", "hall", logs.reward[a:b].tolist(), CUT if logs.continues[b - 1] else ENDED,
                final=bool(logs.continues[b - 1]), success=bool(logs.reward[b - 1]))
        for i, (a, b) in enumerate(zip(logs.offsets[:-1], logs.offsets[1:], strict=True))
    ]  # fmt: skip
    store, ids = filled(tmp_path, episodes)

    size, n_actions = tasks.next.shape
    table = credit.td_table(logs.state, logs.following, logs.reward, logs.continues, size, gamma=gamma)
    following = np.where(logs.continues != 0, table[logs.following], 0.0)
    pair = logs.state * n_actions + logs.action
    q = credit.mean_table(pair, logs.reward + gamma * following, size * n_actions)[pair]
    spans = list(zip(logs.offsets[:-1].tolist(), logs.offsets[1:].tolist(), strict=True))
    v = {i: [*table[logs.state[a:b]], *following[b - 1 : b][logs.continues[b - 1 : b] == 1]]
         for i, (a, b) in enumerate(spans)}  # fmt: skip
    scored(store, "r", ids, v, {i: q[a:b].tolist() for i, (a, b) in enumerate(spans)}, algo={"gamma": gamma})

    calls = {
        credit.Estimator("reinforce"): "'reinforce'",
        credit.Estimator("grpo"): "'grpo'",
        credit.Estimator("dr_grpo"): "'dr_grpo'",
        credit.Estimator("mc", "td_table"): "'mc'",
        credit.Estimator("td", "td_table", 0.0): "'td'",
        credit.Estimator("gae", "td_table", lam): f"'gae', lambda_ := {lam}",
        credit.Estimator("archer", "td_table"): "'archer'",
    }
    want = dict(credit.estimates(logs, tasks, gamma=gamma, lambdas=[lam], tau=0.8, group=n))
    with store.connect() as db:
        for estimator, call in calls.items():
            found = asked(db, f"advantages({call})")
            got = np.concatenate([found["r", e] for e in ids])
            np.testing.assert_allclose(got, want[estimator], rtol=1e-11, atol=1e-13, err_msg=call)
