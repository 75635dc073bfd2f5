"""Training of value heads from cached features, beside d3rlpy's IQL on the same features in the same run.

    python analysis/benchmarks/heads.py [json=true] [updates=20] [repeats=3] [threads=2] [batch=256,2048]
                                        [precision=float32] [clock=wall]

Transitions a second (`clock=cpu`: a CPU-second of this process, for a machine that others use too), drawing of batches
included. Features are 768 numbers for each state and each action, random (the
time does not depend on what they are), in ragged episodes of 1 to 30 steps. Every repeat runs all the rows below one
after another for as many updates, and medians over the repeats are compared.

    peer         d3rlpy's IQL with the networks of our heads and its Gaussian actor
    peer_stock   d3rlpy's IQL as it stands: Q reads state and action end to end, so its first layer is twice as wide
    ours         the loop of `fit` with `offline_lm.algos.iql_lm` and the same actor: the same work as `peer`
    ours_critic  the same without the actor: what `fit algo=iql_lm` does, less work than any row of the peer
    floor        the matrix products of `ours_critic` alone
    one_by_one   three settings, each trained by itself on features read from their file; transitions of all three
    sweep        the same three settings trained at once, as `sweep=` does

`ratio` is ours / peer: identical work, the first batch size. All train twin Q and V with two hidden layers of 256.
`precision=bfloat16` is for a machine that multiplies it fast; the peer has no such option and stays in float32.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported

import _measure
import numpy as np
import torch
from torch import Tensor, nn

from offline_lm import _fit_train
from offline_lm.algos.iql_lm import IQL
from offline_lm.batches.replay import Replay
from offline_lm.losses.returns import bootstrap_mask, discounted_returns, next_values
from offline_lm.losses.td import ensemble_min, td_target
from offline_lm.models.batching import CachedBatches
from offline_lm.models.features import Features
from offline_lm.models.heads import Heads
from offline_lm.types import Batch

WIDTH, GAMMA, TAU, POLYAK, LR = 768, 0.95, 0.8, 0.005, 3e-4
GOAL = {256: 2.5, 2048: 3.5}
SETTINGS = 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Data:
    features: Features
    replay: Replay
    tokens: Any

    def batches(self, resident: bool = True) -> CachedBatches:
        return CachedBatches(self.features, self.replay, self.tokens, CPU, resident=resident)


def data_of(episodes: int, folder: Path, seed: int = 0) -> Data:
    """Random features in files, of ragged episodes; two in three end in a terminal, the others at a limit."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 31, episodes)
    offsets = np.r_[0, np.cumsum(lengths)]
    n = int(offsets[-1])
    last = np.zeros(n, bool)
    last[offsets[1:] - 1] = True
    terminated = last & np.repeat(rng.random(episodes) < 2 / 3, lengths)
    reward = np.where(terminated, rng.random(n) < 0.5, 0.0).astype(np.float64)
    continues = torch.from_numpy((~terminated).astype(np.float64))
    torch_offsets = torch.from_numpy(offsets)
    everything = np.ones(n, bool)
    replay = Replay(
        episode_ids=[str(i) for i in range(episodes)],
        offsets=offsets,
        step=np.arange(n) - np.repeat(offsets[:-1], lengths),
        tasks=[str(i) for i in range(episodes)],
        acted=everything,
        reward=reward,
        terminated=terminated,
        returns=discounted_returns(torch.from_numpy(reward), continues, torch_offsets, gamma=GAMMA).numpy(),
        bootstraps=bootstrap_mask(continues, torch_offsets).numpy(),
        success=np.zeros(episodes),
        held_out=np.zeros(episodes, bool),
    )
    for name in "vq":
        np.save(folder / f"{name}.npy", rng.standard_normal((n, WIDTH), dtype=np.float32))
    features = Features(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in "vq"))
    tokens = SimpleNamespace(usable=everything, acted=everything, branch_ptr=np.arange(n + 1))
    return Data(features, replay, tokens)


