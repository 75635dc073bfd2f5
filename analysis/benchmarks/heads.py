"""Training of value heads from cached features, beside d3rlpy's IQL on the same features in the same run.

    python analysis/benchmarks/heads.py [json=true] [updates=30] [repeats=5] [threads=2,1] [batch=256,2048]

Transitions a second, drawing of batches included. Features are 768 numbers for each state and each action, random (the
time does not depend on what they are), in ragged episodes of 1 to 30 steps. Every repeat runs all the rows below one
after another for as many updates, and medians over the repeats are compared.

    peer         d3rlpy's IQL with the networks of our heads and its Gaussian actor
    peer_stock   d3rlpy's IQL as it stands: Q reads state and action end to end, so its first layer is twice as wide
    ours         `offline_lm.fit.train` with `offline_lm.algos.iql_lm` and the same actor: the same work as `peer`
    ours_critic  the same without the actor: what `fit algo=iql_lm` does, less work than any row of the peer
    floor        the matrix products of `ours_critic` alone, in float32

`ratio` is ours / peer: identical work, batch 256. All train twin Q and V with two hidden layers of 256.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported

import numpy as np
import torch
from torch import Tensor, nn

from offline_lm import fit
from offline_lm.algos.iql_lm import IQL
from offline_lm.batches.render import Cuts
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.losses.returns import bootstrap_mask, discounted_returns, next_values
from offline_lm.losses.td import ensemble_min, td_target
from offline_lm.models.batching import CachedBatches
from offline_lm.models.features import Features
from offline_lm.models.heads import Heads
from offline_lm.types import Batch

WIDTH, GAMMA, TAU, POLYAK, LR = 768, 0.95, 0.8, 0.005, 3e-4
GOAL = {256: 2.5, 2048: 3.5}


def replay_of(episodes: int, seed: int = 0) -> tuple[Features, Replay, Tokens]:
    """Random features of ragged episodes; two in three end in a terminal, the others at a limit."""
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
    returns = discounted_returns(torch.from_numpy(reward), continues, torch_offsets, gamma=GAMMA).numpy()
    everything = np.ones(n, bool)
    replay = Replay(
        episode_ids=[str(i) for i in range(episodes)],
        offsets=offsets,
        step=np.arange(n) - np.repeat(offsets[:-1], lengths),
        tasks=[str(i) for i in range(episodes)],
        acted=everything,
        reward=reward,
        terminated=terminated,
        returns=returns,
        bootstraps=bootstrap_mask(continues, torch_offsets).numpy(),
        success=np.zeros(episodes),
        held_out=np.zeros(episodes, bool),
    )
    one = np.arange(n + 1)
    ids, none = np.zeros(n, np.uint16), np.zeros(0, np.int64)
    tokens = Tokens(
        ids, one, ids, one, one, everything, everything, np.zeros(n + 1, np.int64), none,
        np.zeros(n, np.int64), np.zeros((n, 2), np.int64), Cuts(),
    )  # fmt: skip
    features = Features(*(rng.standard_normal((n, WIDTH), dtype=np.float32) for _ in range(2)))
    return features, replay, tokens


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
    lr: float = LR
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 100
    log_every: int = 50
    checkpoint_every: int = 10**9


class Silent:
    """A run that keeps nothing."""

    def log(self, *_: Any) -> None: ...

    def checkpoint(self, *_: Any) -> None: ...


Timed = Callable[[int, int], float]
"""(batch size, updates) -> transitions a second"""


def ours(cached: CachedBatches, replay: Replay, actor: bool) -> Timed:
    heads = HeadsWithActor() if actor else Heads(WIDTH)
    algo = (IQLWithActor if actor else IQL)(gamma=GAMMA, tau=TAU, polyak=POLYAK)

    def timed(batch_size: int, updates: int) -> float:
        seen = 0

        def make(rows: np.ndarray) -> Batch:
            nonlocal seen
            seen += len(rows)
            return cached(rows)

        started = time.perf_counter()
        fit.train(algo, heads, make, replay, Optim(updates, batch_size), 0, Silent())  # type: ignore[arg-type]
        return seen / (time.perf_counter() - started)

    return timed


def peer(data: Any, stock: bool) -> Timed:
    import d3rlpy

    from offline_lm.interop.d3rlpy import iql

    algo = (
        d3rlpy.algos.IQLConfig(gamma=GAMMA, expectile=TAU, tau=POLYAK).create()
        if stock
        else iql(gamma=GAMMA, tau=TAU, polyak=POLYAK, lr=LR)
    )
    algo.build_with_dataset(data)

    def timed(batch_size: int, updates: int) -> float:
        started = time.perf_counter()
        for _ in range(updates):
            algo.update(data.sample_transition_batch(batch_size))
        return batch_size * updates / (time.perf_counter() - started)

    return timed


def floor() -> Timed:
    """The matrix products of `ours_critic` alone: forward online and target, backward weights and hidden layer."""
    weights = [(torch.randn(k, WIDTH, 256), torch.randn(k, 256, 256)) for k in (1, 2)]

    def timed(batch_size: int, updates: int) -> float:
        x = torch.randn(batch_size, WIDTH)
        hidden = [torch.randn(k, batch_size, 256) for k in (1, 2)]
        started = time.perf_counter()
        for _ in range(updates):
            for (first, second), h in zip(weights, hidden, strict=True):
                wide = x.expand(len(first), -1, -1)
                for _ in ("online", "target"):
                    torch.bmm(wide, first)
                    torch.bmm(h, second)
                torch.bmm(wide.mT, h)  # gradients of both weights, and of what the second layer read
                torch.bmm(h.mT, h)
                torch.bmm(h, second.mT)
        return batch_size * updates / (time.perf_counter() - started)

    return timed


def measure(updates: int, repeats: int, threads: list[int], batches: list[int]) -> dict[str, Any]:
    import d3rlpy

    from offline_lm.interop.d3rlpy import dataset

    features, replay, tokens = replay_of(2_000)
    cached = CachedBatches(features, replay, tokens, torch.device("cpu"))
    with contextlib.redirect_stdout(sys.stderr):  # d3rlpy logs there
        data = dataset(cached(np.arange(len(replay))))
    torch.manual_seed(0)
    rows: dict[str, Timed] = {
        "peer": peer(data, stock=False),
        "ours": ours(cached, replay, actor=True),
        "peer_stock": peer(data, stock=True),
        "ours_critic": ours(cached, replay, actor=False),
        "floor": floor(),
    }
    table = []
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        for batch_size in batches:
            count = max(4, updates * 256 // batch_size)
            for timed in rows.values():
                timed(batch_size, 3)
            seen: dict[str, list[float]] = {name: [] for name in rows}
            for _ in range(repeats):
                for name, timed in rows.items():
                    seen[name].append(timed(batch_size, count))
            medians = {name: round(statistics.median(values)) for name, values in seen.items()}
            paired = [mine / theirs for mine, theirs in zip(seen["ours"], seen["peer"], strict=True)]
            table.append({
                "threads": n_threads, "batch": batch_size, **medians,
                "ratio": round(medians["ours"] / medians["peer"], 2),
                "ratio_range": [round(min(paired), 2), round(max(paired), 2)],
                "critic_to_stock": round(medians["ours_critic"] / medians["peer_stock"], 2),
                "critic_to_floor": round(medians["floor"] / medians["ours_critic"], 2), "goal": GOAL.get(batch_size),
            })  # fmt: skip
    head = max((row for row in table if row["batch"] == batches[0]), key=lambda row: row["peer"])
    return {
        "ours": head["ours"],
        "peer": head["peer"],
        "ratio": head["ratio"],
        "goal": head["goal"],
        "unit": "transitions/s",
        "rows": table,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "d3rlpy": d3rlpy.__version__,
            "updates": updates,
            "repeats": repeats,
        },
    }


def main(argv: list[str]) -> None:
    given = {"json": "false", "updates": "30", "repeats": "5", "threads": "2,1", "batch": "256,2048"}
    for argument in argv:
        key, _, value = argument.partition("=")
        if key not in given:
            raise SystemExit(f"no `{key}`; there are {', '.join(given)}")
        given[key] = value
    numbers = {key: [int(part) for part in given[key].split(",")] for key in ("threads", "batch")}
    result = measure(int(given["updates"]), int(given["repeats"]), numbers["threads"], numbers["batch"])
    if given["json"] == "true":
        print(json.dumps(result))
        return
    names = ["threads", "batch", "peer", "ours", "ratio", "goal", "peer_stock", "ours_critic", "floor"]
    print("transitions a second; peer and ours do the same work, the head of this file says which")
    print("  ".join(f"{name:>15}" for name in names))
    for row in result["rows"]:
        print("  ".join(f"{row[name]!s:>15}" for name in names))
    print(f"\npython {' '.join([os.path.relpath(__file__), *argv])}")


if __name__ == "__main__":
    main(sys.argv[1:])
