"""Hidden states of states and actions, as features are computed, beside `transformers` on padded batches.

    python analysis/benchmarks/embed.py [json=true] [model=small|reader|distilgpt2] [steps=12] [repeats=2] [threads=2]
        [dtype=float32] [batches=2,4,12] [rows=...]

Tokens a second. Steps of about 600 tokens of state (400 to 800) and 25 of action, random ids; wanted are two vectors a
step, at the end of the state (V) and of the action (Q). `small`: a Llama of 6 layers of 256. `distilgpt2`: a GPT-2 of 6
layers of 768; random weights (the time does not depend on them). `reader`: the one that ships.
Tokens are counted once a step in every row.

    ours         `offline_lm.models.features.compute` into an empty cache: hashing, packing, encoding, writing to disk
    warm         the same again: everything is found in the cache
    peer         padded batches with an attention mask, steps sorted by length, the fastest size of `batches`; both
                 vectors from one pass over [state; action], as we do
    peer_apart   the same, but states and [state; action] as sequences of their own: what one writes who embeds texts
                 and takes the last token
    unsorted     as `peer` in the order of the log, at the largest of `batches`
    alone        one step at a time: no padding, no mask
    floor        the products of the linear layers alone, on all tokens at once

`ratio` is ours / peer.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import _measure
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from offline_lm.batches.tokens import Tokens
from offline_lm.models import features
from offline_lm.models.attention import NAME
from offline_lm.models.backbone import located
from offline_lm.models.lora import Linear, matrix

GOAL, ACTION = 4.0, 25
WORDS = 2048


def model_of(kind: str, attention: str, dtype: str) -> Any:
    if kind == "reader":
        options = {"attn_implementation": attention, "dtype": getattr(torch, dtype)}
        return AutoModelForCausalLM.from_pretrained(located("reader"), **options).eval()
    if kind == "small":
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=8192,
        )  # fmt: skip
    else:
        config = GPT2Config(n_layer=6, n_positions=8192)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype))
    return model.eval()


def tokens_of(steps: int) -> Tokens:
    """A state and an action a step; no two states begin alike."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(400, 801, steps)
    one, none = np.arange(steps + 1), np.zeros(steps + 1, np.int64)
    return Tokens(
        rng.integers(WORDS, size=lengths.sum()).astype(np.uint16), np.r_[0, np.cumsum(lengths)],
        rng.integers(WORDS, size=steps * ACTION).astype(np.uint16), one * ACTION, one, np.ones(steps, bool),
        np.ones(steps, bool), none, np.zeros(0, np.int64), none[:-1], np.zeros((steps, 2), np.int64),
        np.zeros((steps, 4), np.int32),
    )  # fmt: skip


def sequences(tokens: Tokens) -> list[tuple[Tensor, Tensor]]:
    """(ids of state and action, places to read at) of every step."""
    out = []
    for n in range(len(tokens)):
        prompt, action = tokens.prompt(n), tokens.response(n)
        ids = torch.from_numpy(np.concatenate([prompt, action]).astype(np.int64))
        out.append((ids, torch.tensor([len(prompt) - 1, len(ids) - 1])))
    return out


def apart(given: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Every vector from a sequence of its own."""
    return [(ids[: end + 1], end[None]) for ids, ends in given for end in ends]


@torch.no_grad()
def padded(body: Any, given: list[tuple[Tensor, Tensor]], batch: int, *, mask: bool = True) -> list[Tensor]:
    """Hidden states at the places to read at, [1 or 2, d] for every sequence."""
    out = []
    for i in range(0, len(given), batch):
        part = given[i : i + batch]
        ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in part], batch_first=True)
        lengths = torch.tensor([len(ids) for ids, _ in part])
        seen = (torch.arange(ids.shape[1]) < lengths[:, None]).long() if mask else None
        hidden = body(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        out += [hidden[n, at] for n, (_, at) in enumerate(part)]
    return out


def by_length(given: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return sorted(given, key=lambda sequence: len(sequence[0]))


@torch.no_grad()
def products(model: Any, n: int) -> None:
    for layer in model.base_model.modules():
        if isinstance(layer, Linear):
            weight = matrix(layer)
            torch.mm(torch.empty(n, weight.shape[1], dtype=weight.dtype), weight.T)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(argv: list[str]) -> None:
    given = _measure.arguments(
        argv, model="small", steps="12", repeats="2", threads="2", dtype="float32", batches="2,4,12",
        rows="ours,warm,peer,peer_apart,unsorted,alone,floor",
    )  # fmt: skip
    torch.set_num_threads(int(given["threads"]))
    tokens = tokens_of(int(given["steps"]))
    ours, theirs = (model_of(given["model"], name, given["dtype"]) for name in (NAME, "sdpa"))
    body, logged = theirs.base_model, sequences(tokens)
    sizes = [int(size) for size in given["batches"].split(",")]
    sorted_, own = by_length(logged), by_length(apart(logged))
    least = min(sizes, key=lambda size: min(seconds(lambda: padded(body, sorted_, size)) for _ in range(2)))

    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(10**6))

        def fresh() -> Any:
            return features.compute(ours, tokens, Path(folder, str(next(count))))

        got = fresh()
        found = torch.stack([torch.stack(list(pair)) for pair in padded(body, logged, 1, mask=False)]).float()
        tolerance = 1e-4 if given["dtype"] == "float32" else 0.1
        np.testing.assert_allclose(got.v[:], found[:, 0], atol=tolerance)
        np.testing.assert_allclose(got.q[:], found[:, 1], atol=tolerance)
        rows: dict[str, Callable[[], Any]] = {
            "ours": fresh,
            "warm": lambda: features.compute(ours, tokens, Path(folder, "0")),
            "peer": lambda: padded(body, sorted_, least),
            "peer_apart": lambda: padded(body, own, least),
            "unsorted": lambda: padded(body, logged, max(sizes)),
            "alone": lambda: padded(body, logged, 1, mask=False),
            "floor": lambda: products(ours, tokens.n_tokens),
        }
        wanted = given["rows"].split(",")
        timed = {name: (lambda work=rows[name]: seconds(work)) for name in wanted}
        took = _measure.medians(_measure.repeat(timed, int(given["repeats"])))
    speed = {name: tokens.n_tokens / s for name, s in took.items()}
    table = [
        {"row": name, "tokens_per_s": round(speed[name]), "to_ours": round(speed[name] / speed["ours"], 2)}
        for name in wanted
    ]
    result = {
        "ours": speed["ours"], "peer": speed["peer"], "ratio": speed["ours"] / speed["peer"],
        "goal": GOAL, "unit": "tokens/s", "floor": round(speed["floor"] / speed["ours"], 2), "floor_goal": 2.0,
        "best_batch": least,
        "versions": _measure.versions("torch", "transformers", **given),
    }  # fmt: skip
    _measure.report(result, table, given, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
