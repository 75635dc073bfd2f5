"""The representation stage: what it asks is true, it never asks held-out tasks, and a little of it is learnt."""

import copy
from itertools import islice

import numpy as np
import pytest
import torch

from offline_lm.batches.tokens import tokenize
from offline_lm.models.represent import Questions, Weights, draw, loss, train

PARTS = ("goal_swap", "returns", "next_token", "effect", "action_swap")


def weigh(**weights):
    """Weights of the parts named; 0 for the others."""
    return Weights(**{**dict.fromkeys(PARTS, 0.0), **weights})


ALL = weigh(**dict.fromkeys(PARTS, 1.0))


def drawn(shop, n, weights=ALL, *, tokens=None, replay=None, goals_per_page=2, budget=1200, seed=0):
    options = {"token_budget": budget, "goals_per_page": goals_per_page, "pairs_after": 0, "seed": seed}
    return list(islice(draw(tokens or shop.tokens, replay or shop.replay, weights, **options), n))


def pieces(batch):
    """The row taken apart: prompts, branches, and which prompt each branch belongs to; as tuples of ids."""
    ids, at = batch.ids.tolist(), 0
    prompts, branches, owner = [], [], []
    for s, (p, lengths) in enumerate(zip(batch.layout.prompts, batch.layout.branches, strict=True)):
        prompts.append(tuple(ids[at : at + p]))
        at += p
        for n in lengths:
            branches.append(tuple(ids[at : at + n]))
            owner.append(s)
            at += n
    assert at == len(ids)
    return prompts, branches, owner


def states(tokens, rows):
    return {tuple(tokens.prompt(n).tolist()) for n in rows}


def test_pairs_are_consecutive_states_of_training_episodes(shop):
    tokens, replay = shop.tokens, shop.replay
    follows = {}  # (state, executed action) -> what came after, and whether the page changed
    for n in np.flatnonzero(~replay.held_out_rows & tokens.acted & (replay.steps_to_end > 0)):
        first, stop = tokens.branch_ptr[n], tokens.branch_ptr[n + 1]
        options = [tuple(tokens.response(a).tolist()) for a in range(first, stop)]
        key = (tuple(tokens.prompt(n).tolist()), options[0])
        changed = shop.rows[n]["observation"] != shop.rows[n + 1]["observation"]
        follows.setdefault(key, set()).add((tuple(tokens.prompt(n + 1).tolist()), changed, tuple(options[1:])))
    seen = {True: 0, False: 0}
    for batch in drawn(shop, 8):
        prompts, branches, owner = pieces(batch)
        assert len(batch.action) > 0
        for action, after, changed, other in zip(batch.action, batch.after, batch.changed, batch.other, strict=True):
            known = follows[prompts[owner[action]], branches[action]]
            match = [(c, others) for page, c, others in known if page == prompts[after]]
            assert len(match) == 1
            assert bool(changed) == match[0][0]
            assert other == action + 1
            assert owner[other] == owner[action]
            assert branches[other] != branches[action]
            assert branches[other] in match[0][1]
            seen[bool(changed)] += 1
    assert min(seen.values()) > 0


def goal_of(shop, n):
    start, stop = shop.tokens.goal_ptr[n]
    return tuple(shop.tokens.prompt(n)[start:stop].tolist())


def test_the_first_goal_is_the_pages_own_and_the_others_are_not(shop):
    tokens, replay = shop.tokens, shop.replay
    train_rows = np.flatnonzero(~replay.held_out_rows & tokens.acted)
    goals = {goal_of(shop, n) for n in train_rows}
    assert len(goals) == 2
    own = {}  # what stands before the goal -> (own goal, what stands behind it)
    for n in train_rows:
        start, stop = tokens.goal_ptr[n]
        prompt = tokens.prompt(n)
        after, response = tuple(prompt[stop:].tolist()), tuple(tokens.response(tokens.branch_ptr[n]).tolist())
        own.setdefault(tuple(prompt[:start].tolist()), set()).update(
            {(goal_of(shop, n), after), (goal_of(shop, n), after + response)}
        )
    with_action = 0
    for batch in drawn(shop, 8):
        prompts, branches, owner = pieces(batch)
        assert batch.goals.shape[1] == 2
        for right, wrong in batch.goals.tolist():
            assert owner[right] == owner[wrong]
            goal = next(g for g in goals if branches[right][: len(g)] == g)
            other = next(g for g in goals if branches[wrong][: len(g)] == g)
            rest = branches[right][len(goal) :]
            assert (goal, rest) in own[prompts[owner[right]]]
            assert goal != other
            assert branches[wrong][len(other) :] == rest
            with_action += rest[-1] == shop.tokenizer.eos_token_id
    assert with_action > 0


