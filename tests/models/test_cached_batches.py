"""Batches from cached features: kept in memory or read from their file, they are the same."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from offline_lm.models import batching
from offline_lm.models.batching import CachedBatches, Outcomes
from offline_lm.models.features import Features

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def feats(shop, tmp_path_factory):
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("features")
    np.save(folder / "v.npy", rng.standard_normal((len(shop.tokens), 16), np.float32))
    np.save(folder / "q.npy", rng.standard_normal((len(shop.tokens.response_ptr) - 1, 16), np.float32))
    return Features(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in "vq"))


def test_resident_and_mapped_features_make_the_same_batches(shop, feats, monkeypatch):
    monkeypatch.setattr(batching, "_CHUNK", 7)  # several chunks, the last of them short
    rows = np.r_[np.arange(*shop.replay.offsets[4:6]), np.arange(*shop.replay.offsets[1:3])]
    kept = CachedBatches(feats, shop.replay, shop.tokens, CPU, resident=True)
    mapped = CachedBatches(feats, shop.replay, shop.tokens, CPU, resident=False)
    assert kept.resident
    assert not mapped.resident
    batch = kept(rows)
    absent = {f.name for f in fields(batch) if getattr(batch, f.name) is None}
    assert absent == {f.name for f in fields(batch) if getattr(mapped(rows), f.name) is None}
    assert absent == {"weight", "candidate_weight"}
    for name in {f.name for f in fields(batch)} - absent:
        assert torch.equal(getattr(batch, name), getattr(mapped(rows), name)), name
    for row, state, action in zip(rows, batch.states, batch.actions, strict=True):
        assert torch.equal(state, torch.from_numpy(np.array(feats.v[row])))
        own = feats.q[shop.tokens.branch_ptr[row]] if shop.tokens.acted[row] else np.zeros(16, np.float32)
        assert torch.equal(action, torch.from_numpy(np.array(own)))


@pytest.mark.parametrize(("times", "resident"), [(4, True), (3.9, False)])
def test_features_are_kept_if_they_take_a_quarter_of_what_is_free(shop, feats, monkeypatch, times, resident):
    monkeypatch.setattr(batching, "free_memory", lambda device: int(times * 2 * feats.v.size * 4))
    assert CachedBatches(feats, shop.replay, shop.tokens, CPU, resident="auto").resident == resident


def test_a_control_group_bounds_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "_CGROUP", tmp_path)
    machine = batching.free_memory(CPU)
    assert machine > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(batching.free_memory(CPU) - machine) < 2**30
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert batching.free_memory(CPU) == 600_000


def test_outcomes_are_the_columns_of_replay(shop):
    rows = np.r_[np.arange(*shop.replay.offsets[2:4]), np.arange(*shop.replay.offsets[2:4])]
    got = Outcomes(shop.replay, shop.tokens, CPU).of(rows, CPU)
    length = len(rows) // 2
    assert got["offsets"].tolist() == [0, length, 2 * length]
    np.testing.assert_allclose(got["reward"], np.nan_to_num(shop.replay.reward[rows]), rtol=1e-6)
    np.testing.assert_allclose(got["returns"], np.nan_to_num(shop.replay.returns[rows]), rtol=1e-6)
    assert got["continues"].tolist() == (~shop.replay.terminated[rows]).astype(float).tolist()
    assert got["acted"].tolist() == (shop.replay.acted & shop.tokens.acted)[rows].tolist()
    assert got["reward"].dtype == torch.float32
    assert got["return_mask"].dtype == torch.bool


@pytest.mark.parametrize("resident", [True, False])
def test_candidates_are_the_features_of_every_response_to_a_row(shop, feats, resident):
    rows = np.r_[np.arange(*shop.replay.offsets[4:6]), np.arange(*shop.replay.offsets[1:3])]
    batch = CachedBatches(feats, shop.replay, shop.tokens, CPU, candidates=True, resident=resident)(rows)
    owner, branches = [], []
    for i, row in enumerate(rows):
        for branch in range(shop.tokens.branch_ptr[row], shop.tokens.branch_ptr[row + 1]):
            owner.append(i)
            branches.append(branch)
    assert len(owner) > len(rows)
    assert batch.candidate_of.tolist() == owner
    assert torch.equal(batch.candidates, torch.from_numpy(np.array(feats.q[branches])))
    assert torch.equal(batch.target_candidates, batch.candidates)
    none = CachedBatches(feats, shop.replay, shop.tokens, CPU, resident=resident)(rows)
    assert none.candidates.shape == (0, 16)
    assert none.candidate_of.shape == (0,)
