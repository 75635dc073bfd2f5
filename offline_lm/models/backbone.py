"""The language model that reads: any causal model of `transformers`, or a tiny one built for the user's logs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from offline_lm.batches import render
from offline_lm.batches.pack import Layout
from offline_lm.errors import UserError
from offline_lm.models.attention import NAME
from offline_lm.models.circuits import start_heads
from offline_lm.paths import READER

START, END = "<|start|>", "<|end|>"


def load(path: str, dtype: str = "auto", key: str = "model.path") -> tuple[Any, Any]:
    """Model and tokenizer from a folder or hub name, or the shipped `reader`.

    Safetensors only, and never code from the model's repository.

    Args:
        key: the setting that named it, for messages.

    Raises:
        UserError: nothing loadable there, no fast tokenizer, or an architecture that cannot be packed.
    """
    source = located(path)
    with _loading(path, key):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, use_safetensors=True, attn_implementation=NAME
        )
    if tokenizer.eos_token is None:
        raise UserError(f"{key}={path}: its tokenizer has no end-of-sequence token to end an action with")
    fuse_gelu(model)
    check_packing(model)
    return model, tokenizer


def check(path: str, key: str) -> None:
    """Raises the UserError that `load` would, where no model is there at all; weights are not read."""
    with _loading(path, key):
        AutoConfig.from_pretrained(located(path), trust_remote_code=False)
        AutoTokenizer.from_pretrained(located(path), trust_remote_code=False)


@contextmanager
def _loading(path: str, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"{key}={path}: no causal language model could be loaded ({reason}); give a folder with config.json,"
            " tokenizer.json and *.safetensors, or a hub name"
        ) from e


def located(path: str) -> str:
    """The folder or hub name that `model.path` means."""
    return str(READER) if path == "reader" else path


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
    """A small Llama and its tokenizer, from these texts; weights random but for `circuits.start_heads`."""
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
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        attn_implementation=NAME,  # pyright: ignore
    )
    marks = {tokenizer(word, add_special_tokens=False).input_ids[0] for word in render.MARKS}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        start_heads(model, tokenizer.get_vocab()[START], sorted(marks))
    return model, tokenizer


def fits_heads(width: int, heads: int) -> bool:
    """Whether `tiny` can be built so: rotary pairs want an even head, and `circuits.start_heads` two pairs in each."""
    return width % (2 * heads) == 0 and width >= 4 * heads


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a word has the same tokens wherever it stands.

    Usual BPE glues the space to the word behind it, so that "red" at the start of a line, in `click[red mug]` and
    in running text are unrelated ids, and a model must learn that they match. Here words, digits and runs of
    punctuation with the space behind them are apart; every text still decodes exactly. The words that open the parts
    of a prompt are one token each.
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
        vocab_size=vocab_size, special_tokens=[START, END], initial_alphabet=alphabet, min_frequency=2,
        show_progress=False,
    )  # fmt: skip
    often = " ".join(render.MARKS * 10_000)
    tokenizer.train_from_iterator(chain([often], texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, clean_up_tokenization_spaces=False
    )


def hidden_states(model: Any, tokens: Tensor, layout: Layout) -> Tensor:
    """Last hidden states [L, d] of a packed row of token ids [L]."""
    return _encoded(model, tokens, layout).last_hidden_state[0]


def halfway_and_last(model: Any, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Hidden states [L, d] behind half of the layers, and behind all."""
    out = _encoded(model, tokens, layout, output_hidden_states=True)
    return out.hidden_states[len(out.hidden_states) // 2][0], out.last_hidden_state[0]


def _encoded(model: Any, tokens: Tensor, layout: Layout, **options: Any) -> Any:
    positions = layout.positions().to(tokens.device)[None]
    return model.base_model(input_ids=tokens[None], position_ids=positions, use_cache=False, layout=layout, **options)


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
