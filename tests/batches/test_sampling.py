"""Which episodes an update trains on: shares, probabilities and epochs by hand; a function of seed and step alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from offline_lm.batches import sampling
from offline_lm.batches.replay import Replay, episode_batches, select
from offline_lm.batches.sampling import Sampler, episode_priority, sampler, uniform
from offline_lm.batches.sampling_store import from_store, ingested
from offline_lm.errors import UserError
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.store.maintain import compact
from offline_lm.types import Episode, Step

NAN = np.nan
OPTIONS = {
    "strategy": "uniform", "capacity": None, "mix": None, "half_life": 1000.0, "alpha": 0.6, "beta": 1.0,
    "td_run": "latest",
}  # fmt: skip


def chances(made):
    """Of each draw from the only stratum."""
    (only,) = made.strata
    assert only.probability is not None
    return only.probability


def replay_of(lengths, held_out=(), success=None, ids=None):
    offsets = np.r_[0, np.cumsum(lengths)]
    n, e = int(offsets[-1]), len(lengths)
    ids = ids or [f"{i:03d}" for i in range(e)]
    held = np.isin(np.arange(e), held_out)
    none = np.zeros(n, bool)
    step = np.arange(n) - np.repeat(offsets[:-1], lengths)
    success = np.zeros(e) if success is None else np.asarray(success, float)
    return Replay(ids, offsets, step, ids, ~none, np.zeros(n), none, np.zeros(n), none, success, held)


def first(batches, n):
    return list(itertools.islice(batches, n))


def same(left, right):
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


# -- uniform: as it was before there were strategies -------------------------------------------------------------


def as_it_was(offsets, usable, sizes, seed, *, at_least=None, at_most=None):
    """The loops of `episode_batches` and `token_batches` before `Sampler`, written as they were."""
    rng, batch, held = np.random.default_rng(seed), [], 0
    while True:
        for e in rng.permutation(usable):
            if at_most is not None and batch and held + sizes[e] > at_most:
                yield np.concatenate(batch)
                batch, held = [], 0
            batch.append(np.arange(offsets[e], offsets[e + 1]))
            held += sizes[e]
            if at_least is not None and held >= at_least:
                yield np.concatenate(batch)
                batch, held = [], 0


@pytest.mark.parametrize("size", [1, 7, 64, 900])
def test_uniform_batches_are_bit_for_bit_what_they_were(size):
    rng = np.random.default_rng(1)
    replay = replay_of(rng.integers(1, 9, 40), held_out=[0, 7, 39])
    usable = np.flatnonzero(~replay.held_out)
    old = as_it_was(replay.offsets, usable, np.diff(replay.offsets), 5, at_least=size)
    assert same(first(episode_batches(replay, size, 5), 60), first(old, 60))
    sizes = rng.integers(1, 400, 40)  # many exceed the smaller budgets alone
    old = as_it_was(replay.offsets, usable, sizes, 5, at_most=size)
    new = uniform(~replay.held_out, 5).batches(sizes, at_most=size)
    assert same([sampling.rows_of(replay.offsets, e) for e in first(new, 60)], first(old, 60))


# -- a function of (seed, step) ------------------------------------------------------------------------------------

E = 30
SUCCESS = np.where(np.arange(E) % 5 == 0, 1.0, 0.0)
HALVES = {"logged": (0.7, np.arange(E) < 20), "fresh": (0.3, np.arange(E) >= 20)}
GIVEN = {
    "uniform": {},
    "success": {"success": SUCCESS},
    "recency": {"order": np.arange(E)[::-1], "half_life": 4.0},
    "td": {"priority": np.arange(E) / E},
}


@pytest.mark.parametrize("sources", [None, HALVES], ids=["all", "mix"])
@pytest.mark.parametrize("strategy", sampling.STRATEGIES)
def test_a_step_is_drawn_again_whatever_was_drawn_before(strategy, sources):
    sizes = np.random.default_rng(2).integers(1, 9, E)
    eligible = np.arange(E) % 7 != 3

    def drawn(seed, start, n):
        made = sampler(eligible, seed, strategy, sources=sources, **GIVEN[strategy])
        return first(made.batches(sizes, at_least=40, start=start), n)

    whole = drawn(0, 0, 40)
    for step in (1, 17, 39):
        assert same(drawn(0, step, 1), whole[step : step + 1])
    assert same(drawn(0, 12, 28), whole[12:])
    assert not same(drawn(1, 0, 40), whole)
    assert len({tuple(batch) for batch in whole}) > 35  # and steps differ
    assert set(np.concatenate(whole)) <= set(np.flatnonzero(eligible))
    for batch in whole:
        assert 40 <= sizes[batch].sum() < 40 + 8


@pytest.mark.parametrize("strategy", sampling.STRATEGIES)
def test_what_comes_later_or_is_not_eligible_changes_no_draw(strategy):
    """The replay of a later snapshot, in which the episodes that came since are not eligible, has other numbers."""
    rng = np.random.default_rng(0)
    lengths, success, priority, age = rng.integers(1, 9, E), SUCCESS, rng.random(E), rng.permutation(E)
    now = replay_of(lengths, success=success, ids=[f"{i:03d}" for i in range(0, 2 * E, 2)])
    order = np.argsort([f"{i:03d}" for i in (*range(0, 2 * E, 2), *range(1, 2 * E, 2))])

    def grown(x, more):
        return np.concatenate([x, np.full(E, more)])[order]

    ids = [f"{i:03d}" for i in range(2 * E)]
    new = np.flatnonzero(grown(np.zeros(E), 1))
    later = replay_of(grown(lengths, 3), held_out=new, success=grown(success, 1), ids=ids)
    made = [
        sampler(~r.held_out, 0, strategy, success=r.success, order=o, priority=p, half_life=5.0)
        for r, o, p in ((now, age, priority), (later, grown(age, 99), grown(priority, 99.0)))
    ]
    # `start`: growing while training goes on is a sampler made anew, at the step that comes next
    draws = [m.batches(np.diff(r.offsets), at_least=25, start=6) for m, r in zip(made, (now, later), strict=True)]
    for a, b in itertools.islice(zip(*draws, strict=True), 10):
        assert [now.episode_ids[e] for e in a] == [later.episode_ids[e] for e in b]
    # once they are eligible they are drawn
    grown_set = replace(later, held_out=np.zeros(2 * E, bool))
    made = sampler(
        ~grown_set.held_out, 0, strategy, success=later.success, order=grown(age, 99), priority=grown(priority, 99.0)
    )
    seen = np.concatenate(first(made.batches(np.diff(later.offsets), at_least=25, start=6), 30))
    assert np.isin(seen, new).mean() > 0.3


# -- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5), (0.9, 0.1), (0.25, 0.3, 0.45), (0.1, 0.2, 0.3, 0.4)], ids=lambda s: "+".join(map(str, s))
)
@pytest.mark.parametrize("strategy", ["uniform", "success", "recency"])
def test_every_batch_holds_the_shares_up_to_rounding_and_all_together_too(shares, strategy):
    """Episodes of one source are long, of others short: a rounding anew in each batch would favour the long."""
    k, rng = len(shares), np.random.default_rng(0)
    source = rng.integers(0, k, 200)
    success = (rng.random(200) < 0.2).astype(float)
    sizes = 1 + 9 * (source == 0) + 3 * (success == 0) + rng.integers(0, 3, 200)
    sources = {f"s{i}": (share, source == i) for i, share in enumerate(shares)}
    made = sampler(np.ones(200, bool), 0, strategy, sources=sources, success=success, order=np.arange(200))
    strata = len(made.strata)
    group = np.zeros(200, int)
    for i, stratum in enumerate(made.strata):
        group[stratum.episodes] = i
    want = np.array([stratum.share for stratum in made.strata])
    assert want.sum() == pytest.approx(1)
    assert strata == (2 * k if strategy == "success" else k)
    for kind in ({"at_least": 40}, {"at_most": 25}):
        off, total = [], np.zeros(strata)
        for batch in first(made.batches(sizes, **kind), 300):
            here = np.bincount(group[batch], minlength=strata)
            off.append(np.abs(here - len(batch) * want).max())
            if k == 2:  # a source is rounded up or down, and so are the successes of its episodes
                mine = (source[batch] == 0).sum()
                assert abs(mine - len(batch) * shares[0]) < 1
                if strategy == "success":
                    assert abs(success[batch][source[batch] == 0].sum() - mine / 2) < 1
            total += here
        assert max(off) < (1 if strata == 2 else 2)
        assert np.abs(total - total.sum() * want).max() < 2


def test_shares_hold_where_a_batch_is_one_episode():
    fresh = np.arange(E) >= 27
    made = sampler(np.ones(E, bool), 0, sources={"logged": (0.5, ~fresh), "fresh": (0.5, fresh)})
    drawn = first(made.batches(np.ones(E, int), at_least=1), 100)
    assert {len(batch) for batch in drawn} == {1}
    assert fresh[np.concatenate(drawn)].sum() == 50


@pytest.mark.parametrize("strategy", ["uniform", "success"])
def test_every_stratum_is_drawn_without_replacement_within_its_epochs(strategy):
    made = sampler(np.ones(E, bool), 3, strategy, sources=HALVES, success=SUCCESS)
    drawn = np.concatenate(first(made.batches(np.ones(E, int), at_least=11), 60))
    for stratum in made.strata:
        mine = drawn[np.isin(drawn, stratum.episodes)]
        n = len(stratum.episodes)
        epochs = mine[: len(mine) // n * n].reshape(-1, n)
        assert len(epochs) > 5
        assert (np.sort(epochs, axis=1) == stratum.episodes).all()
        assert len({tuple(epoch) for epoch in epochs}) > 1 or n < 3


# -- strategies ------------------------------------------------------------------------------------------------------


def frequencies(made, n=400):
    drawn = np.concatenate(first(made.batches(np.ones(E, int), at_least=100), n))
    return np.bincount(drawn, minlength=E) / len(drawn)


def close(seen, want, n=40_000):
    """Within five standard errors of `n` independent draws."""
    return (np.abs(seen - want) < 5 * np.sqrt(want * (1 - want) / n) + 1e-12).all()


def test_recency_halves_by_its_half_life():
    order = np.random.default_rng(0).permutation(E)  # the newest has the greatest
    seen = frequencies(sampler(np.ones(E, bool), 0, "recency", order=order, half_life=3.0))
    want = 0.5 ** ((E - 1 - order) / 3)
    assert close(seen, want / want.sum())
    assert seen[order == E - 1] / seen[order == E - 4] == pytest.approx(2, abs=0.15)


def test_td_goes_by_priority_to_alpha_and_its_weights_undo_that():
    """Schaul et al. 2015, equations in sections 3.3 and 3.4, by hand."""
    priority = np.r_[0.0, 1.0, 4.0, 9.0, np.full(E - 4, NAN)]
    eligible = np.arange(E) < 5
    made = sampler(eligible, 0, "td", priority=priority, alpha=0.5, beta=1.0)
    p = np.array([0, 1, 2, 3, 3]) / 9  # square roots; who is new has the greatest
    seen = frequencies(made)[:5]
    drawn = chances(made)
    np.testing.assert_allclose(drawn[1:], p[1:], rtol=2e-3)
    assert close(seen[1:], p[1:] * (1 - drawn[0]))
    assert 0 < drawn[0] < 1e-3  # seldom, not never
    full, half, none = (replace(made, beta=beta).weights(E)[:5] for beta in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(full[1:] / full[1], [1, 1 / 2, 1 / 3, 1 / 3], rtol=1e-5)
    np.testing.assert_allclose(half**2, full / full.max(), rtol=1e-9)
    assert none.tolist() == [1.0] * 5
    assert full.max() == 1
    # what a batch's weighted mean tends to is the plain mean over episodes
    x = np.array([5.0, -1.0, 2.0, 7.0, 3.0])
    weighted = made.strata[0].probability * full
    assert (weighted * x).sum() / weighted.sum() == pytest.approx(x.mean())
    assert made.weights(E)[5:].tolist() == [0.0] * (E - 5)


def test_alpha_0_is_uniform_and_other_strategies_have_no_weights():
    priority = np.linspace(0, 1, E)
    assert close(frequencies(sampler(np.ones(E, bool), 0, "td", priority=priority, alpha=0.0)), np.full(E, 1 / E))
    for strategy in ("uniform", "success", "recency"):
        assert sampler(np.ones(E, bool), 0, strategy, **GIVEN[strategy]).weights(E).tolist() == [1.0] * E


def test_the_priority_of_an_episode_is_its_mean_error_where_known():
    td = np.array([1.0, -3.0, NAN, NAN, NAN, -0.5])
    got = episode_priority(td, np.array([0, 3, 5, 6]))
    assert got == pytest.approx([2.0, NAN, 0.5], nan_ok=True)


def test_success_without_a_class_is_uniform_and_says_so():
    sizes = np.ones(E, int)
    for success, none in ((np.zeros(E), "succeeded"), (np.full(E, 0.5), "succeeded"), (np.ones(E), "failed")):
        made = sampler(np.ones(E, bool), 7, "success", success=success)
        assert made.said == (f"strategy=success: no episode {none}, so all {E} are drawn uniformly",)
        plain = uniform(np.ones(E, bool), 7)
        assert same(first(made.batches(sizes, at_least=9), 9), first(plain.batches(sizes, at_least=9), 9))
    unknown = np.where(np.arange(E) < 4, NAN, SUCCESS)
    made = sampler(np.ones(E, bool), 7, "success", success=unknown)
    assert made.said == ("strategy=success: 4 episodes of unknown outcome are not drawn",)
    assert (frequencies(made, 5)[:4] == 0).all()


def test_capacity_keeps_the_newest_eligible():
    order = np.random.default_rng(0).permutation(E)
    eligible = order < 25  # the newest five are held out
    made = sampler(eligible, 0, capacity=6, order=order)
    assert sorted(order[made.strata[0].episodes]) == [19, 20, 21, 22, 23, 24]
    assert len(made) == 6
    assert len(sampler(eligible, 0, capacity=26, order=order)) == 25


def test_length_counts_what_is_held_not_what_was_inserted():
    """Trap 12 of DESIGN section 7: a counter of inserts goes on past the capacity, to rows that are not there."""
    inserts, lengths = 0, []
    for n in (3, 5, 9, 14):
        lengths += [2] * (n - len(lengths))
        inserts += 2 * n
        replay = replay_of(lengths)
        made = sampler(~replay.held_out, 0, capacity=6, order=np.arange(n))
        assert len(replay) == 2 * n == replay.offsets[-1] == len(replay.step)
        assert len(made) == min(n, 6)
        seen = np.unique(np.concatenate(first(made.batches(np.diff(replay.offsets), at_least=8), 40)))
        assert seen.tolist() == list(range(n))[-6:]
    assert inserts > len(replay) > 2 * len(made)  # what a counter of inserts would say


def test_what_is_not_given_or_not_known_is_refused():
    with pytest.raises(ValueError, match="strategy=newest"):
        sampler(np.ones(E, bool), 0, "newest")
    for strategy, name in (("success", "success"), ("recency", "order"), ("td", "priority")):
        with pytest.raises(ValueError, match=f"{name} is wanted"):
            sampler(np.ones(E, bool), 0, strategy)
    with pytest.raises(ValueError, match="at_least and at_most"):
        next(Sampler((), 0).batches(np.ones(E, int)))
    with pytest.raises(UserError, match=r"no episode of fresh .* share of 0\.3"):
        sampler(np.arange(E) < 20, 0, sources=HALVES)


# -- from a store ----------------------------------------------------------------------------------------------------


def episode(name, n=2, **kwargs):
    steps = tuple(Step(step=t, observation=f"{name} {t}", action=f"a{t}", reward=0.0) for t in range(n))
    return Episode(source=kwargs.pop("source", "test"), native_id=name, task_id=name, steps=steps, **kwargs)


def selected(db, held_out=0.0):
    return select(db, where="true", gamma=0.9, truncated="outcome", held_out=held_out, seed=0)


def from_(db, store, replay, **options):
    return from_store(db, store, replay, seed=0, **{**OPTIONS, **options})


def names(replay, made):
    return sorted(replay.tasks[e] for stratum in made.strata for e in stratum.episodes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three ingests: old (a), newer (b, of another source), newest (c); `started_at` runs the other way round."""
    store = Store.create(tmp_path_factory.mktemp("sampling") / "store")
    day = "2026-01-{:02d}T00:00:00+00:00"
    from datetime import datetime

    for i, letter in enumerate("abc"):
        some = [
            episode(
                f"{letter}{n}", policy_id=f"p-{letter}", source="other" if letter == "b" else "test",
                started_at=datetime.fromisoformat(day.format(20 - 5 * i + n)),
            )
            for n in range(4)
        ]  # fmt: skip
        assert add(store, some)["accepted"] == 4
        assert add(store, some)["duplicates"] == 4  # trap 12: an insert that holds nothing new
    return store