def test_the_runs_of_one_task_may_have_goals_of_their_own(shop):
    """As in MiniWoB, where every run of a task draws another goal: the page's own is that of its run."""
    rows = [dict(row) for row in shop.rows]
    for row, e in zip(rows, shop.replay.episode_of, strict=True):
        row["goal"] = f"{row['goal']} Number {e}"
    tokens = tokenize(rows, shop.tokenizer, max_tokens=400, history=2)
    contexts = {}
    for n in np.flatnonzero(~shop.replay.held_out_rows).tolist():
        start, stop = tokens.goal_ptr[n]
        contexts.setdefault(tuple(tokens.prompt(n)[:start].tolist()), set()).add(
            tuple(tokens.prompt(n)[start:stop].tolist())
        )
    for batch in drawn(shop, 6, tokens=tokens, goals_per_page=4):
        prompts, branches, owner = pieces(batch)
        for asked in batch.goals.tolist():
            own = contexts[prompts[owner[asked[0]]]]
            assert any(branches[asked[0]][: len(g)] == g for g in own)
            assert len({branches[b] for b in asked}) == 4


def test_tasks_that_share_a_goal_are_not_asked_to_tell_them_apart(shop):
    rows = [{**row, "goal": "Buy it."} for row in shop.rows]
    tokens = tokenize(rows, shop.tokenizer, max_tokens=400)
    assert all(not len(batch.goals) for batch in drawn(shop, 3, tokens=tokens))
    assert drawn(shop, 1, weigh(goal_swap=1.0), tokens=tokens) == []


def test_held_out_episodes_are_never_drawn(shop):
    tokens, replay = shop.tokens, shop.replay
    held, trained = (states(tokens, np.flatnonzero(side)) for side in (replay.held_out_rows, ~replay.held_out_rows))
    assert held
    assert held.isdisjoint(trained)
    goals = {goal_of(shop, n) for n in np.flatnonzero(replay.held_out_rows)}
    pages = {p[: len(p) - 20] for p in held - trained}
    for batch in drawn(shop, 10):
        prompts, branches, _ = pieces(batch)
        assert not held & set(prompts)
        assert not any(branch[: len(g)] == g for branch in branches for g in goals)
    assert pages


def test_the_next_token_is_asked_for_within_a_sequence_of_a_pair_only(shop):
    (batch,) = drawn(shop, 1)
    of_goals = {int(s) for s in np.asarray(pieces(batch)[2])[batch.goals.flatten()]}
    at = 0
    for s, (p, branches) in enumerate(zip(batch.layout.prompts, batch.layout.branches, strict=True)):
        for length in [p + (branches[0] if branches else 0), *branches[1:]]:
            ids, targets = batch.ids[at : at + length].tolist(), batch.targets[at : at + length].tolist()
            assert targets == ([-100] * length if s in of_goals else [*ids[1:], -100])
            at += length
    assert at == len(batch.ids)
    assert 0 < len(of_goals) < len(batch.layout.prompts)


