"""Packed rows: every token sees its own [s; a] and nothing else, whatever is shared."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm.batches import pack as packing
from offline_lm.batches.pack import Layout, pack, packed_lengths, rows, state_rows
from offline_lm.batches.tokens import Tokens, common_prefix

LAYOUT = Layout.of([3, 2, 1], [[2, 1], [], [2]])


def tokens_of(prompts, responses) -> Tokens:
    """Of these ids, and the responses to each prompt."""
    flat = [r for several in responses for r in several]
    n = len(prompts)

    def ragged(parts):
        return np.array([x for part in parts for x in part], np.uint16), np.cumsum([0, *map(len, parts)])

    return Tokens(
        *ragged(prompts), *ragged(flat), np.cumsum([0, *map(len, responses)]), np.ones(n, bool), np.ones(n, bool),
        np.zeros(n + 1, int), np.zeros(0, int), np.zeros(n, int), np.zeros((n, 2), int), np.zeros((n, 4), int),
    )  # fmt: skip


def branches_of(tokens, states):
    return [range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1]) for n in states]


def visible(layout):
    """bool [L, L]: what attention lets every token of the row see."""
    length = sum(layout.lengths)
    seen, at = np.zeros((length, length), bool), 0
    for trunk, groups in zip(layout.trunks, layout.groups, strict=True):
        seen[at : at + trunk, at : at + trunk] = np.tri(trunk, dtype=bool)
        start, at = at, at + trunk
        for group in groups:
            mask = group.mask.numpy()
            seen[at : at + group.size, start : start + group.seen] = mask[:, : group.seen]
            seen[at : at + group.size, at : at + group.size] = mask[:, group.seen :]
            at += group.size
    assert at == length
    return seen


def assert_paths(ids, layout, prompts, responses):
    """Every readout's token sees exactly its [s] or [s; a], at the positions 0, 1, 2 ..."""
    seen, positions = visible(layout), layout.positions().numpy()
    at_v, at_q = layout.readouts()
    wanted = [*prompts, *(p + r for p, several in zip(prompts, responses, strict=True) for r in several)]
    for end, expected in zip([*at_v.tolist(), *at_q.tolist()], wanted, strict=True):
        path = np.flatnonzero(seen[end])
        path = path[np.argsort(positions[path])]
        assert ids[path].tolist() == expected
        assert positions[path].tolist() == list(range(len(expected)))
        assert path[-1] == end
        for before, after in pairwise(path):  # and every token on the way has seen the same way
            assert seen[after, before]
        assert [int(seen[i].sum()) for i in path] == list(range(1, len(path) + 1))
    assert layout.longest == positions.max() + 1


def test_positions_restart_with_prompts_and_branches():
    assert LAYOUT.positions().tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 2]
    assert LAYOUT.lengths == [6, 2, 3]


def test_readouts_are_the_last_tokens_of_prompts_and_branches():
    v, q = LAYOUT.readouts()
    assert v.tolist() == [2, 7, 8]
    assert q.tolist() == [4, 5, 10]


def test_readouts_without_a_branch_are_indices_all_the_same():
    v, q = Layout.of([4], [[]]).readouts()
    assert (v.tolist(), q.tolist(), q.dtype) == ([3], [], torch.int64)


def test_only_several_branches_need_a_mask():
    (several,), none, single = LAYOUT.groups
    assert none == single == []
    assert LAYOUT.trunks.tolist() == [3, 2, 3]
    assert several.mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]
    (bias,) = LAYOUT.biases(torch.device("cpu"), torch.float64)
    assert torch.equal(bias, torch.where(several.mask, 0.0, -torch.inf).double())
    assert LAYOUT.biases(torch.device("cpu"), torch.float64)[0] is bias
    assert LAYOUT.borders(torch.device("cpu")).tolist() == [0, 3, 5, 8]


def test_long_branches_attend_in_several_groups(monkeypatch):
    monkeypatch.setattr(packing, "_GROUP", 5)
    layout = Layout.of([4, 2], [[2, 3, 1, 9, 2], [3, 3]])
    assert [[g.size for g in groups] for groups in layout.groups] == [[5, 1, 9, 2], [3, 3]]
    ids = np.arange(sum(layout.lengths))
    prompts, responses, at = [], [], 0
    for p, several in ((4, [2, 3, 1, 9, 2]), (2, [3, 3])):
        prompts.append(list(range(at, at := at + p)))
        responses.append([list(range(at, at := at + n)) for n in several])
    assert_paths(ids, layout, prompts, responses)


@pytest.mark.parametrize(
    ("lengths", "shared", "expected"),
    [
        ([], None, []),
        ([9], None, [(0, 1)]),
        ([2, 2, 2], None, [(0, 2), (2, 3)]),
        ([9, 1, 1], None, [(0, 1), (1, 3)]),
        ([1, 9, 4], None, [(0, 1), (1, 2), (2, 3)]),
        ([3, 4, 5, 6], [0, 3, 4, 5], [(0, 2), (2, 3), (3, 4)]),  # the prefix counts again at the start of a row
        ([3, 3, 3, 4, 4], [3, 3, 3, 3, 0], [(0, 4), (4, 5)]),
    ],
)
def test_rows_hold_the_budget_or_one_longer_sequence(lengths, shared, expected):
    assert [(r.start, r.stop) for r in rows(lengths, 4, shared)] == expected


