"""Attention within each sequence of a packed row: every token sees its way back to the root of its tree, and no more.

A row holds sequences end to end, each a trunk with segments that hang off it (`offline_lm.batches.pack`).
`transformers` calls `packed_attention` for every layer of a model whose attention implementation is `NAME`; the layout
travels as the keyword argument `layout`.

Trunks attend causally, one call each, and on CUDA in half precision all in one call of the variable-length kernel.
Segments attend through a mask to the trunk and themselves, group by group.

Why not what `transformers` offers: its packing by `position_ids` builds a dense mask over the row on the CPU (six times
the work), and is silently ignored when a cache is in use or a mask is passed (sequences then leak into each other).
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
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
    if sliding_window is not None and layout.longest > sliding_window:
        raise ValueError(
            f"a sequence of {layout.longest} tokens exceeds the model's window of {sliding_window}:"
            " set data.max_tokens below it"
        )
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    sizes = [
        [trunk, *(g.size for g in groups)] for trunk, groups in zip(layout.trunks.tolist(), layout.groups, strict=True)
    ]
    split = zip(*(x.split(list(chain.from_iterable(sizes)), dim=2) for x in (query, key, value)), strict=True)
    pieces = [[next(split) for _ in sequence] for sequence in sizes]  # of every sequence: its trunk, its groups
    trunks = [sequence[0] for sequence in pieces]
    if dropout == 0.0 and has_kernel(query):
        attended = _in_one_call(trunks, layout, **options)
    else:
        attended = [sdpa(q, k, v, None, dropout, is_causal=True, **options) for q, k, v in trunks]
    biases = iter(layout.biases(query.device, query.dtype))
    out = []
    for done, sequence, groups in zip(attended, pieces, layout.groups, strict=True):
        out.append(done)
        (_, *trunk), *segments = sequence
        for (q, *own), group in zip(segments, groups, strict=True):
            k, v = (torch.cat([t[:, :, : group.seen], o], dim=2) for t, o in zip(trunk, own, strict=True))
            out.append(sdpa(q, k, v, next(biases), dropout, **options))
    return torch.cat(out, dim=2).transpose(1, 2), None


def has_kernel(query: Tensor) -> bool:
    """Whether the variable-length kernel takes such heads: flash attention, from Ampere on."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _in_one_call(trunks: list[tuple[Tensor, ...]], layout: Layout, **options: Any) -> list[Tensor]:
    """Causal attention of every trunk, each [1, H, n, D], by the variable-length kernel."""
    q, k, v = (torch.cat(parts, dim=2)[0].transpose(0, 1) for parts in zip(*trunks, strict=True))
    borders, longest = layout.borders(q.device), int(layout.trunks.max())
    out: Any = varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(-1, 0), **options)
    return list(out.transpose(0, 1)[None].split(layout.trunks.tolist(), dim=2))


AttentionInterface.register(NAME, packed_attention)
