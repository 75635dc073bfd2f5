"""ILQL's readouts: against the model's own pass on each sequence alone, and numpy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import norm
from torch.testing import assert_close

from offline_lm.batches.tokens import tokenize
from offline_lm.models import acting, backbone, token_heads
from offline_lm.models.acting import Chosen
from offline_lm.models.token_heads import TokenHeads

torch.set_num_threads(1)
STEPS = [
    {"episode_id": "a", "goal": "Buy a red mug", "observation": "shop page one", "action": "click[red mug]",
     "candidates": [{"action": "click[blue mug]", "response": None, "executed": None}]},
    {"episode_id": "a", "goal": "Buy a red mug", "observation": "shop page two " * 30, "action": "click[buy]",
     "candidates": [{"action": "back", "response": None, "executed": None}]},
    {"episode_id": "a", "goal": "Buy a red mug", "observation": "thanks", "action": None, "candidates": []},
    {"episode_id": "b", "goal": "Buy a red mug", "observation": "shop page one", "action": "click[blue mug]",
     "candidates": [{"action": "stop", "response": None, "executed": None}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def small():
    texts = [step["observation"] + step["goal"] + (step["action"] or "back stop") for step in STEPS] * 20
    model, tokenizer = backbone.tiny(texts, vocab_size=300, width=32, layers=2, heads=2)
    keys = ("start_url", "url", "messages", "observation_error", "response", "tokenizer_id")
    rows = [{**dict.fromkeys(keys), "prompt_token_ids": None, "response_token_ids": None, **step} for step in STEPS]
    torch.manual_seed(0)
    heads = TokenHeads(*token_heads.sizes(model), ensemble=2, hidden=8, start=-3.0, unit=2.0)
    return model.eval(), heads, tokenize(rows, tokenizer, max_tokens=512, history=4)


def alone(model, tokens, state, branch):
    """Last hidden states and scores of one sequence, and the length of its prompt."""
    prompt = tokens.prompt(state)
    response = tokens.response(branch) if branch is not None else prompt[:0]
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    layout = acting.Layout.of([len(ids)], [[]])
    with torch.no_grad():
        hidden = backbone.hidden_states(model, ids, layout)
        scores = model(input_ids=ids[None], position_ids=torch.arange(len(ids))[None], layout=layout).logits[0]
    return hidden, scores, len(prompt)


@torch.no_grad()
def test_a_token_is_read_at_the_position_before_it(small):
    model, _, tokens = small
    chosen = Chosen(np.arange(4), [[0, 1], [2], [], [4]])  # the third is a final observation: a state alone
    with_logits, without = (token_heads.read(model, tokens, chosen, logits=x) for x in (True, False))
    states, hidden, logits = [], [], []
    for state, own in zip(range(4), chosen.responses, strict=True):
        h, _, end = alone(model, tokens, state, None)
        states.append(h[end - 1])
        for branch in own:
            h, scores, end = alone(model, tokens, state, branch)
            hidden.append(h[end - 1 : -1])
            logits.append(scores[end - 1 : -1])
    for found in (with_logits, without):
        assert_close(found.states, torch.stack(states), atol=1e-4, rtol=0)
        assert_close(found.tokens, torch.cat(hidden), atol=1e-4, rtol=0)
        assert found.taken.tolist() == [int(t) for a in (0, 1, 2, 4) for t in tokens.response(a)]
    assert with_logits.logits is not None
    assert_close(with_logits.logits, torch.cat(logits), atol=1e-4, rtol=0)
    assert without.logits is None


@torch.no_grad()
def test_q_of_a_token_is_that_of_all_and_values_start_at_the_mean_return(small):
    _, heads, _ = small
    hidden, taken = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5, 5, 1, 299, 7])
    every = heads.q(hidden)
    assert every.shape == (2, 6, token_heads.sizes(small[0])[1])
    assert_close(heads.q_of(hidden, taken), every[:, torch.arange(6), taken])
    assert not torch.equal(every[0], every[1])
    for x in (heads.values(hidden), every):
        assert (x - -3.0).abs().max() < 0.5
    # by hand: start + unit * (gelu(norm(h) A + a) B + b)
    x = hidden.double().numpy()
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    w, c, u, e = (p.double().numpy() for i in (heads.inner[0], heads.outer[0]) for p in (i.weight, i.bias))
    z = x @ w.T + c
    z = z * norm.cdf(z)  # GELU
    np.testing.assert_allclose(heads.values(hidden).numpy(), -3.0 + 2.0 * (z @ u.T + e)[:, 0], atol=1e-5)


@torch.no_grad()
def test_the_policy_is_behaviour_times_the_exponential_of_q(small):
    model, heads, tokens = small
    branches = np.array([1, 2, 5])
    chosen = Chosen.of(tokens, branches)
    wanted = []
    for branch in branches.tolist():
        state = int(np.searchsorted(tokens.branch_ptr, branch, side="right")) - 1
        hidden, scores, end = alone(model, tokens, state, branch)
        q = heads.q(hidden[end - 1 : -1]).double().numpy().min(axis=0)
        # beta counts standard deviations of the returns, of which the unit is one
        perturbed = log_softmax(scores[end - 1 : -1].double().numpy() + 5.0 * (q - 17.0) / 2.0, axis=1)
        wanted += [perturbed[i, t] for i, t in enumerate(tokens.response(branch))]
    found = token_heads.response_logprobs(model, heads, tokens, chosen, beta=5.0)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)
    imitates = token_heads.response_logprobs(model, heads, tokens, chosen, beta=0.0)
    assert_close(imitates, acting.response_logprobs(model, tokens, chosen)[0])
    assert (found - imitates).abs().max() > 1e-3


def test_estimates_are_v_at_the_prompts_end_and_q_of_the_last_token(small):
    model, heads, tokens = small
    v, q = token_heads.estimates(model, heads, tokens, budget=64)
    with torch.no_grad():
        for state in range(4):
            hidden, _, end = alone(model, tokens, state, None)
            assert v[state] == pytest.approx(heads.values(hidden[end - 1 : end]).item(), abs=1e-5)
            for branch in range(int(tokens.branch_ptr[state]), int(tokens.branch_ptr[state + 1])):
                hidden, _, _ = alone(model, tokens, state, branch)
                last = torch.tensor([int(tokens.response(branch)[-1])])
                assert q[:, branch] == pytest.approx(heads.q_of(hidden[-2:-1], last)[:, 0].numpy(), abs=1e-5)
    # the same page and goal: read once, with a response of either
    assert v[0] == v[3]
    assert (q[:, 1] == q[:, 4]).all()
    assert len(set(q[0])) == len(q[0]) - 1


def test_what_is_saved_is_read_back(small, tmp_path):
    model, heads, tokens = small
    token_heads.save(heads, tmp_path)
    again = token_heads.load(tmp_path, model)
    for got, want in zip(*(token_heads.estimates(model, h, tokens, budget=999) for h in (again, heads)), strict=True):
        np.testing.assert_array_equal(got, want)
