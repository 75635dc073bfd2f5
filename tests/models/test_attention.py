"""Packed rows: every sequence gets what it would get alone, in the forward pass and in the gradients."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
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

from offline_lm.batches.pack import Layout, pack
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.models import attention
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
PROMPTS, BRANCHES = [5, 3, 7, 1, 4], [[], [4], [2, 6, 1], [3, 3], [1]]
LAYOUT = Layout.of(PROMPTS, BRANCHES)


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


def tokens_of(prompts, responses) -> Tokens:
    """Of these ids, and the responses to each prompt."""
    n, flat = len(prompts), [r for several in responses for r in several]

    def ragged(parts):
        return np.array([x for part in parts for x in part], np.uint16), np.cumsum([0, *map(len, parts)])

    return Tokens(
        *ragged(prompts), *ragged(flat), np.cumsum([0, *map(len, responses)]), np.ones(n, bool), np.ones(n, bool),
        np.zeros(n + 1, int), np.zeros(0, int), np.zeros(n, int), np.zeros((n, 2), int), np.zeros((n, 4), int),
    )  # fmt: skip


def made(make):
    torch.manual_seed(0)
    return make().eval()


def row(layout=LAYOUT):
    return torch.randint(50, (sum(layout.lengths),), generator=torch.Generator().manual_seed(1))


def alone(model, tokens, prompts, branches):
    """The same hidden states from plain `transformers` calls, one sequence [prompt; response] at a time."""
    out, at = [], 0
    for p, responses in zip(prompts, branches, strict=True):
        prompt = tokens[at : at + p]
        at += p
        out.append(one(model, prompt))
        for n in responses:
            out.append(one(model, torch.cat([prompt, tokens[at : at + n]]))[p:])
            at += n
    return torch.cat(out)


def of_tree(model, tokens, states):
    """The readouts of a row of states with all their responses, from the same calls: prompts, then branches."""
    v, q = [], []
    for n in states:
        prompt = torch.from_numpy(tokens.prompt(n).astype(np.int64))
        v.append(one(model, prompt)[-1])
        for a in range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1]):
            q.append(one(model, torch.cat([prompt, torch.from_numpy(tokens.response(a).astype(np.int64))]))[-1])
    return torch.stack(v + q)


def one(model, ids):
    return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def assert_no_leak(packed, model, plain, tokens, prompts=PROMPTS, branches=BRANCHES, tolerance=1e-5):
    """Hidden states, and the gradient of a number that depends on all of them."""
    layout = Layout.of(prompts, branches)
    got, expected = packed(model, tokens, layout), alone(plain, tokens, prompts, branches)
    assert_equal(model, got, plain, expected, tolerance)


def assert_equal(model, got, plain, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype) / len(got)
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
    return plain.eval().to(model.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_its_sequences_alone(name):
    model = made(MODELS[name])
    check_packing(model)
    assert_no_leak(hidden_states, model, reference(model), row())


@st.composite
def episodes(draw):
    """States of two episodes in turn: prompts go on from one another (whole, or up to their goals), or diverge."""
    ids = st.integers(1, 48)
    prompts, responses = [], []
    for _ in range(2):
        history = draw(st.lists(ids, min_size=1, max_size=4))
        for _ in range(draw(st.integers(1, 4))):
            goal = draw(st.lists(ids, max_size=3))
            prompts.append(history + goal)
            responses.append(draw(st.lists(st.lists(ids, min_size=1, max_size=3), max_size=3)))
            if draw(st.booleans()) and responses[-1]:
                history = history + goal + responses[-1][0]
            history = history + draw(st.lists(ids, min_size=1, max_size=4))
            history = history[: draw(st.integers(len(history) // 2, len(history))) or 1]
    return prompts, responses


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
@settings(max_examples=12, deadline=None)
@given(drawn=episodes())
def test_shared_prefixes_change_no_hidden_state_and_no_gradient(kernel, heads, drawn):
    tokens = tokens_of(*drawn)
    states = range(len(tokens))
    model = made(lambda: llama(num_key_value_heads=heads)).double()
    plain = reference(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offline_lm.batches.pack._LEAST", 1)
        patch.setattr("offline_lm.batches.pack._GROUP", 6)
        patch.setattr("offline_lm.batches.tokens.COMPARED", 1)
        if kernel:
            patch.setattr(attention, "has_kernel", lambda query: True)
            patch.setattr(attention, "varlen_attn", reference_varlen)
        ids, layout = pack(tokens, states, [range(*tokens.branch_ptr[n : n + 2]) for n in states])
        got = hidden_states(model, ids, layout)[torch.cat(layout.readouts())]
    assert_equal(model, got, plain, of_tree(plain, tokens, states))  # norms and softmax of eager Llama are float32


def reference_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What the variable-length kernel is documented to compute, from [T, H, D]; it has none on the CPU."""
    assert window_size == (-1, 0)  # causal
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (cu_q[0], cu_q[-1], max_q, max_k) == (0, len(q), cu_q.diff().max(), cu_k.diff().max())
    out = []
    for start, stop in pairwise(cu_q.tolist()):
        one = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        out.append(scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(out, dim=1).transpose(0, 1)


def test_the_variable_length_kernel_is_called_once_a_layer_and_for_cuda_in_half_precision_alone(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args[3].tolist())
        return reference_varlen(*args, **options)

    monkeypatch.setattr(attention, "varlen_attn", counted)
    model = made(llama)
    hidden_states(model, row(), LAYOUT)
    assert not calls
    assert not attention.has_kernel(torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16))
    monkeypatch.setattr(attention, "has_kernel", lambda query: True)
    assert_no_leak(hidden_states, model, reference(model), row())
    assert calls == [[0, 5, 12, 19, 20, 25]] * 2  # trunks: a single response belongs to its prompt's


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [4, 2])
def test_on_a_gpu_in_half_precision_it_is_what_float32_on_the_cpu_computes(heads):
    rng = np.random.default_rng(0)
    history = rng.integers(1, 48, 100).tolist()
    prompts = [[*history, 1, 2], history + rng.integers(1, 48, 80).tolist(), [3] * 40]
    tokens = tokens_of(prompts, [[[5, 6], [7]], [[8] * 9], []])
    ids, layout = pack(tokens, range(3), [range(2), range(2, 3), range(3, 3)])
    assert layout.trunks.tolist() == [189, 40]
    model: Any = made(lambda: llama(num_key_value_heads=heads, head_dim=16))
    expected = hidden_states(model, ids, layout)
    expected.square().sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.model.parameters() if p.grad is not None])
    model.zero_grad()
    model = model.to("cuda", torch.bfloat16)
    got = hidden_states(model, ids.cuda(), layout)
    got.float().square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.model.parameters()]).float().cpu()
    torch.testing.assert_close(got.float().cpu(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=0.05 * wanted.abs().max().item())


def transformers_packing(model, tokens, layout, use_cache):
    out = model.base_model(input_ids=tokens[None], position_ids=layout.positions()[None], use_cache=use_cache)
    return out.last_hidden_state[0]


def test_packing_by_position_ids_leaks_with_a_cache_and_the_assertion_sees_it():
    plain = [5, 3, 7], [[], [], []]
    model, ids = made(lambda: llama("sdpa")), row(Layout.of(*plain))
    assert_no_leak(lambda *a: transformers_packing(*a, use_cache=False), model, reference(model), ids, *plain)
    with pytest.raises(AssertionError, match="not close"):
        assert_no_leak(lambda *a: transformers_packing(*a, use_cache=True), model, reference(model), ids, *plain)


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
    fits, longer = ([5, 8, 4], [[3], [], [4, 4]]), Layout.of([5, 8], [[4], []])
    assert_no_leak(hidden_states, model, reference(model), row(Layout.of(*fits)), *fits)
    with pytest.raises(
        ValueError, match=r"a sequence of 9 tokens exceeds the model's window of 8: set data\.max_tokens"
    ):
        hidden_states(model, row(longer), longer)
