"""The language model that reads: any causal model of `transformers`, or a tiny one built for the user's logs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.activations import NewGELUActivation

from offline_lm.batches.pack import Layout
from offline_lm.errors import UserError
from offline_lm.models.attention import NAME

END = "<|end|>"


def load(path: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model and tokenizer from a folder or hub name: safetensors only, never code from the model's repository.

    Raises:
        UserError: nothing loadable there, no fast tokenizer, or an architecture that cannot be packed.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True, attn_implementation=NAME
        )
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"model.path={path}: no causal language model could be loaded ({reason}); give a folder with config.json,"
            " tokenizer.json and *.safetensors, or a hub name"
        ) from e
    if tokenizer.eos_token is None:
        raise UserError(f"model.path={path}: its tokenizer has no end-of-sequence token to end an action with")
    fuse_gelu(model)
    check_packing(model)
    return model, tokenizer


def fuse_gelu(model: nn.Module) -> None:
    """Compute GPT-2's GELU in one kernel, in place: `transformers` writes it out, a sixth of a training pass."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def tiny(
    texts: Iterable[str],
    *,
    vocab_size: int = 2048,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    seed: int = 0,
) -> tuple[Any, PreTrainedTokenizerFast]:
    """A small Llama and its tokenizer, from the user's own texts; weights random but for `start_heads`."""
    tokenizer = train_tokenizer(texts, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        attention_bias=True,  # what `start_heads` sets
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        attn_implementation=NAME,  # pyright: ignore
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        _scale_embeddings(model)
        start_heads(model)
    return model, tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a word has the same tokens wherever it stands.

    Usual BPE glues the space to the word behind it, so that "red" at the start of a line, in `click[red mug]` and
    in running text are unrelated ids, and a model must learn that they match. Here words, digits and runs of
    punctuation with the space behind them are apart; every text still decodes exactly.
    """
    tokenizer = Tokenizer(token_models.BPE())
    pieces = Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+ ?|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


@torch.no_grad()
def start_heads(model: LlamaForCausalLM) -> None:
    """Give every layer's heads a purpose to start from: half "the same token elsewhere", half "what was just said".

    To judge an action a critic compares words of goal, page and action, and at the action's end it must still know
    the action. Random weights take millions of tokens to find either out; weights that begin there are trained on like
    any other.

    - Same token: W_q = W_k with orthonormal rows, so that attention begins near the identity (mimetic initialisation,
      Trockman & Kolter 2023).
    - Just said: equal biases of query and key on some rotary pairs make the score sum_i cos(theta_i * distance),
      which is greatest at distance 0 and fades over 3 tokens (fast pairs) or 12 (slower ones).
    """
    layer: Any
    for layer in model.model.layers:
        attention = layer.self_attn
        d, n = attention.head_dim, attention.q_proj.out_features // attention.head_dim
        for bias in (attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias, attention.o_proj.bias):
            bias.zero_()
        for head in range(n):
            at = slice(head * d, (head + 1) * d)
            if head < n // 2:
                rows = nn.init.orthogonal_(torch.empty(d, attention.q_proj.in_features))
                attention.q_proj.weight[at] = rows
                attention.k_proj.weight[at] = rows
            else:
                first = 0 if head % 2 else d // 16
                pairs = slice(head * d + first, head * d + first + 3)
                attention.q_proj.bias[pairs] = 3.0
                attention.k_proj.bias[pairs] = 3.0


@torch.no_grad()
def _scale_embeddings(model: LlamaForCausalLM) -> None:
    """Embeddings of size 1, so that the first layers still tell tokens apart; logits stay of size 1 all the same."""
    nn.init.normal_(model.model.embed_tokens.weight)
    model.model.norm.weight.fill_(model.config.hidden_size**-0.5)


def hidden_states(model: Any, tokens: Tensor, layout: Layout) -> Tensor:
    """Last hidden states [L, d] of a packed row of token ids [L]."""
    out = model.base_model(
        input_ids=tokens[None], position_ids=layout.positions().to(tokens.device)[None], use_cache=False, layout=layout
    )
    return out.last_hidden_state[0]


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Refuse an architecture whose packed sequences see each other (recurrent layers, unread layouts).

    Raises:
        UserError: packed sequences have other hidden states than each alone, or its attention cannot be packed.
    """
    g = torch.Generator().manual_seed(0)
    # a prompt with two responses, and another prompt behind them
    a, b, c, d = (torch.randint(model.config.vocab_size, (n,), generator=g).to(model.device) for n in (7, 3, 2, 5))
    try:
        packed = hidden_states(model, torch.cat([a, b, c, d]), Layout.of([7, 5], [[3, 2], []]))
        ab, ac, d = (
            hidden_states(model, x, Layout.of([len(x)], [[]])) for x in (torch.cat([a, b]), torch.cat([a, c]), d)
        )
    except ValueError as e:
        raise UserError(f"{type(model).__name__} cannot be packed: {e}") from e
    alone = torch.cat([ab, ac[7:], d])
    error = ((packed - alone).abs().max() / alone.abs().max()).item()
    if not error < (1e-4 if model.dtype == torch.float32 else 1e-2):
        raise UserError(f"{type(model).__name__} cannot be packed: packed and single sequences differ by {error:.2g}")


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model (safetensors) and tokenizer so that `load(folder)` and plain `transformers` read them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
