"""Features: hidden states at the readouts, computed once for a frozen backbone and kept in a memory-mapped cache.

A readout is the hidden state at the last token of a sequence: of a prompt for V, of a prompt and a response for Q
(DESIGN section 4). It is a function of weights and token ids alone. So it is kept under the hash of its ids, in a
folder for its weights, and every selection of episodes, algorithm and seed that reads the same sequence finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_lm.batches.pack import pack, state_rows
from offline_lm.batches.tokens import Tokens
from offline_lm.models.backbone import hidden_states
from offline_lm.models.devices import row_tokens
from offline_lm.models.feature_cache import KEY, Dtype, FeatureCache, Rows

Array = np.ndarray

READOUT = "last token"
"""Part of every cache key: change it when a feature becomes another function of weights and tokens."""


@dataclass(frozen=True)
class Features:
    """v: [N, d] at the last token of every prompt; q: [A, d] at the last token of every response. Indexed, float32."""

    v: Rows | Array
    q: Rows | Array


def fingerprint(model: Any) -> str:
    """sha256 over the configuration, and names, shapes and bytes of every weight, an adapter's included."""
    weights = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as threads:  # hashlib lets the other threads run
        digests = list(threads.map(_digest, [weight for _, weight in weights]))
    config = {k: v for k, v in model.config.to_dict().items() if k not in _UNREAD}
    parts = [(name, list(w.shape), str(w.dtype), digest) for (name, w), digest in zip(weights, digests, strict=True)]
    return hashlib.sha256(json.dumps([config, parts], sort_keys=True, default=str).encode()).hexdigest()


_UNREAD = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")
"""Of a configuration: what hidden states do not depend on (the weights have their dtypes)."""


def _digest(weight: Tensor) -> str:
    content = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def key(*parts: Any) -> str:
    """Name of a cache entry: 20 hex digits of the sha256 of everything that its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


@torch.no_grad()
def compute(
    model: Any,
    tokens: Tokens,
    cache: Path,
    *,
    dtype: Dtype = "float32",
    token_budget: int | None = None,
    progress: Callable[[list[range]], Iterable[range]] = iter,
) -> Features:
    """Readouts of every state and of every response to it; encodes those alone that `cache` does not hold.

    One pass a state gives V and Q of every action there. Equal states are encoded once. Where several processes do this
    at once, one encodes, and the others wait and find its rows. A kill costs the last seconds.

    Args:
        cache: folder of all caches; that of these weights is `cache / key(...)`, made here.
        dtype: what the rows are stored in; they are read as float32 all the same.
        token_budget: tokens in one forward pass; None: as many as suit the device.
        progress: wraps the passes, each a range of states that are encoded.

    Raises:
        UserError: the folder cannot be written, is damaged, or is of other weights.
        FloatingPointError: hidden states that are not finite.
    """
    of = {"weights": fingerprint(model), "readout": READOUT}
    found = FeatureCache(cache / key(of, dtype), of, model.config.hidden_size, dtype)
    v_keys, q_keys = _keys(tokens)
    wanted = np.concatenate([v_keys, q_keys])
    if (found.find(wanted) < 0).any():
        model.eval()
        device = next(model.parameters()).device
        with found.appending() as appender:
            states, branches = _missing(found, tokens, v_keys, q_keys)
            for span in progress(list(state_rows(tokens, states, branches, token_budget or row_tokens(device)))):
                some, options = states[span.start : span.stop], branches[span.start : span.stop]
                ids, layout = pack(tokens, some, options)
                hidden = hidden_states(model, ids.to(device), layout)
                chosen = np.concatenate([v_keys[some], q_keys[[a for b in options for a in b]]])
                new = np.flatnonzero(found.find(chosen) < 0)  # V is there where the responses alone are new
                at = torch.cat(layout.readouts())[new].to(device)
                appender.add(chosen[new], hidden[at])
    at = found.find(wanted)
    return Features(Rows(found.stored, at[: len(v_keys)]), Rows(found.stored, at[len(v_keys) :]))


def _keys(tokens: Tokens) -> tuple[Array, Array]:
    """The first 16 bytes of the sha256 of the ids up to each readout: S16 [N] for prompts, S16 [A] for responses."""
    prompts, responses = [], []
    for n, (first, last) in enumerate(pairwise(tokens.branch_ptr.tolist())):
        prompt = hashlib.sha256(tokens.prompt(n).astype("<u4").data)
        prompts.append(prompt.digest()[:KEY])
        for a in range(first, last):
            whole = prompt.copy()
            whole.update(tokens.response(a).astype("<u4").data)
            responses.append(whole.digest()[:KEY])
    return np.array(prompts, f"S{KEY}"), np.array(responses, f"S{KEY}")


def _missing(found: FeatureCache, tokens: Tokens, v_keys: Array, q_keys: Array) -> tuple[list[int], list[list[int]]]:
    """The states to encode, in the order of episodes, and the responses to each that are to be read with it.

    A response goes to the first of the states with its prompt, so that equal states are encoded once.
    """
    owner = np.repeat(np.arange(len(tokens)), np.diff(tokens.branch_ptr))
    new_v, new_q = _new(found, v_keys), _new(found, q_keys)
    wanted = np.union1d(new_v, owner[new_q])
    _, first, same = np.unique(v_keys[wanted], return_index=True, return_inverse=True)
    stands_for = dict(zip(wanted.tolist(), wanted[first][same].tolist(), strict=True))
    branches: dict[int, list[int]] = {n: [] for n in sorted(set(stands_for.values()))}
    for a in new_q.tolist():
        branches[stands_for[int(owner[a])]].append(a)
    return list(branches), list(branches.values())


def _new(found: FeatureCache, keys: Array) -> Array:
    """Places of the keys that are not in the cache; of equal ones the first."""
    _, first = np.unique(keys, return_index=True)
    return np.sort(first[found.find(keys[first]) < 0])
