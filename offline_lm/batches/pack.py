"""Packed rows: sequences end to end, no padding, each a prompt with any number of responses behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from offline_lm.batches.tokens import Tokens


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row of length L lie.

    Attributes:
        prompts: length of each prompt.
        branches: for each prompt, the lengths of its responses, laid out right behind it (may be empty).
    """

    prompts: Sequence[int]
    branches: Sequence[Sequence[int]]

    @cached_property
    def lengths(self) -> list[int]:
        return [p + sum(b) for p, b in zip(self.prompts, self.branches, strict=True)]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """For sequences of several branches: bool [M, P + M], what each of their M tokens may see; else None."""
        return [_branch_mask(p, b) if len(b) > 1 else None for p, b in zip(self.prompts, self.branches, strict=True)]

    def positions(self) -> Tensor:
        """int64 [L]: positions restart with every prompt, and behind the prompt with every branch."""
        parts = []
        for p, b in zip(self.prompts, self.branches, strict=True):
            parts.append(torch.arange(p))
            parts.extend(torch.arange(p, p + n) for n in b)
        return torch.cat(parts)

    def readouts(self) -> tuple[Tensor, Tensor]:
        """Indices into the row: the last token of every prompt [S], and of every branch [A] (DESIGN section 4)."""
        v, q, at = [], [], 0
        for p, b in zip(self.prompts, self.branches, strict=True):
            at += p
            v.append(at - 1)
            for n in b:
                at += n
                q.append(at - 1)
        return torch.tensor(v), torch.tensor(q, dtype=torch.long)


def _branch_mask(prompt: int, branches: Sequence[int]) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(branches)), torch.tensor(branches))
    own = (owner[:, None] == owner[None, :]).tril()
    return torch.cat([torch.ones(len(owner), prompt, dtype=torch.bool), own], dim=1)


def pack(tokens: Tokens, states: Sequence[int], responses: Sequence[Sequence[int]]) -> tuple[Tensor, Layout]:
    """One row of token ids int64 [L] and its layout: each state's prompt, then the given responses to it."""
    parts, prompts, branches = [], [], []
    for n, options in zip(states, responses, strict=True):
        parts.append(tokens.prompt(n))
        prompts.append(len(parts[-1]))
        branches.append([])
        for a in options:
            parts.append(tokens.response(a))
            branches[-1].append(len(parts[-1]))
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)), Layout(prompts, branches)


def rows(lengths: Sequence[int], budget: int) -> Iterator[range]:
    """Consecutive runs of sequences, each of at most `budget` tokens together (or of one longer sequence)."""
    start, held = 0, 0
    for i, n in enumerate(lengths):
        if i > start and held + n > budget:
            yield range(start, i)
            start, held = i, 0
        held += n
    if start < len(lengths):
        yield range(start, len(lengths))
