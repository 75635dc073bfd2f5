"""One update of an actor by cloning, beside TRL's SFTTrainer on the same model, tokens and loss.

    pip install --no-deps --target FOLDER trl accelerate psutil
    PYTHONPATH=FOLDER python analysis/benchmarks/actor_update.py [json=true] [model=small|distilgpt2] [layers=2]
        [batch=8] [updates=2] [repeats=1] [threads=1] [data=web,groups,shop] [rows=all|ours,trl,...]

So both run in one interpreter, on the same torch and transformers. Where there is no TRL, only our rows are measured.
Everything runs on the CPU, in float32.

The loss is the log-likelihood of the responses alone, the mean over their tokens. An update is forward, backward,
gradient clipping and fused AdamW on all weights, for `batch` responses (`shop`: for 4 times as many). A row trains on
the same responses again and again; its first update is not measured, but its loss and the norm of its gradient must be
those of our row to 1e-4.

    web      pages of a browser's log, cut to 512 tokens, each with a response of 70 to 200 tokens of thought and action
    groups   8 responses to each such page, as GRPO trains on: ours encodes the page once for all of them
    shop     logs of the text shop: 60 to 140 tokens of state, 5 to 9 of action

    ours              what an update of `fit algo=bc` does, on packed rows
    trl               SFTTrainer at its defaults, 8 responses at a time, padded, gradient checkpointing; but no `bf16`,
                      which a processor may only emulate, and no `max_length`, which cuts off a response's end
    trl_padded        the same without gradient checkpointing, responses of like length together
    trl_single        one response at a time, gradients accumulated: no padding, no mask
    trl_padding_free  `padding_free=True`: 8 responses end to end, which attend through a mask over the row
    trl_packed        `packing=True`: rows of up to 2,048 tokens, through the same mask

TRL scores the vocabulary at every token where there is no Triton; on a GPU, only at those of the responses, as we do.
A CPU-second is of this process. Tokens are those of [prompt; response], a prompt counted for every response, and no
padding. Memory is the process's peak during the row above what it held before: weights, optimiser, activations.
`ratio` is ours over the fastest row of TRL on `web`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("TQDM_DISABLE", "1")

import _measure
import _web_logs
import numpy as np
import torch
from critic_update import model_of
from torch import nn

from offline_lm.algos.bc import BC
from offline_lm.batches.tokens import Tokens, tokenize
from offline_lm.envs import shop
from offline_lm.losses.policy import token_weights
from offline_lm.models import acting, backbone
from offline_lm.models.acting import Chosen
from offline_lm.models.attention import NAME
from offline_lm.models.devices import row_tokens
from offline_lm.types import Responses

LR, DECAY, CLIP = 1e-5, 0.01, 1.0
GROUP = 8
PAGE = 512
AGREE = 1e-4
CPU = torch.device("cpu")
PEER = {
    "trl": {"activation_checkpointing": True},
    "trl_padded": {"train_sampling_strategy": "group_by_length"},
    "trl_single": {"per_device_train_batch_size": 1},
    "trl_padding_free": {"padding_free": True},
    "trl_packed": {"packing": True, "max_length": 2048, "per_device_train_batch_size": 1},
}
"""Of SFTConfig, beside what all rows have."""


@dataclass(frozen=True)
class Work:
    """Responses to train on: numbers of `tokens`, ascending."""

    tokens: Tokens
    tokenizer: Any
    branches: np.ndarray

    def sequences(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(prompt, response) of each."""
        states = np.searchsorted(self.tokens.branch_ptr, self.branches, side="right") - 1
        for n, a in zip(states, self.branches, strict=True):
            yield self.tokens.prompt(int(n)), self.tokens.response(int(a))

    @property
    def n_tokens(self) -> int:
        return sum(len(prompt) + len(response) for prompt, response in self.sequences())


@dataclass(frozen=True)
class Seen:
    """What a row came to: loss and norm of the gradient in its first update, CPU-seconds of the later ones."""

    loss: float
    norm: float
    seconds: list[float]
    memory_gb: float


# -- the data ---------------------------------------------------------------------------------------------------------