class HeadsWithActor(Heads):
    """Our heads, and the Gaussian actor that d3rlpy's IQL trains beside its critics."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.actor = nn.Sequential(
            nn.LayerNorm(WIDTH, elementwise_affine=False),
            nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, WIDTH),
        )  # fmt: skip
        self.raw_logstd = nn.Parameter(torch.zeros(WIDTH))

    def log_prob(self, batch: Batch) -> Tensor:
        logstd = -5.0 + torch.sigmoid(self.raw_logstd) * 7.0
        return torch.distributions.Normal(self.actor(batch.states), logstd.exp()).log_prob(batch.actions).sum(1)


@dataclass(frozen=True)
class IQLWithActor(IQL):
    """`iql_lm` with the advantage-weighted actor of Kostrikov 2021, eq. 7; Q̄ is computed once for both."""

    def loss(self, critic: Heads, target: Heads, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(critic, HeadsWithActor)
        with torch.no_grad():
            q_bar = ensemble_min(target.q_values(batch.target_actions))
            v_next = next_values(target.values(batch.target_states), batch.offsets)
            y = td_target(batch.reward, batch.continues, v_next, gamma=self.gamma)
        known = batch.acted & batch.bootstrap_mask
        v = critic.v(batch.states)
        weight = (3.0 * (q_bar - v[0].detach())).exp().clamp(max=100.0)
        return {
            "v": critic.v.expectile(v, q_bar, self.tau, known),
            "q": critic.q.regress(critic.q(batch.actions), y, known),
            "actor": -(weight * critic.log_prob(batch)).mean(),
        }


@dataclass
class Optim:
    """The fields of conf/optim/adamw.yaml."""

    steps: int
    batch_size: int
    precision: str = "float32"
    lr: float = LR
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 100
    critic_first: float = 0.0
    log_every: int = 50
    checkpoint_every: int = 10**9


class Silent:
    """A run that keeps nothing."""

    def log(self, *_: Any) -> None: ...

    def checkpoint(self, *_: Any) -> None: ...


def train(algos: Sequence[IQL], heads: Sequence[Heads], data: Data, cached: CachedBatches, optim: Optim) -> int:
    """All the algorithms on the same batches, as `fit` trains them; the rows that each has seen."""
    seen = 0

    def make(rows: np.ndarray) -> Batch:
        nonlocal seen
        seen += len(rows)
        return cached(rows)

    run: Any = Silent()
    settings: Any = optim
    learners = [_fit_train.Learner(algo, each, settings, run) for algo, each in zip(algos, heads, strict=True)]
    _fit_train.train(learners, make, data.replay, settings, 0)
    return seen


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(work: Callable[[], int], clock: Callable[[], float]) -> Callable[[], float]:
    """A row: rows a second of `clock` that `work`, which returns how many it did, takes."""

    def row() -> float:
        started = clock()
        return work() / (clock() - started)

    return row


def ours_rows(data: Data, optim: Optim) -> dict[str, Callable[[], int]]:
    resident, mapped = data.batches(), data.batches(resident=False)
    algo = IQL(gamma=GAMMA, tau=TAU, polyak=POLYAK)
    with_actor = IQLWithActor(gamma=GAMMA, tau=TAU, polyak=POLYAK)
    critic, acting = Heads(WIDTH), HeadsWithActor()
    some = [replace(algo, tau=tau) for tau in (0.7, 0.8, 0.9)]
    own = [Heads(WIDTH) for _ in range(SETTINGS)]

    def one_by_one() -> int:
        return sum(train([a], [h], data, mapped, optim) for a, h in zip(some, own, strict=True))

    return {
        "ours": lambda: train([with_actor], [acting], data, resident, optim),
        "ours_critic": lambda: train([algo], [critic], data, resident, optim),
        "one_by_one": one_by_one,
        "sweep": lambda: SETTINGS * train(some, own, data, mapped, optim),
    }


def peer(transitions: Any, stock: bool, batch_size: int, updates: int) -> Callable[[], int]:
    import d3rlpy

    from offline_lm.interop.d3rlpy import create

    algo = (
        d3rlpy.algos.IQLConfig(gamma=GAMMA, expectile=TAU, tau=POLYAK).create()
        if stock
        else create("IQL", gamma=GAMMA, tau=TAU, polyak=POLYAK, lr=LR)
    )
    algo.build_with_dataset(transitions)

    def work() -> int:
        for _ in range(updates):
            algo.update(transitions.sample_transition_batch(batch_size))
        return batch_size * updates

    return work


def floor(batch_size: int, updates: int, dtype: torch.dtype) -> Callable[[], int]:
    """The matrix products of `ours_critic` alone: forward online and target, backward weights and hidden layer."""
    weights = [(torch.randn(k, WIDTH, 256, dtype=dtype), torch.randn(k, 256, 256, dtype=dtype)) for k in (1, 2)]
    x = torch.randn(batch_size, WIDTH, dtype=dtype)
    hidden = [torch.randn(k, batch_size, 256, dtype=dtype) for k in (1, 2)]

    def work() -> int:
        for _ in range(updates):
            for (first, second), h in zip(weights, hidden, strict=True):
                wide = x.expand(len(first), -1, -1)
                for _ in ("online", "target"):
                    torch.bmm(wide, first)
                    torch.bmm(h, second)
                torch.bmm(wide.mT, h)  # gradients of both weights, and of what the second layer read
                torch.bmm(h.mT, h)
                torch.bmm(h, second.mT)
        return batch_size * updates

    return work


def measure(given: dict[str, str], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from offline_lm.interop.d3rlpy import dataset

    data = data_of(1_000, folder)
    with contextlib.redirect_stdout(sys.stderr):  # d3rlpy logs there
        transitions = dataset(data.batches()(np.arange(len(data.replay))))
    torch.manual_seed(0)
    table = []
    for threads in map(int, given["threads"].split(",")):
        torch.set_num_threads(threads)
        for batch_size in map(int, given["batch"].split(",")):
            updates = max(4, int(given["updates"]) * 256 // batch_size)
            optim = Optim(updates, batch_size, given["precision"])
            with contextlib.redirect_stdout(sys.stderr):
                rows = {
                    "peer": peer(transitions, False, batch_size, updates),
                    "peer_stock": peer(transitions, True, batch_size, updates),
                    **ours_rows(data, optim),
                    "floor": floor(batch_size, updates, getattr(torch, given["precision"])),
                }
                clocked = {name: timed(work, CLOCKS[given["clock"]]) for name, work in rows.items()}
                seen = _measure.repeat(clocked, int(given["repeats"]))
            medians = {name: round(value) for name, value in _measure.medians(seen).items()}
            table.append({
                "threads": threads, "batch": batch_size, **medians,
                "ratio": round(medians["ours"] / medians["peer"], 2), "goal": GOAL.get(batch_size),
                "floor_to_critic": round(medians["floor"] / medians["ours_critic"], 2),
                "sweep_gain": round(medians["sweep"] / medians["one_by_one"], 2),
            })  # fmt: skip
    first = table[0]
    result = {name: first[name] for name in ("ours", "peer", "ratio", "goal")}
    settings = {name: given[name] for name in ("updates", "repeats", "precision", "clock")}
    versions = _measure.versions("torch", "d3rlpy", **settings)
    return {**result, "unit": "transitions/s", "versions": versions}, table


def main(argv: list[str]) -> None:
    given = _measure.arguments(
        argv, updates="20", repeats="3", threads="2", batch="256,2048", precision="float32", clock="wall"
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result, rows = measure(given, Path(folder))
    _measure.report(result, rows, given, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
