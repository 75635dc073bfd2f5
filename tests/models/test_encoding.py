"""Training through the backbone: packed gradients are those of one sequence at a time, in every way of training it."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.activations import NewGELUActivation

from offline_lm.algos.iql_lm import IQL
from offline_lm.batches.pack import Layout
from offline_lm.errors import UserError
from offline_lm.models import attention, backbone, lora
from offline_lm.models.encoding import EncodedBatches, training
from offline_lm.models.heads import Heads, target_of

CPU = torch.device("cpu")
IQL_LM = IQL(gamma=0.9, tau=0.8, polyak=0.1)


def rows_of(replay, *episodes):
    return np.concatenate([np.arange(replay.offsets[e], replay.offsets[e + 1]) for e in episodes])


def trained(shop, how):
    """A copy of the backbone as `model.train=how` prepares it, away from where adapters do nothing."""
    model = copy.deepcopy(shop.model)
    if how == "lora":
        lora.adapt(model, rank=2, alpha=4)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def losses(heads, batch):
    target = target_of(heads)
    assert isinstance(target, Heads)
    return torch.stack(list(IQL_LM.loss(heads, target, batch).values())).sum()


def gradients(model, heads, loss):
    parameters = [p for m in (model, heads) for p in m.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("target", ["ema", "heads"])
@pytest.mark.parametrize("how", ["full", "lora"])
def test_packed_gradients_are_those_of_one_sequence_at_a_time(shop, how, target):
    model = trained(shop, how)
    slow = lora.target_of(model) if target == "ema" else None
    torch.manual_seed(0)
    heads = Heads(16, hidden=8)
    rows = rows_of(shop.replay, 3, 0, 7)
    packed = EncodedBatches(model, slow, shop.replay, shop.tokens, CPU)(rows)

    # each sequence by itself, through transformers' own attention
    alone = copy.deepcopy(model)
    alone.set_attn_implementation("eager")
    ones = {p: q for p, q in zip(model.parameters(), alone.parameters(), strict=True) if p.requires_grad}
    states, actions = [], []
    for n in rows:
        said = [shop.tokens.response(shop.tokens.branch_ptr[n])] if shop.tokens.acted[n] else []
        ids = torch.from_numpy(np.concatenate([shop.tokens.prompt(n), *said]).astype(np.int64))
        hidden = alone.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        states.append(hidden[len(shop.tokens.prompt(n)) - 1])
        actions.append(hidden[-1] if said else torch.zeros(16))
    states, actions = torch.stack(states), torch.stack(actions)
    single = replace(
        packed, states=states, actions=actions, target_states=states.detach(), target_actions=actions.detach()
    )
    for f in fields(packed):
        torch.testing.assert_close(getattr(packed, f.name), getattr(single, f.name), rtol=0, atol=1e-5, msg=f.name)
    ours = gradients(model, heads, losses(heads, packed))
    theirs = gradients(alone, heads, losses(heads, single))
    assert len(ours) == len(theirs) == len(ones) + len(list(heads.parameters()))
    assert sum(g is not None and bool(g.abs().max() > 1e-4) for g in ours) > len(ones) / 2
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def test_with_target_heads_there_is_one_pass_and_nothing_flows_back_from_the_target(shop):
    model = copy.deepcopy(shop.model)
    passes = []
    model.base_model.register_forward_hook(lambda *_: passes.append(1))
    batch = EncodedBatches(model, None, shop.replay, shop.tokens, CPU)(rows_of(shop.replay, 0, 1))
    assert len(passes) == 1
    assert torch.equal(batch.target_states, batch.states)
    assert torch.equal(batch.target_actions, batch.actions)
    assert batch.states.requires_grad
    assert not batch.target_states.requires_grad
    assert not batch.target_actions.requires_grad


@pytest.mark.parametrize("own_target", [True, False])
def test_candidates_are_encoded_beside_the_logged_actions_and_train_the_backbone(shop, own_target):
    model = copy.deepcopy(shop.model)
    slow = copy.deepcopy(shop.model) if own_target else None
    rows = rows_of(shop.replay, 3, 0)
    plain = EncodedBatches(model, slow, shop.replay, shop.tokens, CPU)(rows)
    batch = EncodedBatches(model, slow, shop.replay, shop.tokens, CPU, candidates=True)(rows)
    assert plain.candidates.shape == (0, 16)
    for name in ("states", "actions", "target_states", "target_actions"):
        torch.testing.assert_close(getattr(batch, name), getattr(plain, name), rtol=0, atol=1e-5, msg=name)
    counts = np.diff(shop.tokens.branch_ptr)[rows]
    assert batch.candidate_of.tolist() == np.repeat(np.arange(len(rows)), counts).tolist()
    firsts = (np.cumsum(counts) - counts)[shop.tokens.acted[rows]]
    assert torch.equal(batch.candidates[firsts], batch.actions[batch.acted])  # the logged action is the first
    torch.testing.assert_close(batch.target_candidates, batch.candidates.detach(), rtol=0, atol=1e-6)
    assert not batch.target_candidates.requires_grad
    others = np.setdiff1d(np.arange(len(batch.candidates)), firsts)
    batch.candidates[others].sum().backward()
    assert sum(bool(p.grad is not None and p.grad.abs().max() > 0) for p in model.parameters()) > 5


def test_batches_packed_ahead_are_the_same_in_the_same_order(shop):
    make = EncodedBatches(shop.model, None, shop.replay, shop.tokens, CPU)
    drawn = [rows_of(shop.replay, e) for e in (4, 0, 4, 2)]
    loads = []
    load = make._load
    make._load = lambda rows: loads.append(len(rows)) or load(rows)
    seen = 0
    for rows in make.ahead(iter([*drawn, drawn[0]])):  # the last is loaded, and waits for one behind it
        assert rows is drawn[seen]
        got, expected = make(rows), EncodedBatches(shop.model, None, shop.replay, shop.tokens, CPU)(rows)
        for f in fields(got):
            torch.testing.assert_close(getattr(got, f.name), getattr(expected, f.name), msg=f.name)
        seen += 1
    assert seen == 4
    assert len(loads) == 5  # each once: none was packed again when it was asked for


def test_what_is_made_trainable_is_a_plain_model_of_its_dtype_again(shop):
    model = copy.deepcopy(shop.model).bfloat16()
    names = list(model.state_dict())
    options = {"adapters": {"rank": 2, "alpha": 2}, "gradient_checkpointing": True}
    for how, target in (("full", "heads"), ("lora", "ema")):
        with training(model, how=how, target=target, **options) as (slow, autocast):
            assert (slow is None) == (target == "heads")
            assert autocast == torch.bfloat16
            assert model.is_activation_checkpointing
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert list(model.state_dict()) == names
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not model.is_activation_checkpointing
    with training(shop.model, how="full", target="heads", **options) as (_, autocast):
        assert autocast is None
    with (
        pytest.raises(UserError, match="float16"),
        training(copy.deepcopy(shop.model).half(), how="full", target="ema", **options),
    ):
        pytest.fail("begun")


def test_gpt2s_gelu_in_one_kernel_is_the_same_function():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_layer=1, n_embd=8, n_head=2, n_positions=16)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    ids, layout = torch.arange(9), Layout.of([9], [[]])

    def read():
        out = backbone.hidden_states(model, ids, layout)
        return out, torch.autograd.grad(out.square().sum(), model.transformer.wte.weight)[0]

    before = read()
    assert isinstance(model.transformer.h[0].mlp.act, NewGELUActivation)
    backbone.fuse_gelu(model)
    assert isinstance(model.transformer.h[0].mlp.act, torch.nn.GELU)
    torch.testing.assert_close(read(), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["full", "lora"])
def test_checkpointing_changes_no_gradient(shop, how):
    model = trained(shop, how).train()
    torch.manual_seed(0)
    heads, rows, calls = Heads(16, hidden=8), rows_of(shop.replay, 0, 5), []
    make = EncodedBatches(model, None, shop.replay, shop.tokens, CPU)
    model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(model, heads, losses(heads, make(rows)))
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    again = gradients(model, heads, losses(heads, make(rows)))
    assert len(calls) == 3  # forward, and again for the backward pass
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_bfloat16_computes_in_it_and_keeps_small_updates_in_float32(shop, monkeypatch):
    model, rows, asked = copy.deepcopy(shop.model), rows_of(shop.replay, 0, 5), []
    monkeypatch.setattr(attention, "has_kernel", lambda query: bool(asked.append(query.dtype)))
    seen = []
    model.base_model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    exact = EncodedBatches(model, None, shop.replay, shop.tokens, CPU)(rows)
    half = EncodedBatches(model, None, shop.replay, shop.tokens, CPU, autocast=torch.bfloat16)(rows)
    assert seen == [torch.float32, torch.bfloat16]
    assert asked == [torch.float32] * 2 + [torch.bfloat16] * 2  # in each of two layers: fit for CUDA's kernel
    assert half.states.dtype == half.actions.dtype == torch.float32
    assert 0 < (half.states - exact.states).norm() / exact.states.norm() < 0.03
    half.states.square().mean().backward()
    weight = model.base_model.norm.weight
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    before = weight.detach().clone()
    torch.optim.AdamW([weight], lr=1e-4 * before.abs().max().item(), weight_decay=0.0).step()
    assert (weight != before).all()
    assert torch.equal(weight.bfloat16(), before.bfloat16())  # bfloat16 weights would have stayed where they were


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["full", "lora"])
def test_on_a_gpu_it_is_the_same_batch(shop, how):
    rows, device = rows_of(shop.replay, 0, 5), torch.device("cuda")
    model = trained(shop, how)
    here = EncodedBatches(model, None, shop.replay, shop.tokens, CPU)(rows)
    there = EncodedBatches(copy.deepcopy(model).to(device), None, shop.replay, shop.tokens, device)(rows)
    for f in fields(here):
        torch.testing.assert_close(getattr(there, f.name).cpu(), getattr(here, f.name), rtol=0, atol=1e-4, msg=f.name)
