"""Attention within each sequence of a packed row, and between a state and each of its actions.

A row holds sequences end to end. Each sequence is a prompt with any number of responses (branches): every
branch sees its prompt and itself, and nothing else. `transformers` calls `packed_attention` for every layer of a model
whose attention implementation is `NAME`; the layout travels as the keyword argument `layout`.

Why not what `transformers` offers: its packing by `position_ids` builds a dense mask over the row on the CPU (six times
the work), and is silently ignored when a cache is in use or a mask is passed (sequences then leak into each other).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from offline_lm.batches.pack import Layout

NAME = "offline_lm_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of `layout`.

    Args:
        query: [1, H, L, D]; key, value: [1, H_kv, L, D].

    Returns:
        [1, L, H, D], and None in place of attention weights.

    Raises:
        ValueError: without a layout (a model that does not hand its keyword arguments down would leak between
            sequences), where a sequence is longer than the model's attention window, or where the model's attention
            is no plain softmax (soft-capped logits, attention sinks): without these its numbers would be others.
    """
    if layout is None:
        raise ValueError(f"{type(module).__name__} did not pass on `layout`: this architecture cannot be packed")
    if softcap is not None or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} caps its logits or has attention sinks, which packed attention does not compute"
        )
    if sliding_window is not None and max(layout.lengths) > sliding_window:
        raise ValueError(
            f"a sequence of {max(layout.lengths)} tokens exceeds the model's window of {sliding_window}:"
            " set data.max_tokens below it"
        )
    gqa = query.shape[1] != key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa)

    out = []
    split = zip(*(x.split(layout.lengths, dim=2) for x in (query, key, value)), strict=True)
    for (q, k, v), prompt, mask in zip(split, layout.prompts, layout.masks, strict=True):
        if mask is None:
            out.append(attend(q, k, v, None))
        else:
            out.append(attend(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], None))
            out.append(attend(q[:, :, prompt:], k, v, mask.to(q.device)))
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
