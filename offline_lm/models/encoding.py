"""Rows of replay turned into the `Batch` of an algorithm through the backbone, gradients included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_lm.batches.pack import Layout, pack
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.models import lora
from offline_lm.models.backbone import hidden_states
from offline_lm.models.batching import Outcomes
from offline_lm.models.devices import sent
from offline_lm.types import Batch

Array = np.ndarray


@dataclass(frozen=True)
class _Loaded:
    """A batch on its way to the device: what of it needs no backbone."""

    rows: Array
    ids: Tensor
    layout: Layout
    at_v: Tensor
    at_q: Tensor
    first: Tensor
    acted: Tensor
    candidate_of: Tensor
    outcomes: dict[str, Tensor]


class EncodedBatches:
    """Batches through the backbone, gradients included: one packed pass gives V and Q of whole episodes.

    Args:
        target: a backbone of its own that follows the online one, which costs a second pass, without gradients; or
            None: target features are the online ones, detached, and only the heads have a target. That tracks less
            than what is trained (trap 8), and costs a quarter less.
        candidates: whether every candidate is encoded, beside the logged actions.
        autocast: dtype to compute the backbone in, where that is not the dtype of its weights.
    """

    def __init__(
        self,
        model: Any,
        target: Any | None,
        replay: Replay,
        tokens: Tokens,
        device: torch.device,
        autocast: torch.dtype | None = None,
        *,
        candidates: bool = False,
    ) -> None:
        self.candidates = candidates
        self.model, self.target, self.tokens, self.device, self.autocast = model, target, tokens, device, autocast
        self.outcomes = Outcomes(replay, tokens, device)
        self._ahead: _Loaded | None = None

    def ahead(self, batches: Iterator[Array]) -> Iterator[Array]:
        """The same endless batches, each packed and sent to the device by a thread while the one before is used."""
        with ThreadPoolExecutor(1) as thread:
            rows = next(batches)
            loading = thread.submit(self._load, rows)
            for following in batches:
                self._ahead = loading.result()
                loading = thread.submit(self._load, following)
                yield rows
                rows = following

    def __call__(self, rows: Array) -> Batch:
        ready = self._ahead
        loaded = ready if ready is not None and ready.rows is rows else self._load(rows)
        states, actions, options = self._read(self.model, loaded)
        if self.target is None:
            slow_states, slow_actions, slow_options = states.detach(), actions.detach(), options.detach()
        else:
            with torch.no_grad():
                slow_states, slow_actions, slow_options = self._read(self.target, loaded)
        return Batch(
            states, actions, slow_states, slow_actions, candidates=options, target_candidates=slow_options,
            candidate_of=loaded.candidate_of, **loaded.outcomes,
        )  # fmt: skip

    def _load(self, rows: Array) -> _Loaded:
        acted = np.asarray(self.tokens.acted[rows])
        begins, ends = (self.tokens.branch_ptr[rows + i].tolist() for i in (0, 1))
        spans = zip(begins, ends, acted.tolist(), strict=True)
        branches = [range(a, b) if self.candidates else range(a, a + has) for a, b, has in spans]
        ids, layout = pack(self.tokens, rows.tolist(), branches)
        counts = np.array([len(own) for own in branches])
        first = (np.cumsum(counts) - counts)[acted]  # the executed action is the first of its state's
        owner = np.repeat(np.arange(len(rows)), counts) if self.candidates else np.zeros(0, np.int64)
        arrays = (torch.from_numpy(x) for x in (first, acted, owner))
        ids, at_v, at_q, *moved = (sent(x, self.device) for x in (ids, *layout.readouts(), *arrays))
        return _Loaded(rows, ids, layout, at_v, at_q, *moved, self.outcomes.of(rows, self.device))

    def _read(self, model: Any, loaded: _Loaded) -> tuple[Tensor, Tensor, Tensor]:
        """Features of states, actions (zeros where there is none) and candidates, float32 as heads and losses are."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            hidden = hidden_states(model, loaded.ids, loaded.layout)
        states = hidden[loaded.at_v].float()
        read = hidden[loaded.at_q].float()
        actions = torch.zeros_like(states).masked_scatter(loaded.acted[:, None], read[loaded.first])
        return states, actions, read if self.candidates else read[:0]


@contextmanager
def training(
    model: Any, *, how: str, target: str, adapters: Mapping[str, Any], gradient_checkpointing: bool
) -> Iterator[tuple[Any | None, torch.dtype | None]]:
    """Make `model` trainable for the time being; afterwards it is a plain one again, of the dtype that it had.

    Args:
        how: full, all weights; or lora, adapters beside frozen weights, which are merged into them at the end.
        target: ema, the backbone has a target of its own; or heads, it has none.
        adapters: options of `lora.adapt`.

    Yields:
        The target backbone or None, and the dtype to compute in where that is not the weights': what `EncodedBatches`
        takes. Weights that are trained are float32 here, since bfloat16 ones would lose small updates.

    Raises:
        UserError: a backbone kept in float16, in which gradients underflow.
    """
    kept = model.dtype
    if kept == torch.float16:
        raise UserError("model.dtype=float16: a backbone is trained in bfloat16 or float32; give one of them")
    if how == "lora":
        lora.adapt(model, **adapters)
    else:
        model.float()
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    yield (lora.target_of(model) if target == "ema" else None), (None if kept == torch.float32 else kept)
    if gradient_checkpointing:
        model.activation_checkpointing_disable()
    if how == "lora":
        lora.merge(model)
    model.to(kept)