def test_returns_are_those_logged_and_told_before_or_behind_the_action(shop):
    tokens, replay = shop.tokens, shop.replay
    logged = {}
    for n in np.flatnonzero(~replay.held_out_rows & tokens.acted).tolist():
        start, prompt = tokens.goal_ptr[n, 0], tokens.prompt(n)
        response = tokens.response(tokens.branch_ptr[n]).tolist()
        for acted, end in ((0, []), (1, response)):
            key = (tuple(prompt[:start].tolist()), tuple([*prompt[start:].tolist(), *end]))
            logged.setdefault((key, acted), set()).add(np.float32(replay.returns[n]).item())
    seen = set()
    for batch in drawn(shop, 6):
        prompts, branches, owner = pieces(batch)
        for first, returned, acted in zip(batch.goals[:, 0], batch.returns.tolist(), batch.acted.tolist(), strict=True):
            assert returned in logged[(prompts[owner[first]], branches[first]), acted]
            seen.add(acted)
    assert seen == {0, 1}


def test_questions_about_pairs_begin_after_the_goals(shop):
    batches = islice(
        draw(shop.tokens, shop.replay, ALL, token_budget=800, goals_per_page=2, pairs_after=2000, seed=0), 6
    )
    seen, with_pairs = 0, []
    for batch in batches:
        assert bool(len(batch.action)) == (seen >= 2000)
        with_pairs.append(bool(len(batch.action)))
        seen += len(batch.ids)
    assert set(with_pairs) == {True, False}


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        (weigh(next_token=1), {"next_token"}),
        (weigh(effect=1), {"effect"}),
        (weigh(action_swap=1), {"action_swap"}),
        (weigh(goal_swap=1), {"goal_swap"}),
        (weigh(goal_swap=1, returns=1), {"goal_swap", "returns"}),
    ],
)
def test_a_weight_of_zero_switches_a_part_off(shop, weights, parts):
    torch.manual_seed(0)
    (batch,) = drawn(shop, 1, weights)
    assert set(loss(shop.model, Questions(16), batch, weights)) == parts


def test_before_training_a_question_is_a_coin_toss(shop):
    questions = Questions(16)
    for p in questions.parameters():
        torch.nn.init.zeros_(p)
    (batch,) = drawn(shop, 1)
    got = loss(shop.model, questions, batch, weigh(next_token=1, effect=2, action_swap=3, goal_swap=4, returns=5))
    for name, weight in (("effect", 2), ("action_swap", 3), ("goal_swap", 2 * 4)):
        assert got[name].item() == pytest.approx(weight * np.log(2), rel=1e-5), name
    known = batch.returns[~batch.returns.isnan()]
    assert got["returns"].item() == pytest.approx(5 * known.square().mean().item(), rel=1e-5)
    assert got["next_token"].item() > 1


def test_a_short_training_lowers_the_loss(shop):
    model, history = copy.deepcopy(shop.model), []
    batches = draw(shop.tokens, shop.replay, ALL, token_budget=800, goals_per_page=2, pairs_after=0, seed=0)
    train(model, batches, ALL, tokens=40_000, lr=5e-3, seed=0, on_step=lambda n, parts: history.append((n, parts)))
    assert 40_000 <= sum(n for n, _ in history) < 42_000
    first, last = (
        {k: np.mean([parts[k] for _, parts in part if k in parts]) for k in ("next_token", "effect")}
        for part in (history[:5], history[-5:])
    )
    assert last["next_token"] < 0.85 * first["next_token"]
    assert last["effect"] < 0.9 * first["effect"], (first, last)


def test_training_is_the_same_twice_and_a_fault_is_told(shop):
    results = []
    for _ in range(2):
        model = copy.deepcopy(shop.model)
        batches = draw(shop.tokens, shop.replay, ALL, token_budget=800, goals_per_page=2, pairs_after=0, seed=0)
        train(model, batches, ALL, tokens=2000, lr=1e-3, seed=0, on_step=lambda n, parts: None)
        results.append(model.model.norm.weight.detach().clone())
    assert torch.equal(*results)
    assert not torch.equal(results[0], shop.model.model.norm.weight)
    broken = copy.deepcopy(shop.model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    batches = draw(shop.tokens, shop.replay, ALL, token_budget=800, goals_per_page=2, pairs_after=0, seed=0)
    with pytest.raises(FloatingPointError, match=r"loss is nan after 0 tokens: lower model\.stage\.lr"):
        train(broken, batches, ALL, tokens=2000, lr=1e-3, seed=0, on_step=lambda n, parts: None)
