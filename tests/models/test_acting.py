"""Log-probabilities of responses out of packed rows, against the model's own forward pass on each alone."""

import numpy as np
import pytest
import torch

from offline_lm.batches.tokens import tokenize
from offline_lm.models import acting, backbone
from offline_lm.models.acting import Chosen

STEPS = [
    {"episode_id": "a", "goal": "Buy a red mug", "observation": "shop page one", "action": "click[red mug]",
     "candidates": [{"action": "click[blue mug]", "response": None, "executed": None}]},
    {"episode_id": "a", "goal": "Buy a red mug", "observation": "shop page two " * 30, "action": "click[buy]",
     "candidates": [{"action": "back", "response": None, "executed": None},
                    {"action": "click[buy now]", "response": None, "executed": None}]},
    {"episode_id": "b", "goal": "Find a lamp", "observation": "lamps", "action": "stop", "candidates": []},
]  # fmt: skip


@pytest.fixture(scope="module")
def small():
    texts = [step["observation"] + step["goal"] + step["action"] for step in STEPS] * 20
    model, tokenizer = backbone.tiny(texts, vocab_size=300, width=32, layers=2, heads=2)
    keys = ("start_url", "url", "messages", "observation_error", "response", "tokenizer_id")
    rows = [{**dict.fromkeys(keys), "prompt_token_ids": None, "response_token_ids": None, **step} for step in STEPS]
    return model.eval(), tokenizer, tokenize(rows, tokenizer, max_tokens=512, history=4)


def alone(model, tokens, branch):
    """From the model's own scores of one sequence, a token at a time."""
    state = int(np.searchsorted(tokens.branch_ptr, branch, side="right")) - 1
    prompt, response = tokens.prompt(state), tokens.response(branch)
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    layout = acting.Layout.of([len(ids)], [[]])
    with torch.no_grad():
        logits = model(input_ids=ids[None], position_ids=torch.arange(len(ids))[None], layout=layout).logits[0]
    scores = logits.double().log_softmax(-1)
    return [scores[len(prompt) + i - 1, token].item() for i, token in enumerate(response)]


def test_every_token_of_every_response_has_the_probability_it_has_alone(small):
    model, _, tokens = small
    branches = np.arange(len(tokens.response_ptr) - 1)
    found, entropy = acting.response_logprobs(model, tokens, Chosen.of(tokens, branches), entropy=True)
    wanted = [x for branch in branches for x in alone(model, tokens, int(branch))]
    assert len(wanted) == tokens.response_ptr[-1] > len(branches)
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-4, rtol=0)
    assert (entropy > 0).all()
    assert (entropy < np.log(model.config.vocab_size) + 1e-5).all()


def test_the_end_of_turn_token_is_one_of_a_response(small):
    model, tokenizer, tokens = small
    ends = [tokens.response(a)[-1] for a in range(len(tokens.response_ptr) - 1)]
    assert set(ends) == {tokenizer.eos_token_id}
    (only,) = acting.lengths(tokens, np.array([5]))
    found, _ = acting.response_logprobs(model, tokens, Chosen.of(tokens, np.array([5])))
    assert len(found) == only == len(tokens.response(5))


def test_a_part_of_the_responses_gives_their_part_and_parts_give_all(small):
    model, _, tokens = small
    branches = np.array([0, 2, 4, 5])
    whole, _ = acting.response_logprobs(model, tokens, Chosen.of(tokens, np.arange(6)))
    at = acting.spans(tokens, branches, np.arange(6))
    in_parts = acting.all_logprobs(model, tokens, branches, budget=40)
    np.testing.assert_allclose(in_parts, whole.detach().numpy()[at], atol=1e-5)
    assert len(list(Chosen.of(tokens, branches).rows(tokens, 40))) > 1


def test_no_response_has_no_tokens(small):
    model, _, tokens = small
    assert acting.all_logprobs(model, tokens, np.zeros(0, np.int64), budget=64).shape == (0,)
    assert acting.spans(tokens, np.zeros(0, np.int64), np.arange(6)).shape == (0,)