def test_capacity_goes_by_started_at_else_by_ingest(store, tmp_path):
    with store.connect() as db:
        replay = selected(db)
        assert (len(replay.episode_ids), len(replay)) == (12, 24)  # of 24 and 48 that were sent
        made = from_(db, store, replay, capacity=5)
        assert names(replay, made) == ["a0", "a1", "a2", "a3", "b3"]
        assert made.said == ("capacity=5: the newest of 12 training episodes, by started_at",)
        assert from_(db, store, replay, capacity=12).said == ()
    timeless = Store.create(tmp_path / "store")
    for letter in "zyx":
        add(timeless, [episode(f"{letter}{n}") for n in range(4)])
    for compacted in (False, True):
        if compacted:
            assert compact(timeless)["episodes"]["after"] == 1
        with timeless.connect() as db:
            replay = selected(db)
            made = from_(db, timeless, replay, capacity=5)
        assert names(replay, made) == ["x0", "x1", "x2", "x3", "y3"]
        assert "order of ingest (12 of 12 episodes have no started_at)" in made.said[0]
    assert ingested(Store.create(tmp_path / "empty")) == []


def test_recency_from_a_store(store):
    with store.connect() as db:
        replay = selected(db)
        made = from_(db, store, replay, strategy="recency", half_life=1.0)
        p = dict(zip(replay.tasks, chances(made).tolist(), strict=True))
    assert p["a3"] == pytest.approx(1 / 2, rel=1e-3)
    assert [p["a2"] / p["a3"], p["b3"] / p["a0"], p["c0"] / p["a3"]] == pytest.approx([1 / 2, 1 / 2, 1 / 2**11])


