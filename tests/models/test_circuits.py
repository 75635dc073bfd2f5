"""First weights: what each head looks at, measured with the attention that `transformers` itself computes."""

import math

import pytest
import torch

from offline_lm.batches import render
from offline_lm.models import backbone

START = 0
SHARP = 0.5
"""Of a head's attention, in the mean over tokens; chance would be under 0.02."""
WIDTH = 32
TURNING = [a for i in range(0, WIDTH, 2) if (a := 1e6 ** (-i / WIDTH)) >= 0.02]
"""Width of a head, and the angles by which rotary positions turn its pairs, as far as one notices within a line."""


def made(heads=5, width=160, layers=2, seed=0, texts=("a red mug",) * 4):
    model, tokenizer = backbone.tiny(texts, vocab_size=600, width=width, layers=layers, heads=heads, seed=seed)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def reader():
    """Heads of the shipped size: in the first layer `same`, `region`, `before`, `recent`, `second before`."""
    torch.set_num_threads(1)
    model, tokenizer = made()
    model.set_attn_implementation("eager")
    return model, tokenizer


@torch.no_grad()
def looks(reader, ids, layer):
    """[H, L, L]: how much of each head's attention from a token goes to another."""
    return reader[0](ids[None], output_attentions=True).attentions[layer][0]


def marks(tokenizer):
    return [tokenizer(word, add_special_tokens=False).input_ids for word in render.MARKS]


def some(reader, n, seed=0):
    """n different tokens, neither the first of all nor marks."""
    _, tokenizer = reader
    special = {START, *(i for ids in marks(tokenizer) for i in ids)}
    ids = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:n]]


def row(*parts):
    return torch.cat([torch.atleast_1d(torch.as_tensor(part)) for part in (START, *parts)])


@pytest.fixture(scope="module")
def repeated(reader):
    """A hundred tokens, and some of them once more: the row, the places of these, and where they stood before."""
    words = some(reader, 100)
    again = torch.arange(40) + 101
    return row(words, words[20:60]), again, again - 80


def test_same_looks_at_the_other_occurrence_and_where_there_is_none_at_the_first_token(reader, repeated):
    ids, again, before = repeated
    same = looks(reader, ids, 0)[0]
    new = torch.arange(10, 101)
    other, sink = same[again, before], same[again, START]
    assert other.mean() > 0.35
    assert (other + sink).mean() > 0.9
    assert same[new, START].mean() > SHARP
    assert same[again, START].mean() < same[new, START].mean() - 0.1
    assert same[again, again].mean() < 0.03  # though nothing is more like a token than itself
    assert same[again, before + 1].max() < 0.05


def by_cosines(size, angles, distance, n):
    """What biases alone make of the distances 0..n-1: the softmax of size^2 sum_i cos(a_i (t - distance)) / sqrt(d)."""
    scores = [size**2 * sum(math.cos(a * (t - distance)) for a in angles) / WIDTH**0.5 for t in range(n)]
    return torch.tensor(scores).softmax(0)


@pytest.mark.parametrize(("head", "distance"), [(2, 1), (4, 2)])
def test_before_looks_back_as_far_as_the_sum_of_cosines_says(reader, head, distance):
    by_hand = by_cosines(5, TURNING, distance, 100)
    assert by_hand.argmax() == distance
    assert by_hand.max() > 0.8
    back = looks(reader, row(some(reader, 100)), 0)[head]
    at = torch.arange(30, 101)
    for t in range(5):
        assert back[at, at - t].mean().item() == pytest.approx(by_hand[t].item(), abs=0.02), t
    assert back[at, at - distance].min() > 0.7


def test_recent_looks_at_the_last_ten_tokens(reader):
    recent = looks(reader, row(some(reader, 130)), 0)[3]
    by_hand = by_cosines(2, TURNING[2:], 0, 96)
    at = torch.arange(60, 131)
    seen = torch.stack([recent[at, at - t].mean() for t in range(20)])
    torch.testing.assert_close(seen[1:], by_hand[1:20], rtol=0, atol=0.01)
    assert seen[:10].sum() > 0.4  # chance: a tenth