def test_pack_lays_each_prompt_before_its_responses():
    tokens = tokens_of([[1, 2, 3], [4]], [[[50, 51]], [[52]]])
    ids, layout = pack(tokens, [1, 0], [[1, 0], []])
    assert ids.tolist() == [4, 52, 50, 51, 1, 2, 3]
    assert ids.dtype == torch.int64
    assert_paths(ids, layout, [[4], [1, 2, 3]], [[[52], [50, 51]], []])


# -- shared prefixes -------------------------------------------------------------------------------------------


@st.composite
def tries(draw):
    """States whose prompts share prefixes with earlier prompts, or with a prompt and its response; in any order."""
    ids = st.integers(1, 3)  # few, so that prefixes are shared by chance as well
    prompts, responses = [], []
    for i in range(draw(st.integers(1, 7))):
        prefix = []
        if i:
            j = draw(st.integers(0, i - 1))
            prefix = prompts[j] + (draw(st.sampled_from(responses[j])) if responses[j] else [])
            prefix = prefix[: draw(st.integers(0, len(prefix)))]
        prompts.append(prefix + draw(st.lists(ids, min_size=0 if prefix else 1, max_size=6)))
        responses.append(draw(st.lists(st.lists(ids, min_size=1, max_size=4), max_size=3)))
    order = draw(st.lists(st.sampled_from(range(len(prompts))), min_size=1, max_size=9))
    return prompts, responses, order


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("group", [1, 6, 512])
@settings(max_examples=80, deadline=None)
@given(drawn=tries())
def test_any_trie_is_seen_path_by_path(least, group, drawn):
    prompts, responses, order = drawn
    tokens = tokens_of(prompts, responses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_LEAST", least)
        patch.setattr(packing, "_GROUP", group)
        patch.setattr("offline_lm.batches.tokens.COMPARED", least)
        ids, layout = pack(tokens, order, branches_of(tokens, order))
        assert_paths(ids, layout, [prompts[n] for n in order], [responses[n] for n in order])
        whole = sum(len(prompts[n]) + sum(map(len, responses[n])) for n in order)
        assert sum(layout.lengths) == len(ids) <= whole


def growing(turns, page=70, goal=5, action=3, seed=0):
    """Prompts that go on from one another up to their goals, as `data.context=turns` renders them."""
    rng = np.random.default_rng(seed)
    history, prompts = [9], []
    asked = rng.integers(100, 200, goal).tolist()
    for _ in range(turns):
        history = history + rng.integers(10, 90, page).tolist()
        prompts.append(history + asked)
        history = history + rng.integers(10, 90, action).tolist()
    return prompts


def test_a_growing_history_is_encoded_once():
    prompts = growing(6)
    responses = [[[201, t], [202, t, t]] for t in range(6)]
    tokens = tokens_of(prompts, responses)
    ids, layout = pack(tokens, range(6), branches_of(tokens, range(6)))
    assert layout.trunks.tolist() == [len(prompts[-1])]
    assert len(ids) == len(prompts[-1]) + 5 * 5 + 6 * 5
    assert_paths(ids, layout, prompts, responses)
    lengths, shared = packed_lengths(tokens, np.arange(6), np.full(6, 5))
    assert shared.tolist() == [0, *(common_prefix(np.array(a), np.array(b)) for a, b in pairwise(prompts))]
    assert (lengths - shared).sum() == len(ids)
    budget = int((lengths - shared)[:4].sum())
    cut = state_rows(tokens, range(6), branches_of(tokens, range(6)), budget)
    assert [len(r) for r in cut] == [4, 1, 1]  # a new row has its history whole


def test_a_chat_that_grows_lies_on_one_trunk():
    """Exact prompts: each is the one before, its response, and the next turn."""
    rng = np.random.default_rng(1)
    prompts, responses = [rng.integers(10, 90, 80).tolist()], []
    for t in range(5):
        responses.append([[201, t, 250]])
        prompts.append(prompts[-1] + responses[-1][0] + rng.integers(10, 90, 40).tolist())
    responses.append([[201, 9]])
    tokens = tokens_of(prompts, responses)
    ids, layout = pack(tokens, range(6), branches_of(tokens, range(6)))
    assert ids.tolist() == prompts[-1] + responses[-1][0]
    assert len(layout.owner) == 0
    assert_paths(ids, layout, prompts, responses)


def test_plain_and_shared_sequences_in_one_row():
    grown = growing(3)
    plain = [np.random.default_rng(s).integers(300, 400, 90).tolist() for s in range(3)]
    prompts = [plain[0], *grown, plain[1], plain[1], plain[2]]
    responses = [[[1, 2]], [[3]], [], [[4], [5, 6]], [[7], [8]], [[7]], []]
    tokens = tokens_of(prompts, responses)
    ids, layout = pack(tokens, range(7), branches_of(tokens, range(7)))
    assert_paths(ids, layout, prompts, responses)
    assert layout.trunks.tolist() == [92, len(grown[-1]), 90, 90]


def test_a_short_or_small_shared_prefix_is_not_worth_a_tree():
    rng = np.random.default_rng(0)
    start = rng.integers(10, 90, 200).tolist()
    few = [start[:63] + rng.integers(100, 200, 20).tolist() for _ in range(2)]
    part = [start[:150] + rng.integers(100, 200, 850).tolist() for _ in range(2)]
    for prompts, sequences in ((few, 2), (part, 2), ([p[:400] for p in part], 1)):
        tokens = tokens_of(prompts, [[[1]], [[2]]])
        ids, layout = pack(tokens, [0, 1], branches_of(tokens, [0, 1]))
        assert len(layout.trunks) == sequences
        assert_paths(ids, layout, prompts, [[[1]], [[2]]])
