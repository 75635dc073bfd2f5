"""How `fit` trains: the loop over batches, what each setting does with them, and the estimates of what was learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from offline_lm._fit_sweep import Setting
from offline_lm.algos.critic_mc import CriticMC
from offline_lm.algos.d3rlpy import D3rlpy
from offline_lm.algos.q_mc import QMC
from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.models.batching import Outcomes
from offline_lm.models.descent import rate_share
from offline_lm.models.features import Features
from offline_lm.models.heads import Heads, polyak, target_of
from offline_lm.models.whitening import best_floor
from offline_lm.ope.diagnostics import Estimates, position_only
from offline_lm.run import Run
from offline_lm.types import Batch

Array = np.ndarray
MakeBatch = Callable[[Array], Batch]


class Learner:
    """Heads under training, and what a setting has of its own: loss, target, gradients, clipping, optimiser.

    Args:
        heads: on the device where batches are.
        optim: `conf/optim`; steps, batch size and the rhythm of logs are the loop's. In the first `critic_first` of the
            steps values are regressed on returns, before they bootstrap from themselves.
        run: takes its losses, named with `prefix`, and its checkpoints.
        weights: [N], of every row in the losses; None: all alike.
        outcomes: rewards and returns of every row, where they are not those of the batches (another discount).
        rate: at which targets follow, where the algorithm leaves it open.
        backbone: (target, online), where the backbone is trained with the heads. Of it, what requires gradients; it has
            a target of its own, or None.
    """

    def __init__(
        self, algo: Any, heads: Heads, optim: DictConfig, run: Run, *, prefix: str = "",
        outcomes: Outcomes | None = None, backbone: tuple[nn.Module | None, nn.Module] | None = None,
        weights: Tensor | None = None, rate: float = 0.01,
    ) -> None:  # fmt: skip
        self.algo, self.heads, self.optim, self.run, self.prefix = algo, heads, optim, run, prefix
        self.rate = rate if algo.polyak is None else algo.polyak
        self.on_returns = (QMC if algo.trains_q else CriticMC)(algo.gamma, algo.polyak)
        self.outcomes, self.backbone, self.weights = outcomes, backbone, weights
        self.target = target_of(heads)
        slow, model = backbone or (None, None)
        self.trained = [heads] if model is None else [heads, model]
        self.pairs = [(self.target, heads)] if slow is None or model is None else [(self.target, heads), (slow, model)]
        self.parameters = [p for module in self.trained for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optim.lr, weight_decay=optim.weight_decay, fused=True
        )  # fmt: skip
        self.losses: dict[str, Tensor] = {}
        self.norm = torch.zeros(())

    def train(self, mode: bool = True) -> None:
        """Training mode on or off; outside of it the heads compute in float32."""
        for module in self.trained:
            module.train(mode)
        dtype = torch.bfloat16 if mode and self.optim.precision == "bfloat16" else None
        for heads in (self.heads, self.target):
            heads.compute_in(dtype)

    def update(self, batch: Batch, rows: Array, step: int) -> None:
        """One step down the gradient of the loss on `batch`, the `rows` of replay; the target follows.

        Raises:
            FloatingPointError: a loss or gradient is not finite; nothing was spread to the parameters.
        """
        if self.outcomes is not None:
            batch = replace(batch, **self.outcomes.of(rows, batch.states.device))
        if self.weights is not None:
            batch = replace(batch, weight=self.weights[torch.from_numpy(rows).to(self.weights.device)])
        share = rate_share(step, self.optim.steps, self.optim.warmup)
        self.optimizer.param_groups[0]["lr"] = self.optim.lr * share
        algo = self.on_returns if step <= self.optim.critic_first * self.optim.steps else self.algo
        self.losses = algo.loss(self.heads, self.target, batch)
        first, *others = self.losses.values()
        total = sum(others, first)
        self.optimizer.zero_grad()
        total.backward()
        self.norm = nn.utils.clip_grad_norm_(self.parameters, self.optim.clip)
        if not (total.detach() + self.norm).isfinite():  # one wait for the device, not two
            raise FloatingPointError(
                f"update {step}: the loss is {total.item()}, the norm of its gradient {self.norm.item()};"
                " lower optim.lr, or look for huge rewards"
            )
        self.optimizer.step()
        for slow, online in self.pairs:
            polyak(slow, online, self.rate)

    def log(self, step: int) -> dict[str, float]:
        """Losses and gradient norm of the last update, kept in the run."""
        logged = {f"loss/{k}": v.item() for k, v in self.losses.items()} | {"grad_norm": self.norm.item()}
        self.run.log(step, logged, self.prefix)
        return logged


def train(
    learners: Sequence[Learner],
    make: MakeBatch,
    replay: Replay,
    optim: DictConfig,
    seed: int,
    batches: Iterator[Array] | None = None,
    steps: range | None = None,
) -> tuple[int, bool]:
    """The training loop: `optim.steps` batches, drawn with `seed`, each of which updates every learner.

    Ctrl-C ends it.

    Args:
        batches: rows of each update; whole episodes of `optim.batch_size` steps together if not given.
        steps: of the updates 1 to `optim.steps`, those that are done now; all if not given.

    Returns:
        Updates done, and whether that is all of them.
    """
    for learner in learners:
        learner.train()
    batches = batches or replays.episode_batches(replay, optim.batch_size, seed)
    steps = range(1, optim.steps + 1) if steps is None else steps
    step = steps.start - 1
    try:
        with tqdm(steps, "train", unit="update") as bar:
            for step in bar:
                rows = next(batches)
                batch = make(rows)
                for learner in learners:
                    learner.update(batch, rows, step)
                if step % optim.log_every == 0 or step == optim.steps:
                    first, *_ = [learner.log(step) for learner in learners]
                    bar.set_postfix({k.removeprefix("loss/"): f"{v:.4f}" for k, v in first.items()})
                if step % optim.checkpoint_every == 0:
                    for learner in learners:
                        if not learner.prefix:
                            learner.run.checkpoint(learner.heads, learner.backbone[1] if learner.backbone else None)
    except KeyboardInterrupt:
        print(f"interrupted after {step} of {optim.steps} updates: scoring what was learnt (Ctrl-C again gives up)")
        return step, False
    finally:
        for learner in learners:
            learner.train(False)
    return step, True


def head_options(setting: Setting, floor: float | None) -> dict[str, Any]:
    """`model.heads`, with `floor` for whitening=auto.

    Nothing is whitened where features change as the backbone trains, or d3rlpy's networks read them.
    """
    options = dict(setting.cfg.model.heads)
    if setting.cfg.model.train != "heads" or isinstance(setting.algo, D3rlpy):
        return options | {"whitening": None}
    return options | ({"whitening": floor} if options["whitening"] == "auto" else {})


def whitening_floor(feats: Features, replay: Replay, tokens: Tokens, most: int = 16_384) -> float:
    """For whitening=auto, by returns of the training side: of other tasks, or episodes where tasks are few."""
    known = replay.acted & tokens.acted & tokens.usable & ~replay.held_out_rows & ~np.isnan(replay.returns)
    rows = np.flatnonzero(known)
    if not len(rows):
        raise UserError("no usable step of the training side has a known return: raise data.max_tokens, or give labels")
    rows = rows[:: -(-len(rows) // most)]
    of_task = np.unique(replay.tasks, return_inverse=True)[1]
    few = len(np.unique(of_task[~replay.held_out])) < 10
    group = replay.episode_of[rows] if few else of_task[replay.episode_of[rows]]
    x, y, group = (
        torch.from_numpy(np.array(a)) for a in (feats.q[tokens.branch_ptr[rows]], replay.returns[rows], group)
    )
    floor, found = best_floor(x, y, group)
    told = ", ".join(f"{100 * r2:.1f} % with {f}" for f, r2 in found.items())
    print(f"features are whitened down to {floor}: of other {'episodes' if few else 'tasks'}' returns explains {told}")
    return floor


def target_rate(replay: Replay, updates: int, lengths: Array | int = 1, most: float = 0.1) -> float:
    """The rate at which targets follow, T / updates, within 0.005 to `most`; T: all but the longest 5 % of episodes.

    A value travels one link back in about 1 / rate updates. The faster, the more a target's errors feed on themselves.

    Args:
        lengths: [N] or 1: links that a row adds to the chain along which values travel; a turn, or each of its tokens.
    """
    links = np.add.reduceat(replay.acted * lengths, replay.offsets[:-1])[~replay.held_out]
    return float(np.clip(np.quantile(links, 0.95) / updates, 0.005, most))


def examples(feats: Features, replay: Replay, tokens: Tokens, most: int = 16_384) -> tuple[Tensor, Tensor]:
    """Features of states, and of all known actions, of the training side: evenly spaced ones, where there are many."""
    of_response = np.repeat(~replay.held_out_rows, np.diff(tokens.branch_ptr))
    rows = (np.flatnonzero(side) for side in (~replay.held_out_rows & tokens.usable, of_response))
    chosen = (own[:: max(-(-len(own) // most), 1)] for own in rows)
    states, actions = (torch.from_numpy(np.array(x[own])) for x, own in zip((feats.v, feats.q), chosen, strict=True))
    return states, actions


@torch.no_grad()
def estimate(learners: Sequence[Learner], feats: Features, device: torch.device) -> list[Estimates]:
    """For each learner, V of every row and Q of every response; features are read once for all."""
    v: list[list[Array]] = [[] for _ in learners]
    q: list[list[Array]] = [[] for _ in learners]
    for x in _slices(feats.v, device):
        for learner, seen in zip(learners, v, strict=True):
            seen.append(learner.heads.values(x).double().cpu().numpy())
    trains_q = [learner.algo.trains_q for learner in learners]
    for x in _slices(feats.q, device) if any(trains_q) else ():
        for learner, seen in zip(learners, q, strict=True):
            if learner.algo.trains_q:
                seen.append(learner.heads.q_values(x).double().cpu().numpy())
    out = []
    for mine, members in zip(v, q, strict=True):
        ensemble = np.concatenate(members, axis=1) if members else None
        out.append(Estimates(np.concatenate(mine), None if ensemble is None else ensemble.min(axis=0), ensemble))
    return out


def without_features(replay: Replay) -> dict[str, Estimates]:
    """What needs no features, and every critic is held against: the step's position alone, and a constant."""
    mean = np.nanmean(np.where(replay.held_out_rows, np.nan, replay.returns))
    return {
        "position_only": Estimates(position_only(replay), None),
        "constant": Estimates(np.full(len(replay), mean), None),
    }


def return_range(replay: Replay) -> tuple[float, float]:
    """Least and greatest known return of the training side, 0 among them.

    Raises:
        UserError: none is known.
    """
    known = replay.returns[~np.isnan(replay.returns) & ~replay.held_out_rows]
    if not len(known):
        raise UserError(
            "no selected step has a known return: these logs carry no reward, outcome or success to learn from"
        )
    return float(min(known.min(), 0.0)), float(max(known.max(), 0.0))


def _slices(x: Any, device: torch.device, size: int = 16_384) -> Iterator[Tensor]:
    for i in range(0, len(x), size):
        yield torch.from_numpy(np.array(x[i : i + size])).to(device)
