"""Batches from cached features and through the backbone: the same numbers, and a target backbone of its own."""

import copy
from dataclasses import fields

import numpy as np
import pytest
import torch

from offline_lm.batches.tokens import tokenize
from offline_lm.models import features
from offline_lm.models.batching import CachedBatches, Outcomes
from offline_lm.models.encoding import EncodedBatches
from offline_lm.models.heads import polyak, target_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def feats(shop, tmp_path_factory):
    return features.compute(shop.model, shop.tokens, tmp_path_factory.mktemp("features"), token_budget=900)


def rows_of(replay, *episodes):
    return np.concatenate([np.arange(replay.offsets[e], replay.offsets[e + 1]) for e in episodes])


def test_cached_and_encoded_batches_are_equal(shop, feats):
    rows = rows_of(shop.replay, 3, 0, 7)
    cached = CachedBatches(feats, shop.replay, shop.tokens, CPU)(rows)
    encoded = EncodedBatches(shop.model, target_of(shop.model), shop.replay, shop.tokens, CPU)(rows)
    for f in fields(cached):
        torch.testing.assert_close(getattr(encoded, f.name), getattr(cached, f.name), rtol=0, atol=1e-5, msg=f.name)
    assert cached.offsets.tolist() == np.r_[0, np.cumsum(np.diff(shop.replay.offsets)[[3, 0, 7]])].tolist()
    assert (cached.actions[~cached.acted] == 0).all()
    assert (cached.actions[cached.acted] != 0).any(dim=1).all()


def test_columns_are_those_of_the_replay(shop):
    rows = rows_of(shop.replay, 2, 5)
    got = Outcomes(shop.replay, shop.tokens).of(rows, CPU)
    known = ~np.isnan(shop.replay.returns[rows])
    assert got["return_mask"].tolist() == known.tolist()
    np.testing.assert_allclose(got["returns"][known], shop.replay.returns[rows][known], rtol=1e-6)
    assert got["continues"].tolist() == (1.0 - shop.replay.terminated[rows]).tolist()
    assert got["bootstrap_mask"].tolist() == shop.replay.bootstraps[rows].tolist()
    assert got["acted"].tolist() == shop.replay.acted[rows].tolist()


def test_an_episode_behind_itself_stays_two_episodes(shop):
    """It happens where an epoch ends and the next begins with the same episode."""
    n = int(np.diff(shop.replay.offsets)[4])
    got = Outcomes(shop.replay, shop.tokens).of(rows_of(shop.replay, 4, 4, 5), CPU)
    assert got["offsets"][:3].tolist() == [0, n, 2 * n]


def test_a_step_too_long_to_read_takes_part_in_nothing(shop, tmp_path):
    rows = [dict(row) for row in shop.rows]
    rows[1]["goal"] = "word " * 500
    tokens = tokenize(rows, shop.tokenizer, max_tokens=400)
    assert np.flatnonzero(~tokens.usable).tolist() == [1]
    feats = features.compute(shop.model, tokens, tmp_path)
    batch = CachedBatches(feats, shop.replay, tokens, CPU)(rows_of(shop.replay, 0))
    masks = torch.stack([batch.acted, batch.return_mask, batch.bootstrap_mask])
    assert masks[:, 1].tolist() == [False] * 3
    assert masks[:, 0].tolist() == [True, True, False]  # what it would bootstrap from cannot be read
    encoded = EncodedBatches(shop.model, shop.model, shop.replay, tokens, CPU)(rows_of(shop.replay, 0))
    torch.testing.assert_close(encoded.actions, batch.actions, rtol=0, atol=1e-5)


def test_the_target_backbone_is_its_own_and_follows(shop):
    model = copy.deepcopy(shop.model)
    target = target_of(model)
    make = EncodedBatches(model, target, shop.replay, shop.tokens, CPU)
    rows = rows_of(shop.replay, 0, 1)
    first = make(rows)
    assert first.states.requires_grad
    assert not first.target_states.requires_grad
    torch.testing.assert_close(first.states, first.target_states)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    (first.states.square().mean() + first.actions.square().mean()).backward()
    optimizer.step()
    second = make(rows)
    torch.testing.assert_close(second.target_states, first.target_states)
    torch.testing.assert_close(second.target_actions, first.target_actions)
    assert (second.states - first.states).abs().max() > 1e-3
    polyak(target, model, 0.5)
    third = make(rows)
    assert (third.target_states - second.target_states).abs().max() > 1e-4
    polyak(target, model, 1.0)
    last = make(rows)
    torch.testing.assert_close(last.target_states, last.states)
    torch.testing.assert_close(last.target_actions, last.actions)
