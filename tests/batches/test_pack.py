import numpy as np
import pytest
import torch

from offline_lm.batches.pack import Layout, pack, rows
from offline_lm.batches.render import Cuts
from offline_lm.batches.tokens import Tokens

LAYOUT = Layout([3, 2, 1], [[2, 1], [], [2]])


def test_positions_restart_with_prompts_and_branches():
    assert LAYOUT.positions().tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 2]
    assert LAYOUT.lengths == [6, 2, 3]


def test_readouts_are_the_last_tokens_of_prompts_and_branches():
    v, q = LAYOUT.readouts()
    assert v.tolist() == [2, 7, 8]
    assert q.tolist() == [4, 5, 10]


def test_readouts_without_a_branch_are_indices_all_the_same():
    v, q = Layout([4], [[]]).readouts()
    assert (v.tolist(), q.tolist(), q.dtype) == ([3], [], torch.int64)


def test_only_several_branches_need_a_mask():
    several, none, single = LAYOUT.masks
    assert none is None
    assert single is None
    assert several is not None
    assert several.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([9], [(0, 1)]),
        ([2, 2, 2], [(0, 2), (2, 3)]),
        ([9, 1, 1], [(0, 1), (1, 3)]),
        ([1, 9, 4], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_rows_hold_the_budget_or_one_longer_sequence(lengths, expected):
    assert [(r.start, r.stop) for r in rows(lengths, 4)] == expected


def test_pack_lays_each_prompt_before_its_responses():
    tokens = Tokens(
        np.array([1, 2, 3, 4], np.uint16), np.array([0, 3, 4]), np.array([50, 51, 52], np.uint16), np.array([0, 2, 3]),
        np.array([0, 1, 2]), np.ones(2, bool), np.ones(2, bool), np.zeros(3, int), np.zeros(0, int),
        np.zeros(2, int), np.zeros((2, 2), int), Cuts(),
    )  # fmt: skip
    ids, layout = pack(tokens, [1, 0], [[1, 0], []])
    assert ids.tolist() == [4, 52, 50, 51, 1, 2, 3]
    assert ids.dtype == torch.int64
    assert (layout.prompts, layout.branches) == ([1, 3], [[1, 2], []])
