"""How `fit algo=d3rlpy` trains: d3rlpy's own update on our batches, and its networks read back as our heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from offline_lm.algos.d3rlpy import D3rlpy
from offline_lm.interop import d3rlpy as peer
from offline_lm.losses.td import ensemble_min
from offline_lm.models.batching import Outcomes
from offline_lm.models.heads import Heads
from offline_lm.run import Run
from offline_lm.types import Batch


class D3rlpyLearner:
    """As `Learner`, for an algorithm of d3rlpy: its optimisers, losses and targets are its own.

    Its Q networks have the layers of our heads, and become them. V is IQL's own; of the others, which have none, our V
    head follows min Q of the logged actions.
    """

    prefix = ""
    backbone = target = None

    def __init__(
        self, algo: D3rlpy, heads: Heads, optim: DictConfig, run: Run, *, outcomes: Outcomes | None = None
    ) -> None:
        self.algo, self._heads, self.run, self.outcomes = algo, heads, run, outcomes
        device = next(heads.parameters()).device
        self.peer = peer.create(
            algo.name, gamma=algo.gamma, tau=algo.tau, polyak=algo.polyak, lr=optim.lr, device=str(device),
            hidden=heads.q.weights[0].shape[2], ensemble=heads.q.k, width=heads.q.weights[0].shape[1], **algo.options,
        )  # fmt: skip
        self.v_optimizer = torch.optim.AdamW(heads.v.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
        self.losses: dict[str, float] = {}

    @property
    def heads(self) -> Heads:
        """Its networks as they now are."""
        peer.read(self.peer, self._heads)
        return self._heads

    def train(self, mode: bool = True) -> None:
        """d3rlpy's networks know no mode."""

    def update(self, batch: Batch, rows: np.ndarray, step: int) -> None:
        """One update of d3rlpy on the transitions of `batch` that have a target.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if self.outcomes is not None:
            batch = replace(batch, **self.outcomes.of(rows, batch.states.device))
        self.losses = peer.update(self.peer, batch, step)
        if not peer.has_v(self.peer):
            self.losses["v"] = self._follow(batch).item()
        if not torch.tensor(list(self.losses.values())).isfinite().all():
            raise FloatingPointError(f"update {step}: d3rlpy's losses are {self.losses}; lower optim.lr")

    def _follow(self, batch: Batch) -> Tensor:
        q = ensemble_min(peer.q_values(self.peer, batch.actions))
        loss = self._heads.v.regress(self._heads.v(batch.states), q, batch.acted)
        self.v_optimizer.zero_grad()
        loss.backward()
        self.v_optimizer.step()
        return loss.detach()

    def log(self, step: int) -> dict[str, float]:
        logged = {f"loss/{name}": value for name, value in self.losses.items()}
        self.run.log(step, logged, self.prefix)
        return logged
