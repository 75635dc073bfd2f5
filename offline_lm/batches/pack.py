"""Packed rows: sequences end to end, no padding, a prefix that several states share encoded once.

A sequence is a tree of tokens: a causal *trunk*, and *segments* that branch off it. Candidate actions are segments at
the end of their prompt; states of an episode whose prompts go on from one another share a trunk, and what is a state's
own (its goal, its actions) hangs where it leaves the trunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_lm.batches.tokens import COMPARED, Tokens, common_prefix

Array = np.ndarray

# Where two prompts share c tokens, one of n tokens is encoded once from there on. That saves the c tokens' matrix
# products and costs attention through a mask, n - c tokens each against n, in place of causal attention, n^2 / 2. With
# one token's products worth _TOKEN scores (6 * width for a Llama layer) sharing pays where c * (_TOKEN + n) > n^2 / 2.
_TOKEN = 1024
_LEAST = COMPARED  # below this a further call costs more than it saves

_GROUP = 512
"""Off-trunk tokens that attend in one masked call: one call a branch is slower for short ones, one for all of them for
long ones (analysis/benchmarks/candidates.py)."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the S sequences of a packed row of length L lie: each a trunk, then its segments.

    Attributes:
        trunks: int64 [S], length of each trunk.
        owner: int64 [G], the sequence that a segment belongs to, ascending.
        seen: int64 [G], how many tokens of the trunk it sees: it branches off behind them.
        parent: int64 [G], the earlier segment that it goes on from, and sees with all that that sees; -1: the trunk.
            Segments that go on from one another stand together.
        sizes: int64 [G], its length.
        prompt_ends, branch_ends: int64, index in the row of the last token of every prompt, and of every branch.
    """

    trunks: Array
    owner: Array
    seen: Array
    parent: Array
    sizes: Array
    prompt_ends: Array
    branch_ends: Array
    _on_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: Sequence[int], branches: Sequence[Sequence[int]]) -> Layout:
        """Of prompts of these lengths, each with its responses behind it: only several of them are segments."""
        counts = np.fromiter(map(len, branches), np.int64, len(branches))
        sizes = np.fromiter(chain.from_iterable(branches), np.int64)
        return cls._plain(np.asarray(prompts, np.int64), counts, sizes)

    @classmethod
    def _plain(cls, prompts: Array, counts: Array, sizes: Array) -> Layout:
        owner = np.repeat(np.arange(len(prompts)), counts)
        before = np.cumsum(prompts)
        branch_ends = np.cumsum(sizes) + before[owner] - 1
        prompt_ends = before + np.concatenate([[0], np.cumsum(sizes)])[np.cumsum(counts) - counts] - 1
        alone = counts == 1
        trunks = prompts + np.where(alone, np.bincount(owner, sizes, len(prompts)).astype(np.int64), 0)
        several = ~alone[owner]
        owner = owner[several]
        none = np.full(len(owner), -1)
        return cls(trunks, owner, prompts[owner], none, sizes[several], prompt_ends, branch_ends)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every sequence, segments included."""
        return (self.trunks + np.bincount(self.owner, self.sizes, len(self.trunks)).astype(np.int64)).tolist()

    @cached_property
    def _starts(self) -> Array:
        """int64 [G]: the position of every segment's first token."""
        starts = self.seen.copy()
        for g in np.flatnonzero(self.parent >= 0):
            starts[g] = starts[self.parent[g]] + self.sizes[self.parent[g]]
        return starts

    @property
    def longest(self) -> int:
        """Tokens from a root to the end of its longest branch."""
        return max(int(self.trunks.max()), int((self._starts + self.sizes).max(initial=0)))

    def positions(self) -> Tensor:
        """int64 [L]: positions begin at 0 in every trunk, and go on in every segment from what it hangs on."""
        trunks = np.arange(len(self.trunks))
        order = np.argsort(np.concatenate([trunks, self.owner]), kind="stable")  # each trunk, then its segments
        first = np.concatenate([np.zeros_like(trunks), self._starts])[order].tolist()
        sizes = np.concatenate([self.trunks, self.sizes])[order].tolist()
        line = np.arange(self.longest)
        return torch.from_numpy(np.concatenate([line[a : a + n] for a, n in zip(first, sizes, strict=True)]))

    def readouts(self) -> tuple[Tensor, Tensor]:
        """Indices into the row: the last token of every prompt [S], and of every branch [A] (DESIGN section 4)."""
        return torch.from_numpy(self.prompt_ends), torch.from_numpy(self.branch_ends)

    @cached_property
    def groups(self) -> list[list[Group]]:
        """For every sequence its segments, some together in one group."""
        out: list[list[Group]] = [[] for _ in self.trunks]
        roots = np.flatnonzero(self.parent < 0)
        if not len(roots):
            return out
        stops = [*roots[1:].tolist(), len(self.parent)]
        start = held = 0
        for root, stop in zip(roots.tolist(), stops, strict=True):
            more = int(self.sizes[root:stop].sum())
            if root > start and (self.owner[root] != self.owner[start] or held + more > _GROUP):
                out[self.owner[start]].append(self._group(start, root))
                start, held = root, 0
            held += more
        out[self.owner[start]].append(self._group(start, len(self.parent)))
        return out

    def _group(self, start: int, stop: int) -> Group:
        seen, sizes, parent = self.seen[start:stop], self.sizes[start:stop], self.parent[start:stop] - start
        ancestors = np.eye(len(sizes), dtype=bool)
        for i in np.flatnonzero(parent >= 0):
            ancestors[i] |= ancestors[parent[i]]
        segment = np.repeat(np.arange(len(sizes)), sizes)
        trunk = np.arange(seen.max()) < seen[segment][:, None]
        mask = np.concatenate([trunk, np.tril(ancestors[segment][:, segment])], axis=1)
        return Group(int(sizes.sum()), int(seen.max()), torch.from_numpy(mask))

    def biases(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The groups' masks in order as numbers to add to scores, 0 or -inf; made once for all layers."""
        key = (device, dtype)
        if key not in self._on_device:
            masks = [group.mask for group in chain.from_iterable(self.groups)]
            self._on_device[key] = [
                torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf).to(device) for mask in masks
            ]
        return self._on_device[key]

    def borders(self, device: torch.device) -> Tensor:
        """int32 [S+1]: where the trunks lie, were they end to end."""
        key = (device, torch.int32)
        if key not in self._on_device:
            self._on_device[key] = [torch.from_numpy(np.r_[0, np.cumsum(self.trunks)].astype(np.int32)).to(device)]
        return self._on_device[key][0]


