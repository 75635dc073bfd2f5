"""One update of a critic through its language model, beside the updates of OfflineArcher, ArCHer and ILQL.

    python analysis/benchmarks/critic_update.py [json=true] [model=small|distilgpt2] [turns=16] [repeats=1] [threads=2]
        [rows=main|all|ours,offline_archer,...] [device=auto] [growing_layers=1]

A trajectory of 16 turns, about 600 tokens of state (lognormal, cut at our default of 1,024) and 25 of action each,
random ids. An update is forward, backward, gradient clipping, fused AdamW and the move of the target; every row trains
all the weights (but `ours_lora`) of the same transformer in float32 (but `ours_bf16`). Seconds are of the processor's
time on the CPU, of the clock on a GPU; the memory is the process's peak during the row, everything included. `rows=all`
runs the rows that the default leaves out for time: offline_archer_512, archer, floor_attention and the last one.

    ours                 `model.train=full model.target=heads`: one packed causal pass for V and Q, `iql_lm`
    ours_ema             `model.target=ema`: a second pass through the target backbone
    ours_lora            `model.train=lora model.target=ema`: adapters of rank 16, the target's on the same weights
    ours_bf16            `ours` with `model.dtype=bfloat16` (autocast); where the machine has it, or by name
    padded               our loss on a padded batch with an attention mask
    offline_archer       OfflineArcher's IQL update, not truncated: the same information as `ours`; it pads its batch
    offline_archer_best  the same at its best settings here: a turn at a time, gradients accumulated, so no padding
    offline_archer_512   the same as it stands, truncated to 512 tokens: less information
    archer, archer_512   ArCHer's update, not truncated and as it stands
    ilql                 trlx's ILQL update, token level, padded, masked, with the logits of every token
    floor                matrix products of the linear layers of `ours` alone, forward and backward
    floor_attention      these, and attention's own products by torch's kernel, one sequence after another

    growing, growing_offline_archer, growing_offline_archer_best
        every state holds all turns before it, 4,200 tokens in the end, as a chat agent's does; transformers of
        `growing_layers` layers. OfflineArcher encodes every prefix; ours the trajectory once. Of the padded peer only
        the two longest of the 16 turns are run and counted eight times: padded, all turns cost what the longest costs.

How the peers work, with repository and file: `_critic_peers`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _critic_peers as peers
import _measure
import numpy as np
import torch
from _critic_peers import GAMMA, LR, POLYAK, TAU, Trajectory
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from offline_lm.algos.iql_lm import IQL
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.models import devices, lora
from offline_lm.models.attention import NAME
from offline_lm.models.backbone import fuse_gelu
from offline_lm.models.encoding import EncodedBatches
from offline_lm.models.heads import Heads, polyak, target_of

GOALS = {"fp32": 5.0, "bf16": 7.0, "growing": 100.0, "floor": 1.4}
PAGE, SPREAD, CUT, ACTION = 600, 0.45, 1024, 25
GROWN = 4200
MAIN = [
    *("ours", "ours_ema", "ours_lora", "ours_bf16", "padded", "offline_archer", "offline_archer_best"),
    *("archer_512", "ilql", "floor", "growing", "growing_offline_archer"),
]

Update = Callable[[], None]


def model_of(kind: str, attention: str, layers: int | None, device: torch.device) -> Any:
    """A transformer with random weights and no dropout: small is 6 layers of 256; distilgpt2 is GPT-2 cut to 6."""
    if kind == "small":
        config = LlamaConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers or 6,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192,
        )  # fmt: skip
    else:
        config = GPT2Config(n_layer=layers or 6, n_positions=8192, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if attention == NAME:
        fuse_gelu(model)  # as `backbone.load` does
    return model.to(device).train()


@dataclass(frozen=True)
class Work:
    """One trajectory, as our replay has it and as the peers take it."""

    tokens: Tokens
    replay: Replay
    trajectory: Trajectory


def work_of(turns: int, growing: bool, device: torch.device) -> Work:
    rng = np.random.default_rng(0)
    pages = np.minimum(rng.lognormal(np.log(PAGE) - SPREAD**2 / 2, SPREAD, turns), CUT).astype(int)
    actions = rng.integers(ACTION - 10, ACTION + 11, turns)
    if growing:  # what a turn adds to the conversation
        pages = np.maximum((pages * (GROWN - actions.sum()) / pages.sum()).astype(int), 1)
    said = [rng.integers(2048, size=n).astype(np.uint16) for n in actions]
    states, past = [], np.zeros(0, np.uint16)
    for t, n in enumerate(pages):
        page = rng.integers(2048, size=n).astype(np.uint16)
        states.append(np.concatenate([past, page]))
        past = np.concatenate([states[-1], said[t]]) if growing else past
    everything, last = np.ones(turns, bool), np.arange(turns) == turns - 1
    reward = last.astype(np.float64)
    one = np.arange(turns + 1)
    tokens = Tokens(
        np.concatenate(states), np.r_[0, np.cumsum([len(s) for s in states])],
        np.concatenate(said), np.r_[0, np.cumsum(actions)], one, everything, everything,
        np.zeros(turns + 1, np.int64), np.zeros(0, np.int64), np.zeros(turns, np.int64),
        np.zeros((turns, 2), np.int64), np.zeros((turns, 4), np.int32),
    )  # fmt: skip
    replay = Replay(
        episode_ids=["0"], offsets=np.array([0, turns]), step=np.arange(turns), tasks=["0"], acted=everything,
        reward=reward, terminated=last, returns=GAMMA ** np.arange(turns)[::-1], bootstraps=everything,
        success=np.ones(1), held_out=np.zeros(1, bool),
    )  # fmt: skip
    ids, replies = ([torch.from_numpy(x.astype(np.int64)).to(device) for x in part] for part in (states, said))
    earned, continues = (torch.from_numpy(x).float().to(device) for x in (reward, ~last))
    return Work(tokens, replay, Trajectory(ids, replies, earned, continues))


def ours(
    model: Any, work: Work, device: torch.device, target: str, adapted: bool = False, autocast: Any = None
) -> Update:
    """What `fit` does in an update with `model.train=full` or `lora`."""
    heads = Heads(model.config.hidden_size).to(device)
    if adapted:
        lora.adapt(model, rank=16, alpha=32)
    pairs: list[tuple[nn.Module, nn.Module]] = [(target_of(heads), heads)]
    target_model = lora.target_of(model) if target == "ema" else None
    if target_model is not None:
        pairs.append((target_model, model))
    make = EncodedBatches(model, target_model, work.replay, work.tokens, device, autocast)
    parameters = [p for m in (heads, model) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    algo = IQL(gamma=GAMMA, tau=TAU, polyak=POLYAK)
    rows = np.arange(len(work.replay))

    def update() -> None:
        losses = algo.loss(heads, pairs[0][0], make(rows))  # type: ignore[arg-type]
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for slow, online in pairs:
            polyak(slow, online, POLYAK)

    return update


def floor(model: Any, work: Work, device: torch.device, attention: bool) -> Update:
    """Every linear layer's three products (output, gradients of input and of weights) on the tokens of `ours`."""
    shapes = [tuple(lora.matrix(m).shape) for m in model.base_model.modules() if isinstance(m, lora.Linear)]
    lengths = [len(s) + len(a) for s, a in zip(work.trajectory.states, work.trajectory.actions, strict=True)]
    n, heads = sum(lengths), model.config.num_attention_heads
    layers, size = model.config.num_hidden_layers, model.config.hidden_size // model.config.num_attention_heads
    x = {width: torch.randn(n, width, device=device) for shape in shapes for width in shape}
    weights = {shape: torch.randn(shape, device=device) for shape in shapes}
    q, k, v = (torch.randn(1, heads, n, size, device=device, requires_grad=True) for _ in range(3))

    def update() -> None:
        for outputs, inputs in shapes:
            weight = weights[outputs, inputs]
            torch.mm(x[inputs], weight.T)
            torch.mm(x[outputs], weight)
            torch.mm(x[outputs].T, x[inputs])
        for _ in range(layers if attention else 0):
            split = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
            torch.cat([scaled_dot_product_attention(*t, is_causal=True) for t in split], 2).sum().backward()

    return update


