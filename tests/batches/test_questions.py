"""The questions of the representation stage: their answers are true, and held-out tasks are never asked about."""

from collections import defaultdict
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from offline_lm.batches.questions import draw, edited
from offline_lm.batches.tokens import tokenize


def drawn(shop, n, *, tokens=None, replay=None, goals_per_page=2, budget=1200, goals_first=0, seed=0):
    options = {
        "token_budget": budget, "goals_per_page": goals_per_page, "goals_first": goals_first, "seed": seed
    }  # fmt: skip
    return list(islice(draw(tokens or shop.tokens, replay or shop.replay, **options), n))


def structure(layout):
    """Lengths of the prompts, and of the branches behind each."""
    prompts = set(layout.prompt_ends.tolist())
    lengths, branches, at = [], [], -1
    for end in sorted([*prompts, *layout.branch_ends.tolist()]):
        if end in prompts:
            lengths.append(end - at)
            branches.append([])
        else:
            branches[-1].append(end - at)
        at = end
    return lengths, branches


def pieces(batch):
    """The row taken apart: prompts, branches, and which prompt each branch belongs to; as tuples of ids."""
    ids, at = batch.ids.tolist(), 0
    prompts, branches, owner = [], [], []
    for s, (p, lengths) in enumerate(zip(*structure(batch.layout), strict=True)):
        prompts.append(tuple(ids[at : at + p]))
        at += p
        for n in lengths:
            branches.append(tuple(ids[at : at + n]))
            owner.append(s)
            at += n
    assert at == len(ids)
    return prompts, branches, owner


def prompt(tokens, n):
    return tuple(tokens.prompt(n).tolist())


def responses(tokens, n):
    return [tuple(tokens.response(a).tolist()) for a in range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1])]


def goal_of(tokens, n):
    start, stop = tokens.goal_ptr[n]
    return prompt(tokens, n)[start:stop]


def training_rows(shop):
    return np.flatnonzero(~shop.replay.held_out_rows & shop.tokens.acted)


def standardised(shop):
    known = shop.replay.returns[training_rows(shop)]
    assert not np.isnan(known).any()
    return (shop.replay.returns - known.mean()) / known.std()


# -- stretches of episodes -------------------------------------------------------------------------------------


def test_stretches_are_steps_of_training_episodes_in_order(shop):
    tokens, replay, returns = shop.tokens, shop.replay, standardised(shop)
    logged = defaultdict(list)  # (state, executed action) -> rows
    for n in training_rows(shop).tolist():
        logged[prompt(tokens, n), responses(tokens, n)[0]].append(n)
    seen = {True: 0, False: 0}
    for batch in drawn(shop, 8):
        prompts, branches, owner = pieces(batch)
        columns = (batch.state, batch.action, batch.other, batch.after, batch.changed, batch.returns)
        assert len({len(column) for column in columns}) == 1
        for state, action, other, after, changed, returned in zip(*(c.tolist() for c in columns), strict=True):
            assert owner[action] == state
            rows = logged[prompts[state], branches[action]]
            rows = [n for n in rows if returned == pytest.approx(returns[n], abs=1e-5)]
            if after >= 0:
                assert after == state + 1
                rows = [n for n in rows if replay.steps_to_end[n] > 0 and prompt(tokens, n + 1) == prompts[after]]
                observed = [shop.rows[n]["observation"] != shop.rows[n + 1]["observation"] for n in rows]
                assert bool(changed) in observed
                seen[bool(changed)] += 1
            if other >= 0:
                assert owner[other] == state
                assert branches[other] != branches[action]
                assert any(branches[other] in responses(tokens, n)[1:] for n in rows)
            assert rows
            assert (other >= 0) == (len(responses(tokens, rows[0])) > 1)
    assert min(seen.values()) > 0


def test_what_was_said_is_the_executed_response_token_by_token(shop):
    for batch in drawn(shop, 3):
        _, branches, _ = pieces(batch)
        said = defaultdict(list)
        for branch, token in batch.said.tolist():
            said[branch].append(token)
        assert {branch: tuple(told) for branch, told in said.items()} == {a: branches[a] for a in batch.action.tolist()}


