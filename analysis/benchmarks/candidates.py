"""Sixteen actions at one state: the state encoded once for all of them, beside one pass for each.

    python analysis/benchmarks/candidates.py [json=true] [k=16] [state=600] [action=25] [turns=16] [page=200]
        [width=256] [layers=6] [repeats=3] [threads=1]

CPU-milliseconds for V(s) and Q(s, a) of k actions of `action` tokens at a state of `state` tokens, with a Llama of
`layers` layers of `width`; `train` runs backward through the backbone too.

    peer         one pass a candidate at its best: the faster of k packed sequences (attention for each by itself) and
                 a batch of `transformers` without padding (all are of one length) or mask
    ours         `pack` and `hidden_states`: what `score`, `fit` and the feature cache call
    one by one   the peer as most code has it: a call for each [s; a]; of scoring alone
    floor        the matrix products of ours alone, without attention

and, where a history grows by `page` tokens a turn and V and Q of every turn are trained (page=600 takes minutes),

    history peer   every prefix encoded by itself, as OfflineArcher does, whose states are whole histories (the whole
                   of its update is in `critic_update`); run once: it takes long
    history ours   one pass over the shared trunk (`data.context=turns`)

`ratio` is the lesser of the ratios of scoring and training.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _measure import arguments, medians, repeat, report, versions
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from offline_lm.batches.pack import Layout, pack
from offline_lm.batches.tokens import Tokens
from offline_lm.models.attention import NAME
from offline_lm.models.backbone import hidden_states

VOCABULARY, GOAL = 8192, 8.0
GOAL_TOKENS = 30


def tokens_of(prompts: list[np.ndarray], responses: list[list[np.ndarray]]) -> Tokens:
    """Tokens of these ids."""
    flat = [r for several in responses for r in several]
    n = len(prompts)
    ptr = [np.cumsum([0, *map(len, x)]) for x in (prompts, flat, responses)]
    return Tokens(
        np.concatenate(prompts).astype(np.uint16), ptr[0], np.concatenate(flat).astype(np.uint16), ptr[1], ptr[2],
        np.ones(n, bool), np.ones(n, bool), np.zeros(n + 1, np.int64), np.zeros(0, np.int64),
        np.zeros(n, np.int64), np.zeros((n, 2), np.int64), np.zeros((n, 4), np.int32),
    )  # fmt: skip


def growing(turns: int, page: int, action: int, rng: np.random.Generator) -> Tokens:
    """Prompts as `data.context=turns` renders them: all pages and actions so far, then the goal."""
    goal = rng.integers(1, VOCABULARY, GOAL_TOKENS)
    history, prompts, responses = [], [], []
    for _ in range(turns):
        history.append(rng.integers(1, VOCABULARY, page))
        prompts.append(np.concatenate([*history, goal]))
        responses.append([rng.integers(1, VOCABULARY, action)])
        history.append(rng.integers(1, VOCABULARY, action))
    return tokens_of(prompts, responses)


class Work:
    """The passes that are compared; each gives V and Q by two linear heads, and the loss is their square."""

    def __init__(self, width: int, layers: int, train: bool) -> None:
        torch.manual_seed(0)
        options = {
            "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
            "num_attention_heads": width // 64, "max_position_embeddings": 32_768,
        }  # fmt: skip
        self.packed = LlamaForCausalLM(LlamaConfig(**options, attn_implementation=NAME)).eval()  # pyright: ignore
        self.plain = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="sdpa")).eval()  # pyright: ignore
        self.plain.load_state_dict(self.packed.state_dict())
        self.heads = torch.nn.Linear(width, 2)
        self.train = train

    def timed(self, work: Callable[[], Tensor]) -> float:
        """CPU-milliseconds of a pass, its backward included where this trains; its values stay in `values`."""
        for module in (self.packed, self.plain, self.heads):
            module.zero_grad()
        start = time.process_time()
        with torch.set_grad_enabled(self.train):
            self.values = work()
            if self.train:
                self.values.square().mean().backward()
        return (time.process_time() - start) * 1e3

    def ours(self, tokens: Tokens) -> Tensor:
        states = range(len(tokens))
        ids, layout = pack(tokens, states, [range(*tokens.branch_ptr[n : n + 2].tolist()) for n in states])
        hidden = hidden_states(self.packed, ids, layout)
        at_v, at_q = layout.readouts()
        return torch.cat([self.heads(hidden[at_v])[:, 0], self.heads(hidden[at_q])[:, 1]])

    def packed_apart(self, state: Tensor, actions: Tensor) -> Tensor:
        rows = torch.cat([state.expand(len(actions), -1), actions], dim=1)
        layout = Layout.of([len(state)] * len(rows), [[actions.shape[1]]] * len(rows))
        hidden = hidden_states(self.packed, rows.flatten(), layout)
        at_v, at_q = layout.readouts()
        return torch.cat([self.heads(hidden[at_v[:1]])[:, 0], self.heads(hidden[at_q])[:, 1]])

    def batch(self, state: Tensor, actions: Tensor) -> Tensor:
        rows = torch.cat([state.expand(len(actions), -1), actions], dim=1)
        hidden = self.plain.model(input_ids=rows, use_cache=False).last_hidden_state
        return torch.cat([self.heads(hidden[:1, len(state) - 1])[:, 0], self.heads(hidden[:, -1])[:, 1]])

    def one_by_one(self, state: Tensor, actions: Tensor) -> Tensor:
        parts = [self.batch(state, action[None]) for action in actions]
        return torch.cat([parts[0][:1], *(part[1:] for part in parts)])

    def every_prefix(self, tokens: Tokens) -> float:
        """CPU-milliseconds; one sequence at a time, as memory asks."""
        total = 0.0
        for n in range(len(tokens)):
            state, action = (torch.from_numpy(x.astype(np.int64)) for x in (tokens.prompt(n), tokens.response(n)))
            total += self.timed(lambda s=state, a=action: self.batch(s, a[None]))
        return total

    def products(self, tokens: int) -> Tensor:
        """The matrix products of a pass over so many tokens."""
        x = torch.randn(tokens, self.heads.in_features)
        layer: Any
        for layer in self.packed.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            q, k, v = (f(x) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
            x = attention.o_proj(q + k + v)
            x = mlp.down_proj(mlp.gate_proj(x) + mlp.up_proj(x))
        return self.heads(x)[:, 0]


def main() -> None:
    given = arguments(
        sys.argv[1:],
        k="16",
        state="600",
        action="25",
        turns="16",
        page="200",
        width="256",
        layers="6",
        repeats="3",
        threads="1",
    )
    k, length, action, turns, repeats = (int(given[name]) for name in ("k", "state", "action", "turns", "repeats"))
    torch.set_num_threads(int(given["threads"]))
    rng = np.random.default_rng(0)
    state, actions = rng.integers(1, VOCABULARY, length), rng.integers(1, VOCABULARY, (k, action))
    tokens = tokens_of([state], [list(actions)])
    s, a = torch.from_numpy(state), torch.from_numpy(actions)
    rows, ratios = [], {}
    for name in ("score", "train"):
        work = Work(int(given["width"]), int(given["layers"]), name == "train")
        calls: dict[str, Callable[[], Tensor]] = {
            "ours": lambda work=work: work.ours(tokens),
            "packed apart": lambda work=work: work.packed_apart(s, a),
            "batch": lambda work=work: work.batch(s, a),
            "one by one": lambda work=work: work.one_by_one(s, a),
            "floor": lambda work=work: work.products(length + k * action),
        }
        if name == "train":
            del calls["one by one"]
        expected = None
        for call in calls:
            if call != "floor":
                with torch.no_grad():
                    got = calls[call]()
                expected = got if expected is None else expected
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # the same numbers
        ms = medians(repeat({n: lambda c=c, work=work: work.timed(c) for n, c in calls.items()}, repeats))
        ratios[name] = (min(ms["packed apart"], ms["batch"]) / ms["ours"], ms)
        for call, taken in ms.items():
            rows.append({"row": f"{name} {call}", "CPU-ms": taken, "ratio": taken / ms["ours"]})

    history = growing(turns, int(given["page"]), action, rng)
    work = Work(int(given["width"]), int(given["layers"]), train=True)
    ours = medians(repeat({"ours": lambda: work.timed(lambda: work.ours(history))}, 1))["ours"]
    rows.append({"row": "history ours", "CPU-ms": ours, "ratio": 1.0})
    taken = work.every_prefix(history)
    rows.append({"row": "history peer", "CPU-ms": taken, "ratio": taken / ours})

    ratio, ms = min(ratios.values(), key=lambda x: x[0])
    result = {
        "ours": ms["ours"], "peer": min(ms["packed apart"], ms["batch"]), "ratio": ratio,
        "goal": GOAL, "unit": f"CPU-ms for {k} actions of {action} tokens at a state of {length}",
        "versions": versions("torch", "transformers", threads=int(given["threads"]), width=int(given["width"])),
    }  # fmt: skip
    report(result, rows, given, __file__)


if __name__ == "__main__":
    main()
