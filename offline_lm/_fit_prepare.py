"""What `fit` prepares before training: backbone, tokens, features, each from the store's cache where it is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from offline_lm import cli
from offline_lm._fit_sweep import Setting
from offline_lm.batches import questions, render, token_cache
from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens, tokenizer_id
from offline_lm.models import backbone, features, represent
from offline_lm.models.features import Features
from offline_lm.policy import start_of
from offline_lm.run import Run
from offline_lm.store import Store

_NOT_BUILT = ("heads", "features", "train", "target", "lora", "gradient_checkpointing")
"""Keys of `model` that a represented backbone does not depend on."""


def selected(cfg: DictConfig, db: duckdb.DuckDBPyConnection, gamma: float) -> Replay:
    """The steps that `data` selects, with returns of this discount."""
    return replays.select(
        db,
        where=cfg.data.where,
        gamma=gamma,
        truncated=cfg.data.truncated,
        held_out=cfg.data.held_out,
        seed=cfg.seed,
    )


def prepare(
    cfg: DictConfig, store: Store, db: duckdb.DuckDBPyConnection, replay: Replay, run: Run, device: torch.device
) -> tuple[Any, Any, Tokens]:
    """Backbone, tokenizer and tokens; a represented backbone stays in the store's cache for other algorithms."""
    model_cfg = cli.plain(cfg.model)
    built = {k: v for k, v in model_cfg.items() if k not in _NOT_BUILT}
    selected = [_selection(cfg, store), cfg.data.held_out, cfg.seed]
    folder = store.cache_dir / "backbones" / features.key(built, _weights(cfg.model.path), *selected)
    if cfg.model.path is not None and not cfg.model.stage.tokens:
        model, tokenizer = backbone.load(cfg.model.path, cfg.model.dtype)
    elif (folder / "done").exists():
        model, tokenizer = backbone.load(str(folder), cfg.model.dtype)
    else:
        if cfg.model.path is not None:
            model, tokenizer = backbone.load(cfg.model.path, cfg.model.dtype)
        else:
            model, tokenizer = backbone.tiny(
                _training_texts(db, cfg.data.where, replay), vocab_size=cfg.model.vocab_size, width=cfg.model.width,
                layers=cfg.model.layers, heads=cfg.model.attention_heads, seed=cfg.seed,
            )  # fmt: skip
        tokens = tokenized(cfg, store, db, replay, tokenizer, grounding=cfg.data.grounding)
        represent_stage(cfg, model.to(device), tokens, replay, run)
        backbone.save(model, tokenizer, folder)
        (folder / "done").touch()
        model, tokenizer = backbone.load(str(folder), cfg.model.dtype)
    return model.to(device), tokenizer, tokenized(cfg, store, db, replay, tokenizer, grounding=cfg.data.grounding)


def starting_policy(
    cfg: DictConfig, store: Store, db: duckdb.DuckDBPyConnection, replay: Replay, run: Run, device: torch.device
) -> tuple[Any, Any, Tokens]:
    """The policy that an actor's training begins with (`actor.path`), its tokenizer, and the logs in its tokens."""
    if cfg.actor.path is None:
        model, tokenizer, _ = prepare(cfg, store, db, replay, run, device)
    else:
        model, tokenizer = backbone.load(start_of(cfg.actor.path, cfg.data.store), cfg.model.dtype, "actor.path")
    return model.to(device), tokenizer, tokenized(cfg, store, db, replay, tokenizer, grounding=False)


def check_starting_policy(cfg: DictConfig) -> None:
    """Raises UserError, before anything is trained, where `actor.path` names no model."""
    if cfg.actor.path is not None:
        backbone.check(start_of(cfg.actor.path, cfg.data.store), "actor.path")


def tokenized(
    cfg: DictConfig, store: Store, db: duckdb.DuckDBPyConnection, replay: Replay, tokenizer: Any, *, grounding: bool
) -> Tokens:
    """The selected steps' tokens; the store's cache keeps them, and new episodes alone are tokenised.

    Args:
        grounding: `data.grounding` for a critic; False for a policy, which answers for what it says alone.
    """
    hashes = dict(db.execute("SELECT episode_id, content_hash FROM episodes").fetchall())
    tokens = token_cache.cached(
        store.cache_dir / "tokens",
        tokens_key(cfg, db, tokenizer, grounding),
        replay.episode_ids,
        [hashes[episode] for episode in replay.episode_ids],
        replay.offsets,
        lambda episodes: tqdm(replays.steps(db, cfg.data.where, episodes), "tokens", unit="step"),
        tokenizer,
        max_tokens=cfg.data.max_tokens,
        history=cfg.data.history,
        context=cfg.data.context,
        grounding=grounding,
    )
    cuts = tokens.cuts
    if cuts.pages or cuts.histories or cuts.too_long:
        print(
            f"data.max_tokens={cfg.data.max_tokens}: {cuts.pages} of {len(tokens)} pages cut in the middle"
            f" ({cuts.page_tokens} tokens), {cuts.histories} histories shortened, {cuts.too_long} steps too long to use"
        )
    return tokens


