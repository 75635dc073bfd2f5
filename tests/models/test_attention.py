"""Packed rows: every sequence gets what it would get alone, in the forward pass and in the gradients."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from offline_lm.batches.pack import Layout
from offline_lm.errors import UserError
from offline_lm.models.attention import NAME
from offline_lm.models.backbone import check_packing, hidden_states

SIZE: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
HEADS: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
PACKED: dict[str, Any] = {"attn_implementation": NAME}
LAYOUT = Layout([5, 3, 7, 1, 4], [[], [4], [2, 6, 1], [3, 3], [1]])


def llama(attention=NAME, **options):
    return LlamaForCausalLM(LlamaConfig(**{**SIZE, **HEADS, **options, "attn_implementation": attention}))


MODELS = {
    "llama": llama,
    "grouped queries": lambda: llama(num_key_value_heads=2),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZE | HEADS | {"num_key_value_heads": 1, "head_dim": 8}, **PACKED)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, initializer_range=0.3,
                   **PACKED)
    ),
}  # fmt: skip


def made(make):
    torch.manual_seed(0)
    return make().eval()


def row(layout=LAYOUT):
    return torch.randint(50, (sum(layout.lengths),), generator=torch.Generator().manual_seed(1))


def alone(model, tokens, layout):
    """The same hidden states from plain `transformers` calls, one sequence [prompt; response] at a time."""
    out, at = [], 0
    for p, branches in zip(layout.prompts, layout.branches, strict=True):
        prompt = tokens[at : at + p]
        at += p
        out.append(one(model, prompt))
        for n in branches:
            out.append(one(model, torch.cat([prompt, tokens[at : at + n]]))[p:])
            at += n
    return torch.cat(out)


def one(model, ids):
    return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def assert_no_leak(packed, model, plain, tokens, layout, tolerance=1e-5):
    """Hidden states, and the gradient of a number that depends on all of them."""
    got, expected = packed(model, tokens, layout), alone(plain, tokens, layout)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)) / len(got)
    names, gradients = [], []
    for m, hidden in ((model, got), (plain, expected)):
        m.zero_grad()
        (hidden * weight).sum().backward()
        named = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        names.append(list(named))
        gradients.append(torch.cat([g.flatten() for g in named.values()]))
    assert names[0] == names[1]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=tolerance * gradients[1].abs().max().item())


def reference(model):
    """The same weights with the eager attention of `transformers`."""
    plain = type(model)(type(model.config)(**model.config.to_dict()))
    plain.set_attn_implementation("eager")
    plain.load_state_dict(model.state_dict())
    return plain.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_its_sequences_alone(name):
    model = made(MODELS[name])
    check_packing(model)
    assert_no_leak(hidden_states, model, reference(model), row(), LAYOUT)


def transformers_packing(model, tokens, layout, use_cache):
    out = model.base_model(input_ids=tokens[None], position_ids=layout.positions()[None], use_cache=use_cache)
    return out.last_hidden_state[0]


def test_packing_by_position_ids_leaks_with_a_cache_and_the_assertion_sees_it():
    layout = Layout([5, 3, 7], [[], [], []])
    model = made(lambda: llama("sdpa"))
    assert_no_leak(lambda *a: transformers_packing(*a, use_cache=False), model, reference(model), row(layout), layout)
    with pytest.raises(AssertionError, match="not close"):
        assert_no_leak(
            lambda *a: transformers_packing(*a, use_cache=True), model, reference(model), row(layout), layout
        )


def test_branches_do_not_see_each_other_and_do_see_their_prompt():
    model, tokens = made(llama), row()
    start = 5 + 7 + 7  # the first branch of the third sequence: two tokens
    changed = tokens.clone()
    changed[start] = (tokens[start] + 1) % 50
    moved = (hidden_states(model, tokens, LAYOUT) != hidden_states(model, changed, LAYOUT)).any(dim=1)
    assert moved.nonzero()[:, 0].tolist() == [start, start + 1]
    changed = tokens.clone()
    changed[start - 1] = (tokens[start - 1] + 1) % 50  # the last token of its prompt
    moved = (hidden_states(model, tokens, LAYOUT) != hidden_states(model, changed, LAYOUT)).any(dim=1)
    assert moved.nonzero()[:, 0].tolist() == list(range(start - 1, start + 9))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_does_not_read_the_layout_is_refused(attention):
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be packed: .* differ by"):
        check_packing(made(lambda: llama(attention)))


def test_a_recurrent_model_is_refused():
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="MambaForCausalLM cannot be packed"):
        check_packing(made(lambda: MambaForCausalLM(config)))


def test_a_model_that_does_not_hand_the_layout_down_is_refused(monkeypatch):
    model = made(llama)
    plain = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda layout=None, **kwargs: plain(**kwargs))
    with pytest.raises(UserError, match="did not pass on `layout`"):
        check_packing(model)


def test_attention_that_is_no_plain_softmax_is_refused():
    """Gemma 2 caps its logits: without the cap packed and single agree with each other, and are both wrong."""
    options = SIZE | HEADS
    model = made(lambda: Gemma2ForCausalLM(Gemma2Config(**options, head_dim=8, **PACKED)))
    with pytest.raises(UserError, match="Gemma2Attention caps its logits"):
        check_packing(model)


def test_a_sequence_longer_than_the_window_raises():
    options = SIZE | HEADS
    model = made(lambda: MistralForCausalLM(MistralConfig(**options, sliding_window=8, **PACKED)))
    fits, longer = Layout([5, 8], [[3], []]), Layout([5, 8], [[4], []])
    assert_no_leak(hidden_states, model, reference(model), row(fits), fits)
    with pytest.raises(
        ValueError, match=r"a sequence of 9 tokens exceeds the model's window of 8: set data\.max_tokens"
    ):
        hidden_states(model, row(longer), longer)