@dataclass(frozen=True, eq=False)
class Group:
    """Segments of one sequence that stand together.

    Attributes:
        size: their M tokens.
        seen: the P first tokens of the trunk that they see between them.
        mask: bool [M, P + M], what each of them may see.
    """

    size: int
    seen: int
    mask: Tensor


def pack(tokens: Tokens, states: Sequence[int] | Array, responses: Sequence[Sequence[int]]) -> tuple[Tensor, Layout]:
    """One row of token ids int64 [L] and its layout: each state's prompt, then the given responses to it.

    Where a state's prompt begins with much of the one before it (and perhaps with the response to that), the prefix
    stands there once. Results are those of every [s; a] alone.
    """
    at = np.asarray(states, np.int64)
    counts = np.fromiter(map(len, responses), np.int64, len(responses))
    branches = np.fromiter(chain.from_iterable(responses), np.int64)
    starts, stops = tokens.prompt_ptr[at], tokens.prompt_ptr[at + 1]
    prompts = stops - starts
    shared = tokens.shared_with_previous(at)
    if _pays(shared[1:], np.minimum(prompts[1:], prompts[:-1])).any():
        parts, layout = _Trees(tokens, at.tolist(), responses, shared.tolist()).packed()
    else:
        first, last = tokens.response_ptr[branches], tokens.response_ptr[branches + 1]
        layout = Layout._plain(prompts, counts, last - first)
        spans = zip(first.tolist(), last.tolist(), strict=True)
        parts = []
        for start, stop, n in zip(starts.tolist(), stops.tolist(), counts.tolist(), strict=True):
            parts.append(tokens.prompt_ids[start:stop])
            for _ in range(n):
                a, b = next(spans)
                parts.append(tokens.response_ids[a:b])
    return torch.from_numpy(np.concatenate(parts, dtype=np.int64)), layout


def _pays(shared: Any, length: Any) -> Any:
    return (shared >= _LEAST) & (2 * shared * (_TOKEN + length) > length * length)


