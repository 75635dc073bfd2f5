"""Samples are those of the model, at their temperature, whatever stands beside them."""

import numpy as np
import pytest
import torch

from offline_lm.batches.pack import Layout
from offline_lm.models import backbone, generation
from offline_lm.models.generation import generate

PROMPTS = [[1, 5, 9, 12, 7], [1, 8], [1, 3, 3, 3, 30, 31, 32, 33, 20]]
END = 1


@pytest.fixture(scope="module")
def model():
    return backbone.tiny(["click red mug back"] * 5, vocab_size=270, width=32, layers=2, heads=2)[0].eval()


def rngs(*seeds):
    return [np.random.default_rng(seed) for seed in seeds]


def teacher_forced(model, prompt, ids, temperature):
    """log softmax(logits / temperature) of each token, by one pass over prompt and response together."""
    row = torch.tensor([*prompt, *ids])
    with torch.no_grad():
        positions = torch.arange(len(row))[None]
        logits = model(input_ids=row[None], position_ids=positions, layout=Layout.of([len(row)], [[]])).logits
    scores = (logits[0, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    return scores[range(len(ids)), ids].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_log_probabilities_are_those_of_one_pass_over_the_whole(model, temperature):
    drawn = generate(model, PROMPTS, 3, rngs(0, 1, 2), end=END, temperature=temperature, max_tokens=6)
    assert [len(each) for each in drawn] == [3, 3, 3]
    for prompt, each in zip(PROMPTS, drawn, strict=True):
        assert len({tuple(sample.ids) for sample in each}) > 1
        for sample in each:
            expected = teacher_forced(model, prompt, sample.ids, temperature)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
            assert sample.logprob == pytest.approx(expected.sum(), abs=1e-3)


def test_what_is_drawn_does_not_depend_on_what_stands_beside_it(model, monkeypatch):
    together = generate(model, PROMPTS, 2, rngs(0, 1, 2), end=END, max_tokens=8)
    alone = [generate(model, [PROMPTS[i]], 2, rngs(i), end=END, max_tokens=8)[0] for i in (2, 1, 0)][::-1]
    monkeypatch.setattr(generation, "HELD", 2 * 17)  # the longest prompt by itself
    parts = generate(model, PROMPTS, 2, rngs(0, 1, 2), end=END, max_tokens=8)
    for other in (alone, parts):
        assert [[s.ids for s in each] for each in other] == [[s.ids for s in each] for each in together]
    assert [list(part) for part in generation._parts([13, 10, 17], 17)] == [[0], [1], [2]]
    assert [list(part) for part in generation._parts([13, 10, 17], 26)] == [[0, 1], [2]]


def test_tokens_come_as_often_as_the_model_says(model):
    """Of 4,000 first tokens, each about as many as its probability promises."""
    drawn = generate(model, [PROMPTS[0]], 4000, rngs(0), end=END, max_tokens=1)[0]
    counts = np.bincount([sample.ids[0] for sample in drawn], minlength=model.config.vocab_size) / 4000
    p = np.exp([teacher_forced(model, PROMPTS[0], [i], 1.0)[0] for i in np.argsort(-counts)[:20]])
    np.testing.assert_array_less(np.abs(counts[np.argsort(-counts)[:20]] - p), 5 * np.sqrt(p / 4000))


def test_a_response_ends_with_its_first_end_token(model):
    start = generate(model, [PROMPTS[0]], 1, rngs(0), end=END, max_tokens=6)[0][0].ids
    cut = generate(model, [PROMPTS[0]], 1, rngs(0), end=start[2], max_tokens=6)[0][0]
    assert cut.ids == start[: start.index(start[2]) + 1]
    assert len(cut.logprobs) == len(cut.ids)


def test_temperature_zero_takes_the_likeliest(model):
    sample, same = generate(model, [PROMPTS[1]], 2, rngs(0), end=END, temperature=0, max_tokens=4)[0]
    assert (sample.ids, sample.logprobs) == (same.ids, [0.0] * len(same.ids))
    for t, token in enumerate(sample.ids):
        others = [teacher_forced(model, PROMPTS[1], [*sample.ids[:t], i], 1.0)[-1] for i in range(0, 270, 7)]
        assert teacher_forced(model, PROMPTS[1], [*sample.ids[:t], token], 1.0)[-1] >= max(others)


def test_scores_may_be_others_than_the_logits(model):
    def only_seven(logits, hidden):
        assert hidden.shape == (len(logits), 32)
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([7]), 0.0)

    drawn = generate(model, PROMPTS, 2, rngs(0, 1, 2), end=END, max_tokens=3, scores=only_seven)
    assert all(sample.ids == [7, 7, 7] and sample.logprobs == [0.0] * 3 for each in drawn for sample in each)
