import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from offline_lm.batches.pack import Layout
from offline_lm.errors import UserError
from offline_lm.models import backbone

TEXTS = ["a red mug and a blue mug"] * 4


@pytest.fixture
def tiny():
    return backbone.tiny(TEXTS, vocab_size=300, width=16, layers=2, heads=2, seed=3)


def test_saved_and_loaded_it_says_the_same(tiny, tmp_path):
    model, tokenizer = tiny
    backbone.save(model, tokenizer, tmp_path)
    again, tokens = backbone.load(str(tmp_path), "float32")
    assert tokens("a red mug")["input_ids"] == tokenizer("a red mug")["input_ids"]
    ids = torch.tensor(tokenizer("a red mug and")["input_ids"] * 2)
    layout = Layout.of([len(ids) // 2] * 2, [[], []])
    model.eval()
    torch.testing.assert_close(backbone.hidden_states(again, ids, layout), backbone.hidden_states(model, ids, layout))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # what others read
    one = plain.base_model(input_ids=ids[None, : len(ids) // 2]).last_hidden_state[0]
    torch.testing.assert_close(backbone.hidden_states(again, ids, layout)[len(ids) // 2 :], one, rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_weights_and_leaves_the_callers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    weights = [
        backbone.tiny(TEXTS, vocab_size=300, width=16, layers=1, heads=2, seed=s)[0].lm_head.weight for s in (3, 3, 4)
    ]
    assert torch.rand(1) == expected
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "llama"}'])
def test_what_is_no_model_is_the_users_mistake(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path=.*: no causal language model could be loaded"):
        backbone.load(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tiny, tmp_path):
    model, tokenizer = tiny
    backbone.save(model, tokenizer, tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        backbone.load(str(tmp_path))