def rows_of(kind: str, turns: int, growing_layers: int, device: torch.device) -> dict[str, tuple[Callable, float]]:
    """Each row: what builds its update, and how often that update must be counted."""
    single, grown = work_of(turns, False, device), work_of(turns, True, device)
    few = 4 if kind == "distilgpt2" else turns  # the logits of 50,257 words do not fit for more

    def mine(*args: Any, work: Work = single, layers: int | None = None) -> Callable[[], Update]:
        return lambda: ours(model_of(kind, NAME, layers, device), work, device, *args)

    def theirs(loss: Any, limit: int | None, batch: int, work: Work = single, layers: int | None = None) -> Any:
        model = lambda: model_of(kind, "sdpa", layers, device)  # noqa: E731
        trajectory = work.trajectory

        def build() -> Update:
            body = model().base_model
            return peers.accumulated(loss, body, body.config.hidden_size, trajectory, limit=limit, batch=batch)

        return build

    def ilql() -> Update:
        model = model_of(kind, "sdpa", None, device)
        return peers.ilql(model, model.config.hidden_size, single.trajectory, batch=few)

    def padded() -> Update:
        body = model_of(kind, "sdpa", None, device).base_model
        make = EncodedBatches(None, None, single.replay, single.tokens, device)
        outcome = make.outcomes.of(np.arange(turns), device)
        return peers.padded_pass(body, body.config.hidden_size, single.trajectory, outcome)

    def least(attention: bool) -> Callable[[], Update]:
        return lambda: floor(model_of(kind, NAME, None, device), single, device, attention)

    longest = Work(grown.tokens, grown.replay, grown.trajectory.part([turns - 2, turns - 1]))
    old, new = peers.offline_archer, peers.archer
    return {
        "ours": (mine("heads"), 1),
        "ours_ema": (mine("ema"), 1),
        "ours_lora": (mine("ema", True), 1),
        "ours_bf16": (mine("heads", False, torch.bfloat16), 1),
        "padded": (padded, 1),
        "offline_archer": (theirs(old, None, turns), 1),
        "offline_archer_best": (theirs(old, None, 1), 1),
        "offline_archer_512": (theirs(old, 512, turns), 1),
        "archer": (theirs(new, None, turns), 1),
        "archer_512": (theirs(new, 512, turns), 1),
        "ilql": (ilql, 1),
        "floor": (least(False), 1),
        "floor_attention": (least(True), 1),
        "growing": (mine("heads", work=grown, layers=growing_layers), 1),
        "growing_offline_archer": (theirs(old, None, turns, longest, growing_layers), turns / 2),
        "growing_offline_archer_best": (theirs(old, None, 1, grown, growing_layers), 1),
    }


