"""Rows of replay turned into the `Batch` of an algorithm: from cached features, or through the backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_lm.batches.pack import pack
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.models.backbone import hidden_states
from offline_lm.models.features import Features
from offline_lm.types import Batch

Array = np.ndarray


class Outcomes:
    """The part of a batch that is no feature: rewards, returns and masks of the rows that are usable."""

    def __init__(self, replay: Replay, tokens: Tokens) -> None:
        usable = np.asarray(tokens.usable)
        followed = np.r_[usable[1:], False] | replay.terminated
        self.episode_of = replay.episode_of
        self.columns = {
            "reward": torch.from_numpy(np.nan_to_num(replay.reward)).float(),
            "continues": torch.from_numpy(~replay.terminated).float(),
            "returns": torch.from_numpy(np.nan_to_num(replay.returns)).float(),
            "acted": torch.from_numpy(replay.acted & tokens.acted),
            "return_mask": torch.from_numpy(~np.isnan(replay.returns) & usable),
            "bootstrap_mask": torch.from_numpy(replay.bootstraps & usable & followed),
        }

    def of(self, rows: Array, device: torch.device) -> dict[str, Tensor]:
        """Columns of whole episodes' `rows`, with the offsets of the episodes among them."""
        # an episode may stand behind itself, at the end of one epoch and the start of the next
        follows = (np.diff(rows, prepend=-2) == 1) & (np.diff(self.episode_of[rows], prepend=-1) == 0)
        starts = np.flatnonzero(~follows)
        picked = {name: column[rows].to(device) for name, column in self.columns.items()}
        return {"offsets": torch.from_numpy(np.r_[starts, len(rows)]).to(device), **picked}


class CachedBatches:
    """Batches for heads on a frozen backbone; target features are the same tensors."""

    def __init__(self, features: Features, replay: Replay, tokens: Tokens, device: torch.device) -> None:
        self.features, self.device, self.outcomes = features, device, Outcomes(replay, tokens)
        self.first = np.where(tokens.acted, tokens.branch_ptr[:-1], -1)

    def __call__(self, rows: Array) -> Batch:
        states = torch.from_numpy(self.features.v[rows]).to(self.device)
        actions = torch.zeros_like(states)
        acted = self.first[rows] >= 0
        picked = torch.from_numpy(self.features.q[self.first[rows][acted]]).to(self.device)
        actions[torch.from_numpy(acted).to(self.device)] = picked
        return Batch(states, actions, states, actions, **self.outcomes.of(rows, self.device))


class EncodedBatches:
    """Batches through the backbone, gradients included: one packed pass gives V and Q of whole episodes.

    The target is a backbone of its own that follows the online one (a target that tracks heads only is trap 8).
    """

    def __init__(self, model: Any, target: Any, replay: Replay, tokens: Tokens, device: torch.device) -> None:
        self.model, self.target, self.tokens, self.device = model, target, tokens, device
        self.outcomes = Outcomes(replay, tokens)

    def __call__(self, rows: Array) -> Batch:
        acted = np.asarray(self.tokens.acted[rows])
        first = self.tokens.branch_ptr[rows]
        ids, layout = pack(
            self.tokens, rows.tolist(), [[a] if has else [] for a, has in zip(first, acted, strict=True)]
        )
        ids = ids.to(self.device)
        at_v, at_q = (x.to(self.device) for x in layout.readouts())
        has = torch.from_numpy(acted).to(self.device)

        def read(model: Any) -> tuple[Tensor, Tensor]:
            hidden = hidden_states(model, ids, layout).float()
            actions = torch.zeros(len(rows), hidden.shape[1], device=self.device)
            return hidden[at_v], actions.masked_scatter(has[:, None], hidden[at_q])

        states, actions = read(self.model)
        with torch.no_grad():
            target_states, target_actions = read(self.target)
        return Batch(states, actions, target_states, target_actions, **self.outcomes.of(rows, self.device))
