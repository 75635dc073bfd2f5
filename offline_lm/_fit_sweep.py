"""The settings that one `fit` trains at once: the configuration as it is, or every combination of `sweep`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from offline_lm import cli
from offline_lm.errors import UserError

_OPTIM = ("optim.lr", "optim.weight_decay", "optim.clip", "optim.warmup", "optim.critic_first")
SWEPT = ("seed", "algo.", "model.heads.", *_OPTIM)
"""What settings may differ in. All else (episodes, split, backbone, batches) is what they share."""


_ABSENT = object()


@dataclass(frozen=True)
class Setting:
    """One run to be.

    Attributes:
        cfg: its configuration, from which `fit` alone would give the same run.
        algo: its algorithm.
        name: of the algorithm.
        swept: the values that are its own, by key.
    """

    cfg: DictConfig
    algo: Any
    name: str
    swept: dict[str, Any]


def settings_of(cfg: DictConfig) -> list[Setting]:
    """Every combination of the lists in `sweep`, in the order written, the last key fastest.

    Raises:
        UserError: a key that is unknown or shared by all settings, or no list of values; heads and backbone are trained
            together, which shares nothing.
    """
    if cfg.sweep is None:
        return [_setting(cfg, {})]
    if not OmegaConf.is_dict(cfg.sweep) or not cfg.sweep:
        raise UserError("sweep: lists by key are wanted, such as 'sweep={seed:[0,1,2],algo.tau:[0.7,0.9]}'")
    if cfg.model.train != "heads":
        raise UserError(f"model.train={cfg.model.train}: a sweep shares features, which only model.train=heads leaves")
    lists = dict(_lists(cli.plain(cfg.sweep)))
    for key, values in lists.items():
        if not any(key == k or (k.endswith(".") and key.startswith(k)) for k in SWEPT):
            shared = "what all settings share cannot be swept; --multirun runs each by itself"
            raise UserError(f"sweep.{key}: {shared}. Swept are {', '.join(k + '*' * k.endswith('.') for k in SWEPT)}")
        if key == "algo._target_" or OmegaConf.select(cfg, key, default=_ABSENT) is _ABSENT:
            raise UserError(f"sweep.{key}: no such key")
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep.{key}={values}: a list of values is wanted")
    return [_setting(cfg, dict(zip(lists, chosen, strict=True))) for chosen in itertools.product(*lists.values())]


def _lists(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _lists(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _setting(cfg: DictConfig, swept: dict[str, Any]) -> Setting:
    cfg = cfg.copy()
    cfg.sweep = None
    for key, value in swept.items():
        # `seed` draws what is shared, too: split, tokenizer, backbone and batches. The heads' own one differs.
        OmegaConf.update(cfg, "heads_seed" if key == "seed" else key, value)
    algo = cli.instantiate(cfg.algo)
    return Setting(cfg, algo, type(algo).__module__.rsplit(".", 1)[-1], swept)
