"""Further responses beside those that were logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from offline_lm.batches.tokens import Tokens

Array = np.ndarray


def with_responses(tokens: Tokens, more: Mapping[int, Sequence[Sequence[int]]]) -> Tokens:
    """`tokens` with responses of these ids behind the ones that the states have; what was logged stays what it was."""
    rows = np.array(sorted(more), np.int64)
    added = [list(ids) for n in rows.tolist() for ids in more[n]]
    if not added:
        return tokens
    counts = np.array([len(more[n]) for n in rows.tolist()])
    sizes = np.array([len(ids) for ids in added])
    behind = np.repeat(tokens.branch_ptr[rows + 1], counts)  # the response that each comes before
    lengths = np.insert(np.diff(tokens.response_ptr), behind, sizes)
    at = np.repeat(tokens.response_ptr[behind], sizes)
    ids = np.insert(tokens.response_ids, at, np.concatenate(added).astype(tokens.response_ids.dtype))
    grown = np.zeros(len(tokens) + 1, np.int64)
    grown[rows + 1] = counts
    shift = np.cumsum(grown)
    moved = np.arange(len(tokens.response_ptr) - 1) + np.repeat(shift[:-1], np.diff(tokens.branch_ptr))
    return replace(
        tokens, response_ids=ids, response_ptr=np.r_[0, np.cumsum(lengths)], branch_ptr=tokens.branch_ptr + shift,
        candidate_branch=moved[tokens.candidate_branch],
    )  # fmt: skip
