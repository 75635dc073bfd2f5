"""Responses put beside the logged ones: everything else is found where it was."""

import numpy as np

from offline_lm.batches.responses import with_responses


def said(tokens, n):
    return [tokens.response(a).tolist() for a in range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1])]


def test_further_responses_stand_behind_those_of_their_state(shop):
    tokens = shop.tokens
    last = len(tokens) - 1
    more = {3: [[5, 6], [7]], 0: [[9]], last: [[1, 2, 3]]}
    grown = with_responses(tokens, more)
    for n in range(len(tokens)):
        assert said(grown, n) == said(tokens, n) + more.get(n, [])
        np.testing.assert_array_equal(grown.prompt(n), tokens.prompt(n))
        for old, new in zip(*(t.candidate_branch[t.candidate_ptr[n] : t.candidate_ptr[n + 1]] for t in (tokens, grown)),
                            strict=True):  # fmt: skip
            np.testing.assert_array_equal(tokens.response(old), grown.response(new))
    assert grown.response_ids.dtype == tokens.response_ids.dtype
    assert len(grown.candidate_branch) == len(tokens.candidate_branch)
    assert (grown.branch_ptr[-1], grown.response_ptr[-1]) == (tokens.branch_ptr[-1] + 4, tokens.response_ptr[-1] + 7)


def test_nothing_more_is_the_same(shop):
    assert with_responses(shop.tokens, {}) is shop.tokens
    assert with_responses(shop.tokens, {2: []}) is shop.tokens
