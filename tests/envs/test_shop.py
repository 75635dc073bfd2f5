"""The shop's rules and pages."""

import functools
import hashlib

import numpy as np
import orjson
import pytest

from offline_lm.envs.shop import WRONG_SIZE, Site, Task, record

GAMMA = 0.95


@functools.cache
def task(n=0, site=0):
    return Task(Site.draw(site), n)


@pytest.mark.parametrize("n", range(3))
def test_the_way_to_the_target_by_hand(n):
    """Search, (next page,) product, size, buy."""
    clicks = 4 if task(n).target < 3 else 5
    assert task(n).mdp.optimal(GAMMA)[0][0] == pytest.approx(GAMMA ** (clicks - 1))


@pytest.mark.parametrize("horizon", [6, 12])
def test_a_longer_way_by_hand(horizon):
    """Search, next page until the last two, product, size, buy: what the target is worth shrinks by each click."""
    for n in range(3):
        t = Task(Site.draw(0), n, horizon)
        clicks = horizon - 1 if t.target < 3 else horizon
        assert t.mdp.optimal(GAMMA)[0][0] == pytest.approx(GAMMA ** (clicks - 1), abs=1e-12)
        assert t.mdp.limit == 3 * horizon
        empty = t.mdp.states.index(("results", t.nouns[0], 1 if horizon > 6 else 0))
        assert not any(p.title in a for a in t.mdp.actions[empty] for p in t.products)
        assert {p for _, p in (s[1:] for s in t.mdp.states if s[:2] == ("results", t.nouns[0]))} == {
            *range(horizon - 3)
        }
    with pytest.raises(ValueError, match="takes 5 clicks at least, not 4"):
        Task(Site.draw(0), 0, 4)


def test_what_a_purchase_is_worth():
    t, mdp = task(), task().mdp
    index = {s: i for i, s in enumerate(mdp.states)}
    results = ("results", t.nouns[0], t.target // 3)
    wrong_size = next(s for s in t.sizes if s != t.size)
    buy = f"click[{t.site.wording['buy']}]"

    def reward(product, size, table=mdp.reward):
        s = index["product", product, size, results]
        a = mdp.actions[s].index(buy)
        assert mdp.next[s, a] == -1
        return table[s, a]

    assert reward(t.target, t.size) == 1.0
    assert reward(t.target, wrong_size) == reward(t.target, None) == WRONG_SIZE
    assert reward(t.target, t.size, mdp.mistaken) == 0.0
    neighbour = next(i for i in t._shelves[results[1:]] if i != t.target)
    assert reward(neighbour, t.size) == 0.0
    assert mdp.optimal(GAMMA)[0][index["queue",]] == 0.0


@pytest.mark.parametrize("n", range(6))
def test_the_page_shows_all_that_decides_a_value(n):
    """States with one text have one value; they may differ in where "back" leads, for the product on two shelves."""
    t = task(n).mdp
    _, q = t.optimal(GAMMA)
    seen = {}
    for s, page in enumerate(t.pages):
        seen.setdefault(page, []).append(s)
    assert len(seen) > 0.9 * len(t.states)
    for first, *others in seen.values():
        for s in others:
            assert t.actions[s] == t.actions[first]
            np.testing.assert_allclose(q[s], q[first], atol=1e-12)
            assert t.states[s][:3] == t.states[first][:3]
            assert t.states[s][1] == 6
    assert t.goal not in "".join(seen)
    for page, actions in zip(t.pages, t.actions, strict=True):
        for action in actions:
            assert action in page or action[6:-1] in page


def test_a_goal_names_its_target_alone():
    for n in range(8):
        t = task(n)
        words = [(p.colour, p.material, p.noun) for p in t.products]
        assert [i for i, attributes in enumerate(words) if all(w in t.mdp.goal for w in attributes)] == [t.target]
        assert t.size in t.mdp.goal


def test_the_log_of_a_seed_stays_as_it_is():
    """Byte by byte but for the last digits of a logarithm, in which libms differ."""
    episodes = list(record([task(n) for n in range(6)], 4, seed=0))
    for e in episodes:
        for step in e["steps"]:
            step["behavior_logprob"] = round(step["behavior_logprob"], 9)
    digest = hashlib.sha256(b"\n".join(map(orjson.dumps, episodes))).hexdigest()
    assert digest == "d0976859f7850e7e019f8d8e72448caae58dbab21c00256572d716c8c3717f8b"
