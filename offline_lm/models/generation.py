"""Responses drawn from a language model for many prompts at once, with the log-probability of each token as drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

HELD = 2**17
"""Tokens whose keys and values are held at once: more prompts than that are taken one part after another."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response.

    Attributes:
        ids: its tokens, the end-of-turn token included unless it was cut before that.
        logprobs: of each token, as it was drawn: of softmax(scores / temperature) over the whole vocabulary.
    """

    ids: list[int]
    logprobs: list[float]

    @property
    def logprob(self) -> float:
        return float(np.sum(self.logprobs))


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    n: int,
    rngs: Sequence[np.random.Generator],
    *,
    end: int,
    temperature: float = 1.0,
    max_tokens: int = 256,
    scores: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[list[Response]]:
    """`n` responses to each prompt.

    Each prompt is read once, whatever `n`, and the prompts together. What is drawn for one depends on its own generator
    alone, not on what stands beside it (but for rounding): token t of sample i goes by its [i, t] uniform number.

    Args:
        prompts: token ids, none empty.
        rngs: one for each prompt; each gives n * max_tokens numbers.
        end: the token that ends a response; one that has not ended after `max_tokens` tokens is cut.
        temperature: 0 takes the likeliest token, whose probability is then 1.
        scores: from logits [B, vocab] and last hidden states [B, d] to the scores that are drawn from; None: logits.
    """
    uniforms = [torch.from_numpy(rng.random((n, max_tokens))) for rng in rngs]
    out: list[list[Response]] = []
    with _unpacked(model):
        for part in _parts([len(prompt) + max_tokens for prompt in prompts], HELD // n):
            drawn = _generate(
                model, [prompts[i] for i in part], torch.cat([uniforms[i] for i in part]), n, end, temperature, scores
            )
            out += [drawn[at : at + n] for at in range(0, len(drawn), n)]
    return out


def _generate(
    model: Any,
    prompts: list[Sequence[int]],
    uniform: Tensor,
    n: int,
    end: int,
    temperature: float,
    scores: Callable[[Tensor, Tensor], Tensor] | None,
) -> list[Response]:
    device = next(model.parameters()).device
    longest, lengths = max(map(len, prompts)), torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.tensor([[end] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    seen = (torch.arange(longest) >= longest - lengths[:, None]).long()  # on the left, behind which nothing stands
    position = (seen.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    ids, seen, position, uniform = (x.to(device) for x in (ids, seen, position, uniform))
    tokens, logprobs = [], []
    going = torch.ones(len(prompts) * n, dtype=torch.bool, device=device)
    for t in range(uniform.shape[1]):
        found = model(
            input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True,
            logits_to_keep=1, output_hidden_states=scores is not None,
        )  # fmt: skip
        given = found.logits[:, -1] if scores is None else scores(found.logits[:, -1], found.hidden_states[-1][:, -1])
        if t == 0:  # from here on n responses to each prompt
            given, seen, position = (x.repeat_interleave(n, dim=0) for x in (given, seen, position[:, -1:]))
            cache.batch_repeat_interleave(n)
        token, logprob = _draw(given, uniform[:, t], temperature)
        tokens.append(token)
        logprobs.append(logprob)
        going &= token != end
        if not going.any():
            break
        ids, position = token[:, None], position + 1
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
    of_rows = zip(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
    sizes = ((row.index(end) + 1 if end in row else len(row), row, p) for row, p in of_rows)
    return [Response(row[:size], p[:size]) for size, row, p in sizes]


def _draw(scores: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens [B] by the inverse of their distribution function at `uniform` [B], and the log of their probability."""
    if temperature == 0:
        return scores.argmax(-1), torch.zeros_like(uniform)
    logprobs = (scores.double() / temperature).log_softmax(-1)
    below = logprobs.exp().cumsum(-1)
    token = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)[:, 0]
    token = token.clamp(max=scores.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _parts(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Consecutive rows that, padded to the longest of them, take at most `most` tokens; a longer one by itself."""
    start = longest = 0
    for i, size in enumerate(sizes):
        longest = max(longest, size)
        if i > start and longest * (i + 1 - start) > most:
            yield range(start, i)
            start, longest = i, size
    if sizes:
        yield range(start, len(sizes))


@contextmanager
def _unpacked(model: Any) -> Iterator[None]:
    """A cache of keys is filled as no packed row is."""
    packed = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(packed)
