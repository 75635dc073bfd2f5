"""Policies that act: a language model among candidates and freely, and a critic that chooses."""

import numpy as np
import pytest
import torch

from offline_lm.batches.pack import Layout
from offline_lm.errors import UserError
from offline_lm.models import backbone
from offline_lm.models.critic import Critic
from offline_lm.models.heads import Heads
from offline_lm.models.token_heads import TokenHeads
from offline_lm.policy import Policy, Reranker

STATE = {"goal": "Buy a red mug", "observation": "Welcome to the shop. red mug, blue mug, lamp"}
CONFIG = {"max_tokens": 256, "history": 4, "context": "actions", "dtype": "float32"}


@pytest.fixture(scope="module")
def policy():
    texts = ["Buy a red mug lamp blue click[red mug] back Welcome to the shop"] * 20
    model, tokenizer = backbone.tiny(texts, vocab_size=300, width=32, layers=2, heads=2)
    return Policy(model, tokenizer, CONFIG)


def test_the_choice_among_candidates_goes_by_their_probabilities(policy):
    actions = ["click[red mug]", "back", "click[lamp]"]
    (logprobs,) = policy.logprobs([{**STATE, "candidates": actions}])
    p = np.exp(logprobs - np.logaddexp.reduce(logprobs))
    choices = [policy.act(STATE, actions, temperature=1.0, seed=seed) for seed in range(30)]
    np.testing.assert_allclose(np.exp(choices[0].logprobs), p, rtol=1e-5)
    assert all(c.logprob == c.logprobs[c.actions.index(c.action)] for c in choices)
    even = [policy.act(STATE, actions, temperature=1e6, seed=seed).action for seed in range(30)]
    assert set(even) == set(actions)
    best = policy.act(STATE, actions, temperature=0)
    assert (best.action, best.logprob) == (actions[int(np.argmax(logprobs))], 0.0)


def test_samples_have_the_log_probabilities_of_the_model_at_their_temperature(policy):
    drawn = policy.sample_ids(STATE, 3, max_tokens=8, seed=3, temperature=0.5)
    assert drawn == policy.sample_ids(STATE, 3, max_tokens=8, seed=3, temperature=0.5)
    assert drawn != policy.sample_ids(STATE, 3, max_tokens=8, seed=4, temperature=0.5)
    prompt = policy._tokens([STATE]).prompt(0).tolist()
    for ids, logprob in drawn:
        row = torch.tensor(prompt + ids)
        layout = Layout.of([len(row)], [[]])
        with torch.no_grad():
            logits = policy.model(input_ids=row[None], position_ids=torch.arange(len(row))[None], layout=layout).logits
        scores = (logits[0, len(prompt) - 1 : -1].double() / 0.5).log_softmax(-1)
        assert logprob == pytest.approx(scores[range(len(ids)), ids].sum().item(), abs=1e-3)
    end = policy.tokenizer.eos_token_id
    assert all(end not in ids[:-1] for ids, _ in drawn)
    assert [text for text, _ in policy.sample(STATE, 3, max_tokens=8, seed=3, temperature=0.5)] == [
        policy.tokenizer.decode([i for i in ids if i != end]) for ids, _ in drawn
    ]


def test_ilql_writes_by_the_probabilities_that_it_chooses_by(policy):
    """Samples are drawn from the perturbed tokens, as candidates are scored, not from the model underneath."""
    torch.manual_seed(0)
    heads = TokenHeads(32, policy.model.config.vocab_size, hidden=8)
    with torch.no_grad():
        for layer in heads.outer:
            layer.weight.mul_(30)  # pyright: ignore
    ilql = Policy(policy.model, policy.tokenizer, {**CONFIG, "ilql": {"beta": 4.0}}, heads)
    compared = 0
    for ids, logprob in ilql.sample_ids(STATE, 60, max_tokens=6, seed=1):
        text = ilql.text(ids)
        if ilql._tokens([{**STATE, "candidates": [text]}]).response(0).tolist() == ids:  # spelt as it is read
            state = [{**STATE, "candidates": [text]}]
            assert logprob == pytest.approx(ilql.logprobs(state)[0][0], abs=1e-3)
            assert abs(logprob - policy.logprobs(state)[0][0]) > 0.1
            compared += 1
    assert compared


def test_a_free_action_is_the_likeliest_of_its_samples(policy):
    choice = policy.act(STATE, n=3, seed=1)
    assert choice.logprob == max(choice.logprobs)
    assert len(choice.actions) == 3


def test_the_policy_still_packs_after_it_has_sampled(policy):
    before = policy.logprobs([{**STATE, "candidates": ["back", "click[lamp]"]}])[0]
    policy.sample(STATE, 2, max_tokens=3)
    np.testing.assert_array_equal(policy.logprobs([{**STATE, "candidates": ["back", "click[lamp]"]}])[0], before)


def test_a_critic_chooses_what_it_values_most(policy):
    torch.manual_seed(0)
    critic = Critic(policy.model, policy.tokenizer, Heads(32), {**CONFIG, "has_q": True})
    actions = ["click[red mug]", "back", "click[lamp]"]
    (score,) = critic.score([{**STATE, "candidates": actions}])
    choice = Reranker(critic).act(STATE, actions)
    assert choice.values == pytest.approx(score.q)
    assert choice.action == actions[int(np.argmax(score.q or []))]
    drawn = [Reranker(critic).act(STATE, actions, temperature=10.0, seed=seed).action for seed in range(30)]
    assert set(drawn) == set(actions)
    best_of = Reranker(critic, policy).act(STATE, n=6, seed=2)
    proposed = {text for text, _ in policy.sample(STATE, 6, seed=2)}
    assert set(best_of.actions) == proposed
    assert best_of.values is not None
    assert best_of.action == best_of.actions[int(np.argmax(best_of.values))]


def test_a_candidate_that_is_named_twice_is_no_likelier(policy):
    once = policy.act(STATE, ["click[red mug]", "back", "click[lamp]"])
    said = ["click[red mug]", "back", {"action": "back"}, "click[lamp]", "back"]
    twice = policy.act(STATE, said)
    assert twice.actions == once.actions
    np.testing.assert_allclose(twice.logprobs, once.logprobs, atol=1e-4)
    reasons = [{"action": "back", "response": "click[lamp]"}, "back"]  # one command, said in two ways: both count
    assert policy.act(STATE, reasons).actions == ["back", "back"]
    torch.manual_seed(0)
    critic = Critic(policy.model, policy.tokenizer, Heads(32), {**CONFIG, "has_q": True})
    assert Reranker(critic).act(STATE, said, temperature=10.0).actions == once.actions


def test_what_cannot_be_chosen_is_said(policy):
    critic = Critic(policy.model, policy.tokenizer, Heads(32), {**CONFIG, "has_q": True})
    with pytest.raises(UserError, match="no policy to propose"):
        Reranker(critic).act(STATE)
    with pytest.raises(UserError, match="without Q"):
        Reranker(Critic(policy.model, policy.tokenizer, Heads(32), {**CONFIG, "has_q": False}))
    with pytest.raises(UserError, match="needs `candidates`"):
        policy.logprobs([STATE])
    with pytest.raises(UserError, match="max_tokens=256"):
        policy.logprobs([{**STATE, "goal": "mug " * 400, "candidates": ["back"]}])