def test_returns_are_standardised_over_training_steps_and_unknown_ones_stay_so(shop):
    e = int(np.flatnonzero(~shop.replay.held_out)[0])
    unknown = shop.replay.episode_of == e
    scaled = replace(shop.replay, returns=np.where(unknown, np.nan, 7 + 100 * shop.replay.returns))
    rows = training_rows(shop)
    known = rows[~unknown[rows]]
    values = shop.replay.returns[known]
    wanted = (values - values.mean()) / values.std()
    batches = drawn(shop, 10, replay=scaled)
    got = np.concatenate([batch.returns.numpy() for batch in batches])
    assert np.isnan(got).any()
    got = got[~np.isnan(got)]
    assert len(np.unique(got)) > 5
    assert np.abs(got[:, None] - wanted).min(axis=1).max() < 1e-5


def test_the_next_token_is_asked_for_within_a_sequence_of_a_stretch_only(shop):
    batch = next(b for b in drawn(shop, 12, budget=4000) if len(b.goals))
    owner = np.asarray(pieces(batch)[2])
    of_goals = set(owner[batch.goals.flatten()].tolist())
    at = 0
    for s, (p, branches) in enumerate(zip(*structure(batch.layout), strict=True)):
        for length in [p + (branches[0] if branches else 0), *branches[1:]]:
            ids, targets = batch.ids[at : at + length].tolist(), batch.targets[at : at + length].tolist()
            assert targets == ([-100] * length if s in of_goals else [*ids[1:], -100])
            at += length
    assert at == len(batch.ids)
    assert 0 < len(of_goals) < len(batch.layout.prompt_ends)


def test_a_step_that_is_too_long_to_use_is_no_successor(shop):
    tokens, replay = shop.tokens, shop.replay
    e = next(e for e in np.flatnonzero(~replay.held_out) if np.diff(replay.offsets)[e] > 4)
    usable = np.ones(len(replay), bool)
    usable[replay.offsets[e] + 2] = False
    only = replace(replay, held_out=np.arange(len(replay.held_out)) != e)
    follows = {prompt(tokens, n): prompt(tokens, n + 1) for n in range(replay.offsets[e], replay.offsets[e + 1] - 1)}
    for batch in drawn(shop, 4, tokens=replace(tokens, usable=usable), replay=only):
        prompts, _, _ = pieces(batch)
        for state, after in zip(batch.state.tolist(), batch.after.tolist(), strict=True):
            assert after < 0 or follows[prompts[state]] == prompts[after]


# -- goals -----------------------------------------------------------------------------------------------------


def test_the_first_goal_is_the_pages_own_and_the_others_are_not(shop):
    tokens, returns = shop.tokens, standardised(shop)
    goals = {goal_of(tokens, n) for n in training_rows(shop)}
    assert len(goals) == 2
    own = defaultdict(set)  # (what stands before the goal, goal, what stands behind it) -> returns, is the action there
    for n in training_rows(shop).tolist():
        start, stop = tokens.goal_ptr[n]
        whole = prompt(tokens, n)
        for acted, end in ((False, ()), (True, responses(tokens, n)[0])):
            key = (whole[:start], whole[start:stop], whole[stop:] + end)
            own[key].add((round(returns[n], 4), acted))
    seen = {True: 0, False: 0}
    for batch in drawn(shop, 4, goals_first=10**9):
        prompts, branches, owner = pieces(batch)
        assert batch.goals.shape == (len(batch.goal_returns), 2)
        asked = zip(batch.goals.tolist(), batch.goal_returns.tolist(), batch.goal_acted.tolist(), strict=True)
        for (right, wrong), returned, acted in asked:
            assert owner[right] == owner[wrong]
            goal = next(g for g in goals if branches[right][: len(g)] == g)
            other = next(g for g in goals if branches[wrong][: len(g)] == g)
            rest = branches[right][len(goal) :]
            assert goal != other
            assert branches[wrong][len(other) :] == rest
            answers = own[prompts[owner[right]], goal, rest]
            assert any(returned == pytest.approx(g, abs=2e-4) and acted == a for g, a in answers)
            assert acted == (rest[-1] == shop.tokenizer.eos_token_id)
            seen[acted] += 1
    assert min(seen.values()) > 0.25 * sum(seen.values())


def test_the_runs_of_one_task_may_have_goals_of_their_own(shop):
    """As in MiniWoB, where every run of a task draws another goal: the page's own is that of its run."""
    rows = [dict(row) for row in shop.rows]
    for row, e in zip(rows, shop.replay.episode_of, strict=True):
        row["goal"] = f"{row['goal']} Number {e}"
    tokens = tokenize(rows, shop.tokenizer, max_tokens=400, history=2)
    contexts = defaultdict(set)
    for n in np.flatnonzero(~shop.replay.held_out_rows).tolist():
        contexts[prompt(tokens, n)[: tokens.goal_ptr[n, 0]]].add(goal_of(tokens, n))
    for batch in drawn(shop, 3, tokens=tokens, goals_per_page=4, goals_first=10**9):
        prompts, branches, owner = pieces(batch)
        assert len(batch.goals) > 0
        for asked in batch.goals.tolist():
            own = contexts[prompts[owner[asked[0]]]]
            assert any(branches[asked[0]][: len(g)] == g for g in own)
            assert len({branches[b] for b in asked}) == 4


