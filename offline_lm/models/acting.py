"""Log-probabilities of responses under a language model, from the same packed rows as a critic's values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offline_lm.batches.pack import Layout, pack, state_rows
from offline_lm.batches.tokens import Tokens
from offline_lm.losses.policy import entropy as entropies

Array = np.ndarray

_ENTROPY_ROWS = 512
"""Tokens whose scores over the vocabulary are copied at once."""


@dataclass(frozen=True)
class Chosen:
    """Responses to act on: for each of S states (ascending rows of `Tokens`), which of its responses.

    Attributes:
        states: int64 [S].
        responses: [S] lists of numbers of responses.
    """

    states: Array
    responses: list[list[int]]

    @classmethod
    def of(cls, tokens: Tokens, branches: Array) -> Chosen:
        """The `branches` (ascending numbers of responses), each at its state."""
        owner = np.searchsorted(tokens.branch_ptr, branches, side="right") - 1
        states, first = np.unique(owner, return_index=True)
        return cls(states, [part.tolist() for part in np.split(branches, first[1:])])

    def rows(self, tokens: Tokens, budget: int) -> Iterator[Chosen]:
        """Parts of at most `budget` tokens (or one longer state), in order."""
        for span in state_rows(tokens, self.states.tolist(), self.responses, budget):
            yield Chosen(self.states[span.start : span.stop], self.responses[span.start : span.stop])

    def __len__(self) -> int:
        return sum(map(len, self.responses))

    @property
    def branches(self) -> Array:
        return np.array([a for own in self.responses for a in own], np.int64)


def lengths(tokens: Tokens, branches: Array) -> Array:
    """int64: tokens of each response, its end-of-turn token included (trap 7)."""
    return tokens.response_ptr[branches + 1] - tokens.response_ptr[branches]


def response_logprobs(
    model: Any, tokens: Tokens, chosen: Chosen, *, autocast: torch.dtype | None = None, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log pi(token | what stands before it) of every token of the chosen responses, and the entropy there, both [T].

    The entropy is computed where it is asked for, without gradient; else it is empty.

    One packed pass. The first token of a response is foretold by its prompt's last one, and the end-of-turn token is
    one of the response's. Vocabulary scores are made where a response's token is foretold, and nowhere else.
    """
    ids, layout = pack(tokens, chosen.states, chosen.responses)
    device = next(model.parameters()).device
    at, foretold = foretelling(layout, ids, chosen, lengths(tokens, chosen.branches))
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        logits = model(
            input_ids=ids[None].to(device), position_ids=layout.positions()[None].to(device), use_cache=False,
            layout=layout, logits_to_keep=at.to(device),
        ).logits[0].float()  # fmt: skip
    logprobs = -cross_entropy(logits, foretold.to(device), reduction="none")
    with torch.no_grad():
        parts = [entropies(part) for part in logits.split(_ENTROPY_ROWS)] if entropy else [logprobs[:0]]
    return logprobs, torch.cat(parts)


def foretelling(layout: Layout, ids: Tensor, chosen: Chosen, sizes: Array) -> tuple[Tensor, Tensor]:
    """Where in the row each token of the responses is foretold, and which token that is."""
    prompt_ends = np.repeat(layout.prompt_ends, [len(own) for own in chosen.responses])
    stops = layout.branch_ends + 1
    first = np.cumsum(sizes) - sizes
    within = np.arange(sizes.sum()) - np.repeat(first, sizes)
    at = np.repeat(stops - sizes, sizes) + within
    before = at - 1
    before[first] = prompt_ends
    return torch.from_numpy(before), ids[torch.from_numpy(at)]


@torch.no_grad()
def all_logprobs(model: Any, tokens: Tokens, branches: Array, *, budget: int, **options: Any) -> Array:
    """float32 [T]: those of the responses `branches`, ascending, end to end; without gradients."""
    model.eval()
    parts = [
        response_logprobs(model, tokens, part, **options)[0].float().cpu().numpy()
        for part in Chosen.of(tokens, branches).rows(tokens, budget)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def spans(tokens: Tokens, branches: Array, all_branches: Array) -> Array:
    """Places of the tokens of `branches` in an array that holds those of `all_branches` (ascending) end to end."""
    ends = np.cumsum(lengths(tokens, all_branches))
    sizes = lengths(tokens, branches)
    starts = ends[np.searchsorted(all_branches, branches)] - sizes
    return np.concatenate([np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)] or [np.zeros(0, np.int64)])


def owners(sizes: Sequence[int] | Array) -> Array:
    """int64: which of the responses of these lengths each token belongs to."""
    return np.repeat(np.arange(len(sizes)), sizes)


def of_responses(tokens: Tokens, branches: Array, logprobs: Array | Tensor) -> Array:
    """float64 [R]: log pi(a | s) of each of these responses, the sum over its tokens, which lie end to end, [T]."""
    sizes = lengths(tokens, branches)
    of_tokens = logprobs.double().cpu().numpy() if isinstance(logprobs, Tensor) else logprobs
    return np.bincount(owners(sizes), of_tokens, minlength=len(sizes))


def distinct(tokens: Tokens) -> tuple[Array, Array]:
    """int64 [N], [A]: the first state with the same prompt, and the first response to such a one with the same tokens.

    A response stands with the state that stands for its own, so that one pass reads them both.
    """
    states, responses = np.zeros(len(tokens), np.int64), np.zeros(len(tokens.response_ptr) - 1, np.int64)
    seen: dict[bytes, int] = {}
    said: dict[tuple[int, bytes], int] = {}
    for n in range(len(tokens)):
        states[n] = first = seen.setdefault(tokens.prompt(n).tobytes(), n)
        for a in range(int(tokens.branch_ptr[n]), int(tokens.branch_ptr[n + 1])):
            responses[a] = said.setdefault((first, tokens.response(a).tobytes()), a)
    return states, responses