def test_region_looks_at_the_word_that_opened_the_part(reader):
    opened = {word: ids[0] for word, ids in zip(render.MARKS, marks(reader[1]), strict=True)}
    words = some(reader, 110)
    sizes = {"Did": 20, "Page": 60, "Goal": 20, "Action": 10}
    parts = words.split(list(sizes.values()))
    ids = row(*(torch.cat([torch.tensor([opened[w]]), part]) for w, part in zip(sizes, parts, strict=True)))
    region = looks(reader, ids, 0)[1]
    at = 1
    for size in sizes.values():
        within = region[at + 1 : at + 1 + size]
        assert within[:, at].mean() > 0.75
        assert (within.argmax(1) == at).all()
        at += 1 + size
    assert at == len(ids)


def test_follows_looks_behind_the_earlier_occurrence(reader, repeated):
    """The induction head: its keys are what the first layer's `before` has brought along."""
    ids, again, before = repeated
    follows = looks(reader, ids, 1)[0]
    behind, sink = follows[again, before + 1], follows[again, START]
    assert behind.mean() > 0.2
    assert follows[again, before].mean() < 0.02  # not at the occurrence itself, as `same` does
    assert (behind + sink).mean() > 0.4
    new = torch.arange(10, 101)
    assert follows[new, START].mean() > 0.2


@pytest.mark.parametrize("head", [1, 4])
def test_same_pair_tells_an_occurrence_by_the_token_before_it(reader, head):
    """ab ... cb ... ab: the last b looks at the first one, though `same` looks rather at the nearer."""
    words = some(reader, 80)
    first, strange = words[:60], words[60:]
    b = torch.arange(10, 50, 2)
    other = torch.stack([strange, first[b]], 1).flatten()
    again = torch.stack([first[b - 1], first[b]], 1).flatten()
    ids = row(first, other, again)
    right, wrong, at = 1 + b, 62 + torch.arange(0, 40, 2), 102 + torch.arange(0, 40, 2)
    assert torch.equal(ids[at], ids[right])
    assert torch.equal(ids[at], ids[wrong])
    assert torch.equal(ids[at - 1], ids[right - 1])
    pair, same = looks(reader, ids, 1)[head], looks(reader, ids, 0)[0]
    assert pair[at, right].mean() > SHARP
    assert pair[at, wrong].mean() < 0.25
    assert same[at, right].mean() < same[at, wrong].mean()


def test_words_that_open_parts_are_one_token_and_prompts_begin_with_the_first_token(reader):
    _, tokenizer = reader
    assert [len(ids) for ids in marks(tokenizer)] == [1] * len(render.MARKS)
    assert tokenizer.convert_tokens_to_ids(tokenizer.bos_token) == START
    assert render.frame(tokenizer).before == tokenizer.bos_token


@torch.no_grad()
def test_logits_begin_at_size_1(reader):
    logits = reader[0](row(some(reader, 100))[None]).logits
    assert logits[0, 1:].std().item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(("heads", "size"), [(1, 64), (2, 8), (2, 40), (4, 16), (4, 32), (5, 8)])
def test_any_number_and_size_of_heads_is_finite_and_can_be_packed(heads, size):
    model, tokenizer = made(heads=heads, width=heads * size, layers=4)
    assert all(p.isfinite().all() for p in model.parameters())
    backbone.check_packing(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert model(row(some((model, tokenizer), 100))[None]).logits.isfinite().all()


def test_the_seed_decides_every_weight_and_leaves_the_callers_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, same, other = (made(width=40, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(weight, same[name]) for name, weight in one.items())
    moved = [name for name, weight in one.items() if not torch.equal(weight, other[name])]
    assert {name.split(".")[-2] for name in moved} >= {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"}
