"""The representation stage: its loss is what the questions ask, and a little of it is learnt."""

import copy
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch

from offline_lm.batches.questions import draw
from offline_lm.models.represent import Answers, Weights, loss, train

PARTS = tuple(f.name for f in fields(Weights))


def weigh(**weights):
    """Weights of the parts named; 0 for the others."""
    return Weights(**{**dict.fromkeys(PARTS, 0.0), **weights})


ALL = weigh(**dict.fromkeys(PARTS, 1.0))


def batches(shop, *, budget=800, goals_first=0):
    return draw(shop.tokens, shop.replay, token_budget=budget, goals_per_page=2, goals_first=goals_first, seed=0)


@pytest.fixture(scope="module")
def both(shop):
    """A batch with questions of both kinds."""
    return next(b for b in islice(batches(shop, budget=4000), 20) if len(b.goals) and len(b.action))


@pytest.fixture(scope="module")
def goals_alone(shop):
    return next(batches(shop, goals_first=10**9))


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ({"next_token": 1}, {"next_token"}),
        ({"recall": 1}, {"recall"}),
        ({"effect": 1}, {"effect"}),
        ({"action_swap": 1}, {"action_swap"}),
        ({"goal_swap": 1}, {"goal_swap"}),
        ({"returns": 1}, {"returns", "goal_returns"}),
        (dict.fromkeys(PARTS, 1), {*PARTS, "goal_returns"}),
    ],
)
def test_a_weight_of_zero_switches_a_part_off(shop, both, weights, parts):
    assert set(loss(shop.model, Answers(16), both, weigh(**weights))) == parts


def test_a_part_without_a_question_is_left_out(shop, goals_alone):
    assert set(loss(shop.model, Answers(16), goals_alone, ALL)) == {"goal_swap", "goal_returns"}


def test_before_training_a_question_is_a_coin_toss(shop, both):
    answers = Answers(16)
    for p in answers.parameters():
        torch.nn.init.zeros_(p)
    got = loss(shop.model, answers, both, weigh(effect=2, action_swap=3, goal_swap=4, returns=5))
    for name, weight in (("effect", 2), ("action_swap", 3), ("goal_swap", 2 * 4)):
        assert got[name].item() == pytest.approx(weight * np.log(2), rel=1e-5), name
    for name, returns, times in (("returns", both.returns, 2), ("goal_returns", both.goal_returns, 1)):
        # V and Q are both asked at the steps of a stretch
        assert got[name].item() == pytest.approx(5 * times * returns.square().mean().item(), rel=1e-5), name


def test_a_return_that_is_unknown_teaches_nothing(shop, both):
    answers = Answers(16)
    first = torch.arange(len(both.returns)) == 0
    unknown = replace(both, returns=both.returns.masked_fill(first, torch.nan))
    alone = replace(both, returns=both.returns.masked_fill(~first, torch.nan))
    whole, rest, one = (
        loss(shop.model, answers, b, weigh(returns=1))["returns"].item() for b in (both, unknown, alone)
    )
    assert np.isfinite([whole, rest, one]).all()
    n = len(both.returns)
    assert whole == pytest.approx(((n - 1) * rest + one) / n, rel=1e-5)


@torch.no_grad()
def test_goal_returns_are_read_by_v_before_the_action_and_by_q_behind_it(shop, goals_alone):
    answers = Answers(16)
    for head, value in ((answers.v, 2.0), (answers.q, -3.0)):
        last = head[-1]
        assert isinstance(last, torch.nn.Linear)
        last.weight.zero_()
        last.bias.fill_(value)
    asked = replace(goals_alone, goal_returns=torch.zeros(len(goals_alone.goals)))
    acted = asked.goal_acted.float()
    assert 0 < acted.mean() < 1
    wanted = (acted * 9 + (1 - acted) * 4).mean().item()
    assert loss(shop.model, answers, asked, weigh(returns=1))["goal_returns"].item() == pytest.approx(wanted)


@torch.no_grad()
def test_recall_and_next_token_are_cross_entropies_of_the_words(shop, both):
    """By hand: the embedding is zero, so that every word of the vocabulary is as likely."""
    model = copy.deepcopy(shop.model)
    model.lm_head.weight.zero_()
    got = loss(model, Answers(16), both, weigh(recall=1, next_token=3))
    chance = np.log(model.config.vocab_size)
    assert got["recall"].item() == pytest.approx(chance, rel=1e-6)
    assert got["next_token"].item() == pytest.approx(3 * chance, rel=1e-6)


def test_a_short_training_lowers_the_loss(shop):
    model, history = copy.deepcopy(shop.model), []
    train(
        model, batches(shop), ALL, tokens=60_000, lr=2e-2, seed=0,
        on_step=lambda n, parts: history.append((n, parts)),
    )  # fmt: skip
    assert 60_000 <= sum(n for n, _ in history) < 62_500
    early, late = (
        {k: np.mean([parts[k] for _, parts in part if k in parts]) for k in ("next_token", "recall")}
        for part in (history[:5], history[-5:])
    )
    assert late["next_token"] < 0.85 * early["next_token"], (early, late)
    assert late["recall"] < 0.85 * early["recall"], (early, late)


def test_effect_is_learnt_where_it_alone_is_asked(shop):
    model, history = copy.deepcopy(shop.model), []
    train(
        model, batches(shop), weigh(effect=1), tokens=60_000, lr=2e-2, seed=0,
        on_step=lambda n, parts: history.append(parts.get("effect", np.nan)),
    )  # fmt: skip
    assert np.nanmean(history[-15:]) < 0.8 * np.nanmean(history[:5]), history


def test_training_is_the_same_twice_and_a_fault_is_told(shop):
    results = []
    for _ in range(2):
        model = copy.deepcopy(shop.model)
        train(model, batches(shop), ALL, tokens=2000, lr=1e-3, seed=0, on_step=lambda n, parts: None)
        results.append(model.model.norm.weight.detach().clone())
    assert torch.equal(*results)
    assert not torch.equal(results[0], shop.model.model.norm.weight)
    broken = copy.deepcopy(shop.model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss is nan after 0 tokens: lower model\.stage\.lr"):
        train(broken, batches(shop), ALL, tokens=2000, lr=1e-3, seed=0, on_step=lambda n, parts: None)
