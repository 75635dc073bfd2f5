"""Low-rank adapters: they start as nothing, are all that is trained, have a target, and merge into plain weights."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from offline_lm.batches.pack import Layout
from offline_lm.errors import UserError
from offline_lm.models import lora
from offline_lm.models.attention import NAME
from offline_lm.models.backbone import hidden_states
from offline_lm.models.heads import polyak

IDS = torch.randint(300, (9,), generator=torch.Generator().manual_seed(0))
WHOLE = Layout.of([9], [[]])


@pytest.fixture(params=["llama", "gpt2"])
def model(request, shop):
    if request.param == "llama":
        return copy.deepcopy(shop.model)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_layer=2, n_embd=16, n_head=2, n_positions=64)
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()


def adapters(model):
    return {name: p for name, p in model.named_parameters() if name.endswith((".down", ".up"))}


def moved(model):
    """As after some training: U is not 0 any more."""
    with torch.no_grad():
        for name, p in adapters(model).items():
            if name.endswith(".up"):
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_adapters_start_as_nothing_and_are_all_that_is_trained(model):
    before = hidden_states(model, IDS, WHOLE)
    lora.adapt(model, rank=3, alpha=6)
    after = hidden_states(model, IDS, WHOLE)
    assert torch.equal(before, after)
    after.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters(model)) != set()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    per_layer = 7 if "llama" in model.config.model_type else 4
    assert len(trained) == 2 * 2 * per_layer


def test_an_adapted_layer_is_its_weights_and_the_product(model):
    lora.adapt(model, rank=3, alpha=6)
    (name, layer), *_ = [(n, m) for n, m in moved(model).named_modules() if isinstance(m, lora.Adapted)]
    x = torch.randn(5, layer.down.shape[1], generator=torch.Generator().manual_seed(1))
    weight = lora.matrix(layer.base) + 2.0 * layer.up @ layer.down
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base.bias, msg=name)


def test_merged_it_is_a_plain_model_with_the_same_values(model, tmp_path):
    names = set(model.state_dict())
    plain = hidden_states(model, IDS, WHOLE)
    lora.adapt(model, rank=3, alpha=6)
    adapted = hidden_states(moved(model), IDS, WHOLE)
    assert (adapted - plain).abs().max() > 1e-2
    lora.merge(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(hidden_states(model, IDS, WHOLE), adapted, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME, use_safetensors=True)
    torch.testing.assert_close(hidden_states(again, IDS, WHOLE), adapted, rtol=0, atol=1e-5)


def test_a_target_shares_what_is_frozen_and_follows_in_the_adapters_alone(model):
    lora.adapt(model, rank=3, alpha=6)
    target = lora.target_of(model)
    assert not any(p.requires_grad for p in target.parameters())
    own = dict(target.named_parameters())
    for name, p in model.named_parameters():
        assert (own[name] is p) == (name not in adapters(model)), name
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in adapters(model)}
    at_start = hidden_states(target, IDS, WHOLE)
    online = hidden_states(moved(model), IDS, WHOLE)
    torch.testing.assert_close(hidden_states(target, IDS, WHOLE), at_start)
    up = {name: p for name, p in adapters(model).items() if name.endswith(".up")}
    polyak(target, model, 0.25)
    for name, p in up.items():
        torch.testing.assert_close(own[name], 0.25 * p)
    polyak(target, model, 1.0)
    torch.testing.assert_close(hidden_states(target, IDS, WHOLE), online)
    for name, p in frozen.items():
        assert torch.equal(own[name], p), name


def test_a_full_target_shares_nothing(model):
    target = lora.target_of(model)
    assert not {p.data_ptr() for p in target.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_layers_are_chosen_by_name(shop):
    model = copy.deepcopy(shop.model)
    lora.adapt(model, rank=2, alpha=2, layers=["q_proj", "v_proj"])
    assert {name.split(".")[-2] for name in adapters(model)} == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"no linear layer is called c_attn; this model has down_proj, .*v_proj"):
        lora.adapt(copy.deepcopy(shop.model), rank=2, alpha=2, layers=["q_proj", "c_attn"])


def test_bfloat16_weights_have_float32_adapters(shop):
    model = copy.deepcopy(shop.model).bfloat16()
    lora.adapt(model, rank=2, alpha=2)
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states(model, IDS, WHOLE).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters(model).values())
    lora.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
