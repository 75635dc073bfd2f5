"""What `fit` checks before its work begins."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from offline_lm.batches import sampling
from offline_lm.errors import UserError
from offline_lm.models import backbone, devices, represent

_Rule = tuple[str, Callable[[Any], bool], str]


def _one_of(*words: str) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(words)}", lambda x: x in words


def _number(x: Any, *kinds: type) -> bool:
    return isinstance(x, kinds or (int, float)) and not isinstance(x, bool)


def _all_or_names(x: Any) -> bool:
    return x == "all" or (isinstance(x, ListConfig) and len(x) > 0 and all(isinstance(name, str) for name in x))


def _null_or_shares(x: Any) -> bool:
    return x is None or (isinstance(x, DictConfig) and len(x) > 0)


_PARTS = " ".join(f"model.stage.{part.name}" for part in dataclasses.fields(represent.Weights))
RULES: tuple[_Rule, ...] = (
    ("a whole number from 0", lambda x: _number(x, int) and x >= 0,
        "seed data.history actor.warmup optim.warmup model.stage.tokens"),
    ("a whole number from 1", lambda x: _number(x, int) and x >= 1,
        "data.max_tokens optim.steps optim.batch_size optim.batch_tokens optim.log_every optim.checkpoint_every"
        " actor.steps actor.batch_size actor.log_every actor.judged"
        " model.vocab_size model.width model.layers model.attention_heads model.stage.batch_tokens model.heads.ensemble"
        " model.heads.hidden model.lora.rank"),
    ("a whole number from 2", lambda x: _number(x, int) and x >= 2, "model.stage.goals_per_page model.heads.bins"),
    ("null or a whole number from 0", lambda x: x is None or (_number(x, int) and x >= 0), "heads_seed"),
    ("null or a whole number from 1", lambda x: x is None or (_number(x, int) and x >= 1),
        "threads actor.row_tokens actor.rounds"),
    ("auto, null or a number above 0", lambda x: x in ("auto", None) or (_number(x) and 0 < x < math.inf),
        "model.heads.whitening"),
    ("a number from 0", lambda x: _number(x) and 0 <= x < math.inf, f"optim.weight_decay actor.weight_decay {_PARTS}"),
    ("a number above 0", lambda x: _number(x) and 0 < x < math.inf,
        "optim.lr optim.clip actor.lr actor.clip model.stage.lr model.lora.alpha"),
    ("a number from 0 to 1", lambda x: _number(x) and 0 <= x <= 1,
        "model.stage.goals_first optim.critic_first actor.clone_first"),
    ("a share of tasks from 0 to below 1", lambda x: _number(x) and 0 <= x < 1, "data.held_out"),
    ("true or false", lambda x: isinstance(x, bool),
        "baselines logger.tensorboard model.gradient_checkpointing data.grounding"),
    (*_one_of("heads", "lora", "full"), "model.train"),
    (*_one_of("lora", "full"), "actor.train"),
    (*_one_of("start", "logged"), "actor.behaviour"),
    (*_one_of("ema", "heads"), "model.target"),
    ("all or a list of names", _all_or_names, "model.lora.layers"),
    (*_one_of("auto", "float32", "bfloat16", "float16"), "model.dtype"),
    (*_one_of("float32", "bfloat16"), "model.features"),
    (*_one_of("mse", "hl_gauss"), "model.heads.loss"),
    (*_one_of("outcome", "unknown"), "data.truncated"),
    (*_one_of("actions", "turns"), "data.context"),
    (*_one_of("float32", "bfloat16"), "optim.precision"),
    ("auto, true or false", lambda x: x == "auto" or isinstance(x, bool), "data.resident"),
    (*_one_of(*sampling.STRATEGIES), "data.sampling.strategy"),
    ("null or a whole number from 1", lambda x: x is None or (_number(x, int) and x >= 1), "data.sampling.capacity"),
    ("null or shares by source", _null_or_shares, "data.sampling.mix"),
    ("a number above 0", lambda x: _number(x) and 0 < x < math.inf, "data.sampling.half_life"),
    ("a run id or latest", lambda x: isinstance(x, str), "data.sampling.td_run"),
    ("auto, null or a number above 0", lambda x: x in ("auto", None) or (_number(x) and 0 < x < math.inf),
        "model.heads.whitening"),
    ("a number from 0", lambda x: _number(x) and 0 <= x < math.inf, "data.sampling.alpha"),
    ("a number from 0 to 1", lambda x: _number(x) and 0 <= x <= 1, "data.sampling.beta"),
)  # fmt: skip
"""What is wanted, the test of it, and the keys that it holds for (those of them that the configuration has)."""


def checked(cfg: DictConfig) -> torch.device:
    """The device to work on, after every mistake that can be seen before the work begins.

    Raises:
        UserError: a value of a wrong type or range, an unknown device, or a `run_dir` that cannot be written.
    """
    absent = object()
    for wanted, holds, keys in RULES:
        for key in keys.split():
            value = OmegaConf.select(cfg, key, default=absent)
            if value is not absent and not holds(value):
                raise UserError(f"{key}={value}: {wanted} is wanted")
    if cfg.model.path is None:
        width, heads = cfg.model.width, cfg.model.attention_heads
        if not backbone.fits_heads(width, heads):
            raise UserError(
                f"model.width={width}: a multiple of twice model.attention_heads is wanted, 4 a head at least"
            )
    if cfg.algo._target_.endswith(".D3rlpy"):
        for key, value in (("model.train", "heads"), ("model.heads.loss", "mse"), ("optim.critic_first", 0)):
            if OmegaConf.select(cfg, key) != value:
                raise UserError(f"{key}={OmegaConf.select(cfg, key)}: algo=d3rlpy takes {key}={value} alone")
        if cfg.data.sampling.strategy == "td" and cfg.data.sampling.beta:
            raise UserError(f"data.sampling.beta={cfg.data.sampling.beta}: algo=d3rlpy takes no weights, beta=0 alone")
    if cfg.run_dir is not None:
        try:
            Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cfg.run_dir).close()
        except OSError as error:
            raise UserError(f"run_dir={cfg.run_dir} cannot be written: {error.strerror}") from error
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    return devices.device(cfg.device)


def check_alone(cfg: DictConfig, name: str, wanted: dict[str, Any]) -> None:
    """Raises UserError where a key is not as an algorithm takes it alone."""
    for key, value in wanted.items():
        if (given := OmegaConf.select(cfg, key)) != value:
            raise UserError(f"{key}={given}: algo={name} takes {key}={'null' if value is None else value} alone")