def cost(update: Update, device: torch.device) -> tuple[float, float]:
    """Seconds of an update, and GB at its peak: the optimiser's first, or on a GPU the second, its kernels tuned."""
    if device.type == "cuda":
        update()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        update()
        torch.cuda.synchronize()
        return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    started = time.process_time()
    update()
    seconds = time.process_time() - started
    return seconds, int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def measure(given: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    device = devices.device(given["device"])
    torch.set_num_threads(int(given["threads"]))
    all_rows = rows_of(given["model"], int(given["turns"]), int(given["growing_layers"]), device)
    if given["rows"] in ("main", "all"):
        wanted = list(all_rows) if given["rows"] == "all" else MAIN
        wanted = [name for name in wanted if name != "ours_bf16" or has_bf16(device)]
    else:
        wanted = given["rows"].split(",")
    cost(rows_of(given["model"], 1, 1, device)["ours"][0](), device)  # threads, libraries and lazy imports are up
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted}
    for _ in range(int(given["repeats"])):  # without the unmeasured round of `_measure.repeat`: every row begins anew
        for name in wanted:
            seen[name].append(cost(all_rows[name][0](), device))
    seconds = {name: all_rows[name][1] * statistics.median(s for s, _ in costs) for name, costs in seen.items()}
    single, grown = (work_of(int(given["turns"]), growing, device).tokens for growing in (False, True))

    def against(peer: str, mine: str) -> float | None:
        return round(seconds[peer] / seconds[mine], 2) if peer in seconds and mine in seconds else None

    table = []
    for name in wanted:
        grows = name.startswith("growing")
        tokens = len(grown.prompt(len(grown) - 1)) + ACTION if grows else single.n_tokens
        table.append({
            "row": name, "seconds": round(seconds[name], 3), "to_ours": against(name, "growing" if grows else "ours"),
            "tokens_per_s": round(tokens / seconds[name]), "peak_gb": round(max(gb for _, gb in seen[name]), 2),
        })  # fmt: skip
    found = {
        "fp32": against("offline_archer", "ours"),
        "fp32_peer_best": against("offline_archer_best", "ours"),
        "bf16": against("offline_archer", "ours_bf16"),
        "growing": against("growing_offline_archer", "growing"),
        "growing_peer_best": against("growing_offline_archer_best", "growing"),
        "floor": against("ours", "floor"),
        "floor_attention": against("ours", "floor_attention"),
    }
    result = {
        "ours": seconds.get("ours"), "peer": seconds.get("offline_archer"), "ratio": found["fp32"],
        "goal": GOALS["fp32"], "unit": "seconds an update" if device.type == "cuda" else "CPU-seconds an update",
        "ratios": found, "goals": GOALS,
        "versions": _measure.versions("torch", "transformers", **given),
    }  # fmt: skip
    return result, table


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is more than an emulation: any GPU of use here, or a processor with avx512_bf16 or amx."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def main(argv: list[str]) -> None:
    given = _measure.arguments(
        argv, model="small", turns="16", repeats="1", threads="2", rows="main", device="auto", growing_layers="1"
    )
    result, table = measure(given)
    _measure.report(result, table, given, __file__)
    if given["json"] != "true":
        print("ratios", result["ratios"], "goals", GOALS)


if __name__ == "__main__":
    main(sys.argv[1:])