def test_a_mix_by_source_by_policy_and_by_condition(store):
    with store.connect() as db:
        replay = selected(db)
        made = from_(
            db, store, replay, mix={"other": 0.5, "p-a": 0.25, "last": {"where": "task_id > 'c'", "share": 0.25}}
        )
        assert [sorted({replay.tasks[e][0] for e in s.episodes}) for s in made.strata] == [["b"], ["a"], ["c"]]
        assert [s.share for s in made.strata] == [0.5, 0.25, 0.25]
        assert made.said == ()
        made = from_(db, store, replay, mix={"other": 1})
        assert made.said == ("mix: 8 of 12 training episodes are of no source, and are not drawn",)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (
            {"nobody": 1.0},
            "data.sampling.mix.nobody: no selected episode is of it; there are source other, test and po",
        ),
        ({"other": 0.5}, "sum to 0.5"),
        ({"other": 0.5, "p-b": 0.5}, "data.sampling.mix.p-b: 4 of its episodes are of other, too"),
        ({"other": 0}, "a share above 0"),
        ({"other": True}, "a share above 0"),
        ({"other": {"share": 1.0}}, "a share above 0"),
        ({"x": {"where": "sight = 3", "share": 1.0}}, "data.sampling.mix.x.where='sight = 3' is not a condition"),
    ],
)
def test_a_mix_that_cannot_be(store, mix, message):
    with store.connect() as db, pytest.raises(UserError) as error:
        from_(db, store, selected(db), mix=mix)
    assert message in str(error.value)