def test_an_edited_goal_names_what_the_page_does_not_show():
    buy, order, a, red, blue, green, mug, lamp = range(8)
    page = np.array([red, mug, buy, 9, lamp], np.uint16)
    goal = np.array([buy, a, red, mug], np.uint16)
    cases = (
        ([buy, a, blue, mug], page, [buy, a, blue, mug]),
        ([buy, a, blue, lamp], page, None),  # one stretch, and the page shows a lamp
        ([order, a, green, mug], page, [buy, a, green, mug]),
        ([order, a, red, mug], page[page != buy], None),  # another wording: the page shows neither verb
        ([buy, a, red, mug], page, None),
        ([blue, green], page[page != buy], None),
    )
    for other, shown, expected in cases:
        found = edited(goal, np.array(other), shown)
        assert (None if found is None else found.tolist()) == expected


def test_pages_are_asked_about_their_goal_with_another_word(shop):
    """Some of the goals asked about are no training goal: one of their words is another's."""
    rows = [dict(row) for row in shop.rows]
    words = sorted({word for row in rows for word in row["goal"].split()})
    for row, e in zip(rows, shop.replay.episode_of, strict=True):  # many goals, alike
        row["goal"] = f"{row['goal']} or a {words[e % len(words)]}"
    tokens = tokenize(rows, shop.tokenizer, max_tokens=400, history=2)
    goals = {goal_of(tokens, n) for n in training_rows(shop)}
    edits = asked = 0
    for batch in drawn(shop, 6, tokens=tokens, goals_per_page=4, goals_first=10**9):
        _, branches, _ = pieces(batch)
        for own, *others in batch.goals.tolist():
            asked += 1
            assert any(branches[own][: len(g)] == g for g in goals)
            edits += any(all(branches[b][: len(g)] != g for g in goals) for b in others)
    assert 0 < edits <= asked


def test_logs_with_a_single_goal_have_no_goal_questions(shop):
    rows = [{**row, "goal": "Buy it."} for row in shop.rows]
    tokens = tokenize(rows, shop.tokenizer, max_tokens=400)
    for batch in drawn(shop, 3, tokens=tokens, goals_first=10**9):
        assert batch.goals.numel() == 0
        assert len(batch.goal_returns) == 0
        assert len(batch.action) > 0
        assert len(batch.ids) >= 1200


# -- what a batch holds ----------------------------------------------------------------------------------------


def test_held_out_episodes_are_never_drawn(shop):
    tokens, replay = shop.tokens, shop.replay
    sides = (np.flatnonzero(replay.held_out_rows), np.flatnonzero(~replay.held_out_rows))
    held, trained = ({prompt(tokens, n) for n in side} for side in sides)
    goals = {goal_of(tokens, n) for n in sides[0]}
    assert held
    assert held.isdisjoint(trained)
    for batch in drawn(shop, 10):
        prompts, branches, _ = pieces(batch)
        assert held.isdisjoint(prompts)
        assert not any(branch[: len(g)] == g for branch in branches for g in goals)


def test_goals_come_first_then_stretches_take_three_quarters(shop):
    seen, kinds = 0, set()
    for batch in drawn(shop, 12, budget=1600, goals_first=5000):
        later = bool(seen >= 5000)
        assert bool(len(batch.action)) == later
        assert len(batch.goals) > 0
        assert 1600 <= len(batch.ids) < 1600 + 800
        if later:
            _, _, owner = pieces(batch)
            asked = set(np.asarray(owner)[batch.goals.flatten()].tolist())
            lengths = np.asarray(batch.layout.lengths)
            assert 0.5 < 1 - lengths[list(asked)].sum() / lengths.sum() < 1
        kinds.add(later)
        seen += len(batch.ids)
    assert kinds == {True, False}


def test_the_seed_decides(shop):
    first, again, other = (drawn(shop, 2, seed=s) for s in (3, 3, 4))
    assert [b.ids.tolist() for b in first] == [b.ids.tolist() for b in again]
    assert [b.ids.tolist() for b in first] != [b.ids.tolist() for b in other]