class _Trees:
    """Consecutive states gathered into trees. The trunk of a tree is its longest prompt."""

    def __init__(
        self, tokens: Tokens, states: list[int], responses: Sequence[Sequence[int]], shared: list[int]
    ) -> None:
        self.tokens, self.responses = tokens, responses
        self.prompts = [tokens.prompt(n) for n in states]
        self.shared = shared
        self.parts: list[Array] = []
        self.length = 0
        self.trunks: list[int] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.prompt_ends = np.zeros(len(states), np.int64)
        self.branch_ends: list[list[int]] = [[] for _ in states]

    def packed(self) -> tuple[list[Array], Layout]:
        for trunk, on_trunk in self._gathered():
            self._plant(trunk, on_trunk)
        owner, seen, parent, sizes = np.array(self.segments, np.int64).reshape(-1, 4).T
        ends = np.fromiter(chain.from_iterable(self.branch_ends), np.int64)
        return self.parts, Layout(np.array(self.trunks, np.int64), owner, seen, parent, sizes, self.prompt_ends, ends)

    def _gathered(self) -> Iterator[tuple[int, dict[int, int]]]:
        """The state that each trunk is of; and for all states of its tree, how many first tokens are on the trunk."""
        trunk, on_trunk = 0, {0: len(self.prompts[0])}
        for i in range(1, len(self.prompts)):
            n, length = len(self.prompts[i]), len(self.prompts[trunk])
            c = min(self.shared[i], on_trunk[i - 1])
            if self.shared[i] == on_trunk[i - 1]:  # it may go on along the trunk where the one before has left it
                c += common_prefix(self.prompts[i][c:], self.prompts[trunk][c:])
            goes_on = n > length and all(c >= x for j, x in on_trunk.items() if j != trunk)
            if not _pays(c, length if goes_on else n):
                yield trunk, on_trunk
                trunk, on_trunk = i, {i: n}
            elif goes_on:
                on_trunk[trunk] = c
                trunk, on_trunk[i] = i, n
            else:
                on_trunk[i] = c
        yield trunk, on_trunk

    def _plant(self, trunk: int, on_trunk: dict[int, int]) -> None:
        base, sequence = self.length, len(self.trunks)
        own = self.responses[trunk]
        ids = self.prompts[trunk]
        if len(own) == 1:
            ids = np.concatenate([ids, self.tokens.response(own[0])])
        self.parts.append(ids)
        self.length += len(ids)
        self.trunks.append(len(ids))
        for i, c in on_trunk.items():
            prompt, parent = self.prompts[i], -1
            end = base + c - 1
            if c < len(prompt):
                end = self._hang(sequence, c, -1, prompt[c:])
                parent = len(self.segments) - 1
            self.prompt_ends[i] = end
            for a in self.responses[i]:
                response = self.tokens.response(a)
                stop = c + len(response)
                if parent < 0 and np.array_equal(ids[c:stop], response):
                    self.branch_ends[i].append(base + stop - 1)
                else:
                    self.branch_ends[i].append(self._hang(sequence, c, parent, response))

    def _hang(self, sequence: int, seen: int, parent: int, ids: Array) -> int:
        """Adds a segment; the index of its last token."""
        self.segments.append((sequence, seen, parent, len(ids)))
        self.parts.append(ids)
        self.length += len(ids)
        return self.length - 1


def packed_lengths(tokens: Tokens, states: Array, responses: Array) -> tuple[Array, Array]:
    """Tokens of each state with its responses, and how many of them it shares with the state before it, int64 [S].

    Of these `pack` saves all where prompts go on from one another; where they diverge early it may save fewer.

    Args:
        responses: int64 [S], the tokens of the responses that are packed with each state.
    """
    prompts = tokens.prompt_ptr[states + 1] - tokens.prompt_ptr[states]
    shared = tokens.shared_with_previous(states)
    shorter = np.minimum(prompts, np.r_[0, prompts[:-1]])
    return prompts + responses, np.where(_pays(shared, shorter), shared, 0)


def state_rows(
    tokens: Tokens, states: Sequence[int], responses: Sequence[Sequence[int]], budget: int
) -> Iterator[range]:
    """Cuts what `pack` takes into rows of at most `budget` tokens (or one longer state), shared prefixes counted once.

    Yields:
        Places in `states`, consecutive.
    """
    branches = np.fromiter(chain.from_iterable(responses), np.int64)
    owner = np.repeat(np.arange(len(responses)), np.fromiter(map(len, responses), np.int64, len(responses)))
    sizes = tokens.response_ptr[branches + 1] - tokens.response_ptr[branches]
    counted = np.bincount(owner, sizes, len(responses)).astype(np.int64)
    lengths, shared = packed_lengths(tokens, np.asarray(states, np.int64), counted)
    return rows(lengths.tolist(), budget, shared.tolist())


def rows(lengths: Sequence[int], budget: int, shared: Sequence[int] | None = None) -> Iterator[range]:
    """Consecutive runs of sequences, each of at most `budget` tokens together (or of one longer sequence).

    Args:
        shared: how many tokens of each need not be counted behind the one before it.
    """
    start, held = 0, 0
    for i, n in enumerate(lengths):
        more = n - shared[i] if shared else n
        if i > start and held + more > budget:
            yield range(start, i)
            start, held, more = i, 0, n
        held += n if i == start else more
    if start < len(lengths):
        yield range(start, len(lengths))
