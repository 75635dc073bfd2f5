"""Features: hidden states at the readouts, computed once for a frozen backbone and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline_lm.batches.pack import pack, rows
from offline_lm.batches.tokens import Tokens
from offline_lm.models.backbone import hidden_states


@dataclass(frozen=True)
class Features:
    """v: float32 [N, d] at the last token of every prompt; q: float32 [A, d] at the last token of every response."""

    v: np.ndarray
    q: np.ndarray


def fingerprint(model: Any) -> str:
    """sha256 over names, shapes and bytes of every weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def key(*parts: Any) -> str:
    """Name of a cache entry: 20 hex digits of the sha256 of everything that its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


@torch.no_grad()
def compute(
    model: Any,
    tokens: Tokens,
    folder: Path,
    *,
    token_budget: int = 8192,
    progress: Callable[[Iterable[range]], Iterable[range]] = iter,
) -> Features:
    """Encode every state with all its responses, or open the folder where that was done before.

    One pass a state gives V and Q of every action there (the state is encoded once). The folder's name must be the
    `key` of weights, tokens and renderer; `done` is written last, so that a broken run is begun again.
    """
    names = ("v", "q")
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        width = model.config.hidden_size
        shapes = {"v": (len(tokens), width), "q": (len(tokens.response_ptr) - 1, width)}
        out = {n: np.lib.format.open_memmap(folder / f"{n}.npy", "w+", np.float32, shapes[n]) for n in names}
        model.eval()
        device = next(model.parameters()).device
        lengths = (np.diff(tokens.prompt_ptr) + np.diff(tokens.response_ptr[tokens.branch_ptr])).tolist()
        for states in progress(list(rows(lengths, token_budget))):
            branches = [range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1]) for n in states]
            ids, layout = pack(tokens, states, branches)
            hidden = hidden_states(model, ids.to(device), layout)
            at_v, at_q = layout.readouts()
            out["v"][states.start : states.stop] = hidden[at_v].float().cpu().numpy()
            span = slice(tokens.branch_ptr[states.start], tokens.branch_ptr[states.stop])
            out["q"][span] = hidden[at_q].float().cpu().numpy()
        for array in out.values():
            array.flush()
        (folder / "done").touch()
    return Features(*(np.load(folder / f"{n}.npy", mmap_mode="r") for n in names))