def work_of(kind: str, batch: int) -> Work:
    rng, draw = np.random.default_rng(0), random.Random(0)
    if kind == "shop":
        tasks = [shop.Task(shop.Site.draw(0), number) for number in range(4)]
        episodes = list(shop.record(tasks, episodes=8))
    else:
        pages = _web_logs.Pages(draw)
        episodes = [_web_logs.jsonl(draw, pages, number) for number in range(max(2, batch // 6))]
    rows = [_row(episode, number, step) for number, episode in enumerate(episodes) for step in episode["steps"]]
    if kind == "groups":
        said = [row["response"] for row in rows]
        for n, row in enumerate(rows):
            others = [said[(n + k) % len(said)] for k in range(1, GROUP)]
            row["candidates"] = [{"action": None, "response": text, "executed": False} for text in others]
    texts = [row[key] or "" for row in rows for key in ("observation", "goal", "response", "action")]
    tokenizer = backbone.train_tokenizer(texts, 2048)
    tokens = tokenize(rows, tokenizer, max_tokens=PAGE)
    each = GROUP if kind == "groups" else 1
    states = np.sort(rng.choice(len(tokens), 4 * batch if kind == "shop" else batch // each, replace=False))
    return Work(tokens, tokenizer, (tokens.branch_ptr[states][:, None] + np.arange(each)).ravel())


def _row(episode: dict[str, Any], number: int, step: dict[str, Any]) -> dict[str, Any]:
    """A step as `tokenize` takes it, without the other actions that there were."""
    keys = ("start_url", "url", "messages", "observation_error", "tokenizer_id", "prompt_token_ids")
    return {
        **dict.fromkeys(keys), "episode_id": str(number), "goal": episode["goal"], "observation": step["observation"],
        "response": step.get("response"), "action": step["action"], "response_token_ids": None, "candidates": None,
    }  # fmt: skip


# -- the rows ---------------------------------------------------------------------------------------------------------


def ours(model: Any, work: Work, updates: int) -> tuple[list[float], float, float]:
    """The updates of `fit algo=bc`; when each ended, and loss and norm of the gradient in the first."""
    algo = BC(gamma=1.0, aggregate="token")
    tokens, branches, budget = work.tokens, work.branches, row_tokens(CPU)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, fused=True)
    model.eval()
    ends, told = [], []
    for _ in range(updates):
        weight = token_weights(torch.from_numpy(acting.lengths(tokens, branches)), algo.aggregate)
        optimizer.zero_grad()
        loss, at = 0.0, 0
        for part in Chosen.of(tokens, branches).rows(tokens, budget):
            logprobs, _ = acting.response_logprobs(model, tokens, part, entropy=True)  # which is reported
            old = logprobs.detach()
            owner = torch.from_numpy(acting.owners(acting.lengths(tokens, part.branches)))
            state = torch.from_numpy(acting.owners([len(own) for own in part.responses]))
            batch = Responses(
                logprobs=logprobs, weight=weight[at : at + len(old)], old=old, reference=old, owner=owner, state=state,
                advantages=torch.ones(len(part)),
            )  # fmt: skip
            found = algo.loss(batch)["actor"]
            found.backward()
            loss += found.item()
            at += len(old)
        norm = nn.utils.clip_grad_norm_(parameters, CLIP).item()
        optimizer.step()
        ends.append(time.process_time())
        told.append((loss, norm))
    return ends, *told[0]


def trl(model: Any, work: Work, updates: int, options: dict[str, Any]) -> tuple[list[float], float, float]:
    """As `ours`, by SFTTrainer: an epoch is an update."""
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    from datasets import Dataset

    ends, logged = [], []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            logged.append(logs)

    data = Dataset.from_dict({
        "input_ids": [np.concatenate(pair).tolist() for pair in work.sequences()],
        "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in work.sequences()],
    })  # fmt: skip
    n = len(work.branches)
    same: dict[str, Any] = {
        "completion_only_loss": True, "max_length": None, "per_device_train_batch_size": min(8, n), "bf16": False,
        "activation_checkpointing": False, "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": DECAY,
        "max_grad_norm": CLIP, "optim": "adamw_torch_fused", "num_train_epochs": updates, "use_cpu": True,
        "logging_first_step": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    settings = same | options
    # of packed rows there are fewer, and the epoch ends before
    settings["gradient_accumulation_steps"] = -(-n // settings["per_device_train_batch_size"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = SFTConfig(output_dir=folder, **settings)
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=work.tokenizer, callbacks=[Watch()])
        trainer.train()
    return ends, logged[0]["loss"], logged[0]["grad_norm"]


def cost(train: Callable[[], tuple[list[float], float, float]]) -> Seen:
    """Linux and glibc: what was freed goes back to the system, and the peak begins anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    ends, loss, norm = train()
    return Seen(loss, norm, np.diff(ends).tolist(), _status("VmHWM") - before)


def _status(name: str) -> float:
    """GB"""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 2**20


# -- the report -------------------------------------------------------------------------------------------------------


def measure(given: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    torch.set_num_threads(int(given["threads"]))
    layers, updates = int(given["layers"]), 1 + int(given["updates"])
    peers = list(PEER) if given["rows"] == "all" else [name for name in given["rows"].split(",") if name != "ours"]
    wanted = ["ours", *peers] if has_peer() else ["ours"]

    def seen(name: str, work: Work) -> Seen:
        if name == "ours":
            return cost(lambda: ours(model_of(given["model"], NAME, layers, CPU), work, updates))
        return cost(lambda: trl(model_of(given["model"], "sdpa", layers, CPU), work, updates, PEER[name]))

    table: list[dict[str, Any]] = []
    ratios: dict[str, float | None] = {}
    best: dict[str, int | None] = {}
    for kind in given["data"].split(","):
        work = work_of(kind, int(given["batch"]))
        if not table:  # libraries and lazy imports are up before anything is measured
            for name in (wanted[0], wanted[-1]):
                seen(name, Work(work.tokens, work.tokenizer, work.branches[:2]))
        found: dict[str, list[Seen]] = {name: [] for name in wanted}
        for _ in range(int(given["repeats"])):
            for name in wanted:
                found[name].append(seen(name, work))
        check(kind, found)
        rows = {name: _row_of(kind, name, work, each) for name, each in found.items()}
        mine = rows["ours"]["tokens_per_cpu_s"]
        table += [{**row, "to_ours": round(mine / row["tokens_per_cpu_s"], 2)} for row in rows.values()]
        best[kind] = max((row["tokens_per_cpu_s"] for name, row in rows.items() if name != "ours"), default=None)
        ratios[kind] = round(mine / fastest, 2) if (fastest := best[kind]) else None
    kind = next(iter(best))
    result = {
        "ours": table[0]["tokens_per_cpu_s"], "peer": best[kind], "ratio": ratios[kind], "goal": None,
        "unit": "tokens/CPU-s", "ratios": ratios,
        "versions": _measure.versions("torch", "transformers", *["trl"] * (len(wanted) > 1), **given),
    }  # fmt: skip
    return result, table


def _row_of(kind: str, name: str, work: Work, found: list[Seen]) -> dict[str, Any]:
    seconds = statistics.median(s for each in found for s in each.seconds)
    return {
        "data": kind, "row": name, "cpu_s": round(seconds, 3), "tokens_per_cpu_s": round(work.n_tokens / seconds),
        "responses_per_cpu_s": round(len(work.branches) / seconds, 2),
        "memory_gb": round(max(each.memory_gb for each in found), 3), "loss": found[0].loss, "norm": found[0].norm,
    }  # fmt: skip


def check(kind: str, found: dict[str, list[Seen]]) -> None:
    """Raises SystemExit: a row computed another loss, or another gradient, than ours."""
    mine = found["ours"][0]
    for name, (first, *_) in found.items():
        for what, x, y in (("loss", mine.loss, first.loss), ("gradient's norm", mine.norm, first.norm)):
            if not abs(x - y) <= AGREE * abs(x):
                raise SystemExit(f"{kind}: the {what} of {name} is {y}, ours {x}: this is not the same work")


def has_peer() -> bool:
    try:
        import trl  # pyright: ignore[reportMissingImports] # noqa: F401
    except ModuleNotFoundError as error:
        print(
            f"no peer ({error}), only our rows. For TRL: pip install --no-deps --target FOLDER trl accelerate psutil,"
            " and PYTHONPATH=FOLDER",
            file=sys.stderr,
        )
        return False
    return True


def main(argv: list[str]) -> None:
    given = _measure.arguments(
        argv, model="small", layers="2", batch="8", updates="2", repeats="1", threads="1", data="web,groups,shop",
        rows="all",
    )  # fmt: skip
    result, table = measure(given)
    _measure.report(result, table, given, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
