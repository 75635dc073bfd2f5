"""Rows of replay turned into the `Batch` of an algorithm, from cached features."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.models.features import Features
from offline_lm.types import Batch

Array = np.ndarray

_CGROUP = Path("/sys/fs/cgroup")
_CHUNK = 8192


class Outcomes:
    """The part of a batch that is no feature: rewards, returns and masks of the rows that are usable.

    Args:
        device: where the columns are kept; the CPU if not given.
    """

    def __init__(self, replay: Replay, tokens: Tokens, device: torch.device | None = None) -> None:
        usable = np.asarray(tokens.usable)
        followed = np.r_[usable[1:], False] | replay.terminated
        self.episode_of = replay.episode_of
        numbers = {
            "reward": np.nan_to_num(replay.reward),
            "continues": ~replay.terminated,
            "returns": np.nan_to_num(replay.returns),
        }
        marks = {
            "acted": replay.acted & tokens.acted,
            "return_mask": ~np.isnan(replay.returns) & usable,
            "bootstrap_mask": replay.bootstraps & usable & followed,
        }
        # as two matrices, so that a batch takes two look-ups
        self._names = (*numbers, *marks)
        self._numbers = torch.from_numpy(np.stack([*numbers.values()]).astype(np.float32)).to(device)
        self._marks = torch.from_numpy(np.stack([*marks.values()]).astype(bool)).to(device)

    def of(self, rows: Array, device: torch.device) -> dict[str, Tensor]:
        """Columns of whole episodes' `rows`, with the offsets of the episodes among them."""
        # an episode may stand behind itself, at the end of one epoch and the start of the next
        follows = (np.diff(rows, prepend=-2) == 1) & (np.diff(self.episode_of[rows], prepend=-1) == 0)
        starts = np.flatnonzero(~follows)
        at = torch.from_numpy(rows).to(self._numbers.device)
        columns = (*self._numbers.index_select(1, at).to(device), *self._marks.index_select(1, at).to(device))
        offsets = torch.from_numpy(np.r_[starts, len(rows)]).to(device)
        return {"offsets": offsets, **dict(zip(self._names, columns, strict=True))}


class CachedBatches:
    """Batches for heads on a frozen backbone; target features are the same tensors.

    Args:
        candidates: whether batches hold the features of every candidate.
        resident: whether the features that heads are trained on are kept on `device`, or read from their file for every
            batch; "auto": kept, if they take at most a quarter of the memory that is free there.
    """

    def __init__(
        self,
        features: Features,
        replay: Replay,
        tokens: Tokens,
        device: torch.device,
        *,
        candidates: bool = False,
        resident: bool | str = "auto",
    ) -> None:
        self.features, self.device = features, device
        self.branch_ptr = np.asarray(tokens.branch_ptr) if candidates else None
        self.outcomes = Outcomes(replay, tokens, device)
        self.first = np.where(tokens.acted, tokens.branch_ptr[:-1], -1)
        size = 2 * len(features.v) * features.v.shape[1] * 4
        self.resident = 4 * size <= free_memory(device) if resident == "auto" else bool(resident)
        if self.resident:
            rows = np.arange(len(features.v))
            self._states = torch.empty(features.v.shape, device=device)
            self._actions = torch.empty_like(self._states)
            for part in np.split(rows, range(_CHUNK, len(rows), _CHUNK)):
                self._states[part[0] : part[-1] + 1], self._actions[part[0] : part[-1] + 1] = self._read(part)

    def __call__(self, rows: Array) -> Batch:
        if self.resident:
            at = torch.from_numpy(rows).to(self.device)
            states, actions = self._states.index_select(0, at), self._actions.index_select(0, at)
        else:
            states, actions = self._read(rows)
        options, owner = self._candidates(rows)
        return Batch(
            states, actions, states, actions,
            candidates=options, target_candidates=options, candidate_of=owner, **self.outcomes.of(rows, self.device),
        )  # fmt: skip

    def _candidates(self, rows: Array) -> tuple[Tensor, Tensor]:
        """Features of every action that is known at `rows`, and whose it is."""
        branches, owner = branches_of(self.branch_ptr, rows)
        options = torch.from_numpy(np.asarray(self.features.q[branches]))
        return options.to(self.device), torch.from_numpy(owner).to(self.device)

    def _read(self, rows: Array) -> tuple[Tensor, Tensor]:
        """Features of the states and logged actions of `rows`; zeros where there is no action."""
        states = np.asarray(self.features.v[rows])
        actions = np.zeros_like(states)
        first = self.first[rows]
        actions[first >= 0] = self.features.q[first[first >= 0]]
        return torch.from_numpy(states).to(self.device), torch.from_numpy(actions).to(self.device)


def branches_of(branch_ptr: Array | None, rows: Array) -> tuple[Array, Array]:
    """int64 [m] and [m]: the responses of `rows` one after the other, and which of the rows each belongs to.

    None of them where `branch_ptr` is None.
    """
    if branch_ptr is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    counts = branch_ptr[rows + 1] - branch_ptr[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    begins = np.cumsum(counts) - counts
    return np.arange(len(owner)) - begins[owner] + branch_ptr[rows][owner], owner


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses: of the device, else of the machine or of the control group that it is lent to.

    Page cache counts as used (what was just written or read is there, and as fast). 0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free
