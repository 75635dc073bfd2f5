"""Heads train within the memory of features and heads: the backbone is gone, and features stay in their file."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from offline_lm import fit, ingest
from offline_lm._fit_memory import Peaks
from offline_lm.envs.shop import Site, Task, record

SMALL = [
    *("model=tiny", "model.stage.tokens=2000", "model.vocab_size=400"),
    *("model.width=32", "model.layers=1", "model.attention_heads=2"),
    *("optim.batch_size=64", "optim.steps=3", "threads=1", "logger=none", "json=true"),
]
CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    episodes = record([Task(Site.draw(3), i) for i in range(3)], 2)
    (folder / "shop.jsonl").write_bytes(b"\n".join(orjson.dumps(e) for e in episodes))
    assert ingest.main([f"path={folder / 'shop.jsonl'}", f"store={folder / 'store'}"]) == 0
    return folder / "store"


@pytest.mark.parametrize(("train", "gone"), [("heads", True), ("full", False)])
def test_a_frozen_backbone_is_gone_while_heads_train(store, monkeypatch, train, gone):
    seen, kept = [], []

    def prepare(*arguments):
        model, tokenizer, tokens = prepared(*arguments)
        seen.append(weakref.ref(model))
        return model, tokenizer, tokens

    def trained(*arguments):
        gc.collect()
        kept.append(seen[0]() is None)
        return loop(*arguments)

    prepared, loop = fit.prepare, fit.train
    monkeypatch.setattr(fit, "prepare", prepare)
    monkeypatch.setattr(fit, "train", trained)
    assert fit.main([f"data.store={store}", *SMALL, f"model.train={train}", "baselines=false"]) == 0
    assert kept == [gone]


def test_fit_reports_the_peak_of_each_stage(store, capsys):
    assert fit.main([f"data.store={store}", *SMALL]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    stages = [metrics[f"peak_memory_{stage}_gb"] for stage in ("prepare", "features", "heads", "values")]
    assert metrics["peak_memory_gb"] == max(stages)
    assert 0.1 < min(stages) <= max(stages) < 8


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a peak begin anew")
def test_a_stage_is_not_charged_with_the_one_before():
    peaks = Peaks(torch.device("cpu"))
    with peaks.stage("large"):
        np.ones(60_000_000)  # 0.45 GB, gone at once
    with peaks.stage("small"):
        pass
    large, small = peaks.metrics["peak_memory_large_gb"], peaks.metrics["peak_memory_small_gb"]
    assert large - small > 0.4
    assert peaks.metrics["peak_memory_gb"] == large


LIMITED = """
import resource, sys
from types import SimpleNamespace
import numpy as np, torch
from omegaconf import OmegaConf
from offline_lm import _fit_train
from offline_lm.algos.iql_lm import IQL
from offline_lm.batches.replay import Replay
from offline_lm.models.batching import CachedBatches
from offline_lm.models.features import Features
from offline_lm.models.heads import Heads

torch.set_num_threads(1)
n, width, length = 100_000, 2048, 20
path, resident = sys.argv[1], sys.argv[2] == "true"
features = Features(*(np.memmap(path, np.float32, "r", shape=(n, width)) for _ in "vq"))
everything, ends = np.ones(n, bool), np.arange(n) % length == length - 1
replay = Replay(
    episode_ids=[str(i) for i in range(n // length)], offsets=np.arange(0, n + 1, length), step=np.arange(n) % length,
    tasks=["task"] * (n // length), acted=everything, reward=ends.astype(float), terminated=ends,
    returns=np.ones(n), bootstraps=everything, success=np.ones(n // length), held_out=np.zeros(n // length, bool),
)
tokens = SimpleNamespace(usable=everything, acted=everything, branch_ptr=np.arange(n + 1))
heads = Heads(width, hidden=8)
run = SimpleNamespace(log=lambda *_: None)
optim = OmegaConf.load(sys.argv[3])
optim.update(steps=4, batch_size=2048)
(held,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData:"))
limit = int(held) * 1024 + 600 * 2**20  # of 1,562 MB of features
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
batches = CachedBatches(features, replay, tokens, torch.device("cpu"), resident=resident)
learner = _fit_train.Learner(IQL(0.9, 0.8, 0.01), heads, optim, run)
steps, whole = _fit_train.train([learner], batches, replay, optim, 0)
(estimates,) = _fit_train.estimate([learner], features, torch.device("cpu"))
assert (steps, whole, len(estimates.v), len(estimates.q)) == (4, True, n, n)
print("trained")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux alone")
@pytest.mark.parametrize("resident", ["false", "true"])
def test_heads_train_on_features_larger_than_the_memory_they_get(tmp_path, resident):
    file = tmp_path / "features.bin"
    with file.open("wb") as sparse:
        sparse.truncate(100_000 * 2048 * 4)
    command = [sys.executable, "-c", LIMITED, str(file), resident, str(CHECKOUT / "conf/optim/adamw.yaml")]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if resident == "true":  # the limit would be felt
        assert done.returncode
        assert "memory" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout == "trained\n"