def tokens_key(cfg: DictConfig, db: duckdb.DuckDBPyConnection, tokenizer: Any, grounding: bool) -> str:
    """Name of what tokens depend on beside the episodes; the tokenizer's own name matters to ids that it logged."""
    name = tokenizer_id(tokenizer)
    logged = db.execute("SELECT count(*) FROM (FROM steps WHERE tokenizer_id = ? LIMIT 1)", [name]).fetchall()
    vocabulary = tokenizer.backend_tokenizer.to_str()
    return features.key(
        vocabulary, tokenizer.chat_template, name if logged[0][0] else None, [*_rendering(cfg), grounding]
    )


def represent_stage(cfg: DictConfig, model: Any, tokens: Tokens, replay: Replay, run: Run) -> None:
    """Train the backbone on questions about the logs (see `represent`)."""
    stage = cfg.model.stage
    if not stage.tokens:
        return
    weights = represent.Weights(
        stage.goal_swap, stage.returns, stage.next_token, stage.effect, stage.action_swap, stage.recall
    )
    drawn = questions.draw(
        tokens,
        replay,
        token_budget=stage.batch_tokens,
        goals_per_page=stage.goals_per_page,
        goals_first=int(stage.tokens * stage.goals_first) if stage.goal_swap else 0,
        seed=cfg.seed,
    )
    seen = 0
    with tqdm(total=stage.tokens, desc="represent", unit="token", unit_scale=True) as bar:

        def on_step(new: int, parts: dict[str, float]) -> None:
            nonlocal seen
            seen += new
            bar.update(new)
            bar.set_postfix({k: f"{v:.3f}" for k, v in parts.items()}, refresh=False)
            run.log(seen, parts, "stage/")

        represent.train(model, drawn, weights, tokens=stage.tokens, lr=stage.lr, seed=cfg.seed, on_step=on_step)


def compute_features(cfg: DictConfig, store: Store, model: Any, tokens: Tokens) -> Features:
    """Readouts of every state and response: from the cache those that these weights have read before."""
    folder, dtype = store.cache_dir / "features", cfg.model.features
    return features.compute(
        model, tokens, folder, dtype=dtype, progress=lambda rows: tqdm(rows, "features", unit="row")
    )


def keep_backbone(cfg: DictConfig, model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the backbone into a run's folder, unless it stays what `model.path` names."""
    if kept_outside(cfg) is None:
        backbone.save(model, tokenizer, folder / "backbone")


def kept_outside(cfg: DictConfig) -> str | None:
    """`model.path`, where the backbone is still what lies there; the shipped one is copied, for the next may differ."""
    outside = cfg.model.path not in (None, "reader")
    return cfg.model.path if outside and cfg.model.train == "heads" and not cfg.model.stage.tokens else None


def reading(cfg: DictConfig) -> dict[str, Any]:
    """What a saved critic or policy must know to read pages as it did in training."""
    return {**{key: cfg.data[key] for key in ("max_tokens", "history", "context")}, "dtype": cfg.model.dtype}


def described(setting: Setting) -> dict[str, Any]:
    """`reading`, and what else a saved critic must know."""
    return {**reading(setting.cfg), "grounding": setting.cfg.data.grounding, "has_q": setting.algo.trains_q}


def _weights(path: str | None) -> list[Any]:
    """What tells the weights of a folder from those that lay there before; nothing of a hub name."""
    files = sorted(Path(backbone.located(path)).glob("*.safetensors")) if path is not None else []
    return [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def _selection(cfg: DictConfig, store: Store) -> list[Any]:
    """What the text of the prompts depends on."""
    versions = store.versions()
    snapshot = [versions.get(table, 0) for table in ("episodes", "steps")]
    return [cfg.data.where, *_rendering(cfg), cfg.data.grounding, snapshot]


def _rendering(cfg: DictConfig) -> list[Any]:
    return [cfg.data.context, cfg.data.history, cfg.data.max_tokens, render.VERSION]


def _training_texts(db: duckdb.DuckDBPyConnection, where: str, replay: Replay) -> Iterator[str]:
    """Texts of the training side, for the tokenizer: at most 50,000 steps."""
    kept = 0
    for held_out, row in zip(replay.held_out_rows, replays.steps(db, where), strict=True):
        if held_out:
            continue
        yield render.goal_text(row["goal"], row["start_url"])
        yield render.page_text(row)
        yield from (c["action"] for c in row["candidates"] or ())
        if row["response"] or row["action"]:
            yield row["response"] or row["action"]
        kept += 1
        if kept == 50_000:
            return