def test_a_source_that_capacity_empties_is_told(store):
    with store.connect() as db, pytest.raises(UserError, match="no episode of p-c is held"):
        from_(db, store, selected(db), capacity=4, mix={"p-a": 0.5, "p-c": 0.5})


def test_td_errors_of_a_run_are_the_priorities(store):
    with store.connect() as db:
        replay = selected(db)
    rows = [
        {"run_id": "r", "episode_id": replay.episode_ids[e], "step": int(replay.step[n]), "td_error": error}
        for n, e in enumerate(replay.episode_of)
        if (error := {"a0": -1.0, "b0": 4.0, "c0": 16.0}.get(replay.tasks[e])) and (replay.tasks[e] != "c0" or n % 2)
    ]
    store.append("runs", [{"run_id": "r", "status": "finished"}, {"run_id": "blind", "status": "failed"}])
    store.append("values", rows)
    with store.connect() as db:
        made = from_(db, store, replay, strategy="td", alpha=0.5)
        p = dict(zip(replay.tasks, chances(made).tolist(), strict=True))
        assert [p["b0"] / p["a0"], p["c0"] / p["a0"], p["b2"] / p["a0"]] == pytest.approx([2, 4, 4], rel=1e-5)
        assert made.said == ("strategy=td: priorities of r; 9 that it has not seen have its greatest",)
        assert made.beta == 1
        with pytest.raises(UserError, match="td_run=blind has no TD error"):
            from_(db, store, replay, strategy="td", td_run="blind")
        with pytest.raises(UserError, match="no run `nope`"):
            from_(db, store, replay, strategy="td", td_run="nope")
