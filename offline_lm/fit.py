"""``python -m offline_lm.fit``: train a critic from replay, score every step, write the values back.

The order of work is the order of this file: select, prepare (represent, tokenise), train, score, judge, commit.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from offline_lm import cli
from offline_lm.algos.q_mc import QMC
from offline_lm.batches import questions, render
from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens, tokenize
from offline_lm.errors import UserError
from offline_lm.models import backbone, devices, features, represent
from offline_lm.models.batching import CachedBatches, EncodedBatches
from offline_lm.models.critic import Critic
from offline_lm.models.features import Features
from offline_lm.models.heads import Heads, polyak, target_of
from offline_lm.ope.diagnostics import Estimates, position_only, verdict
from offline_lm.run import Run
from offline_lm.store import Store
from offline_lm.store.connect import explained
from offline_lm.types import Batch
from offline_lm.values import candidate_values, compare, values

Array = np.ndarray


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("fit", fit, argv)


def fit(cfg: DictConfig) -> dict[str, Any]:
    algo = cli.instantiate(cfg.algo)
    name = type(algo).__module__.rsplit(".", 1)[-1]
    device = _checked(cfg)
    store = Store.open(cfg.data.store, cfg.data.version).frozen()
    with store.connect() as db, explained(store):
        replay = replays.select(
            db,
            where=cfg.data.where,
            gamma=algo.gamma,
            truncated=cfg.data.truncated,
            held_out=cfg.data.held_out,
            seed=cfg.seed,
        )
        low, high = _return_range(replay)
        _say_selected(replay)
        run = Run.start(store, cfg, name)
        try:
            model, tokenizer, tokens = prepare(cfg, store, db, replay, run, device)
            torch.manual_seed(cfg.seed)
            heads = Heads(model.config.hidden_size, **cfg.model.heads, low=low, high=high).to(device)
            if cfg.model.train == "full":
                target_model = target_of(model)
                make: MakeBatch = EncodedBatches(model, target_model, replay, tokens, device)
                steps, whole = train(algo, heads, make, replay, cfg.optim, cfg.seed, run, (model, target_model))
                feats = compute_features(cfg, store, model, tokens)
            else:
                feats = compute_features(cfg, store, model, tokens)
                make = CachedBatches(feats, replay, tokens, device)
                steps, whole = train(algo, heads, make, replay, cfg.optim, cfg.seed, run)
            settings = {
                "max_tokens": cfg.data.max_tokens,
                "history": cfg.data.history,
                "dtype": cfg.model.dtype,
                "has_q": algo.trains_q,
            }
            kept_outside = cfg.model.path is not None and cfg.model.train == "heads" and not cfg.model.stage.tokens
            critic = Critic(model, tokenizer, heads, settings)
            critic.save(run.folder, backbone_path=cfg.model.path if kept_outside else None)

            estimates = {name: estimate(heads, feats, device, algo.trains_q)}
            if cfg.baselines:
                estimates |= train_baselines(cfg, algo.gamma, feats, replay, tokens, device, name, run)
            store.append("values", values(run.run_id, replay, tokens, estimates[name], algo.gamma))
            store.append("candidate_values", candidate_values(db, run.run_id, replay, tokens, estimates[name]))
            table = compare(store, run.run_id, replay, tokens, estimates)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            metrics = {**table[name], "peak_memory_gb": peak}
            run.finish("finished" if whole else "interrupted", steps, metrics)
        except BaseException:
            run.finish("failed", 0, {})
            raise
    _say_compared(table, name, replay)
    _say_next(cfg, run)
    seconds = round(run.seconds, 1)
    print(
        f"{run.run_id}: {'finished' if whole else 'interrupted, but usable'} in {seconds} s, peak memory {peak:.2f} GB"
    )
    return {"run_id": run.run_id, "steps": steps, "seconds": seconds, "metrics": metrics, "baselines": table}


MakeBatch = Callable[[Array], Batch]


def train(
    algo: Any, heads: Heads, make: MakeBatch, replay: Replay, optim: DictConfig, seed: int, run: Run,
    backbones: tuple[Any, Any] | None = None, prefix: str = "",
) -> tuple[int, bool]:  # fmt: skip
    """The training loop: `optim.steps` updates of heads, and of the backbone where one is given with its target.

    Ctrl-C ends it after the update under way.

    Returns:
        Updates done, and whether that is all of them.

    Raises:
        FloatingPointError: a loss or gradient is not finite; nothing was spread to the parameters.
    """
    pairs = [(target_of(heads), heads)] + ([(backbones[1], backbones[0])] if backbones else [])
    target = pairs[0][0]
    parameters = [p for _, online in pairs for p in online.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    for _, online in pairs:
        online.train()
    batches = replays.episode_batches(replay, optim.batch_size, seed)
    bar = tqdm(range(1, optim.steps + 1), f"{prefix}train", unit="update")
    step = 0
    try:
        for step in bar:
            optimizer.param_groups[0]["lr"] = optim.lr * min(
                1.0, step / max(optim.warmup, 1), 1.05 - step / optim.steps
            )
            losses = algo.loss(heads, target, make(next(batches)))
            total = torch.stack(list(losses.values())).sum()
            if not total.isfinite():
                raise FloatingPointError(
                    f"update {step}: the loss is {total.item()}; lower optim.lr, or look for huge rewards"
                )
            optimizer.zero_grad()
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, optim.clip, error_if_nonfinite=True)
            optimizer.step()
            for slow, online in pairs:
                polyak(slow, online, algo.polyak)
            if step % optim.log_every == 0 or step == optim.steps:
                logged = {f"loss/{k}": v.item() for k, v in losses.items()} | {"grad_norm": norm.item()}
                run.log(step, logged, prefix)
                bar.set_postfix({k: f"{v.item():.4f}" for k, v in losses.items()})
            if step % optim.checkpoint_every == 0:
                run.checkpoint(heads, backbones[0] if backbones else None)
    except KeyboardInterrupt:
        print(f"interrupted after {step} of {optim.steps} updates: scoring what was learnt (Ctrl-C again gives up)")
        return step, False
    finally:
        bar.close()
        for _, online in pairs:
            online.eval()
    return step, True


def prepare(
    cfg: DictConfig, store: Store, db: duckdb.DuckDBPyConnection, replay: Replay, run: Run, device: torch.device
) -> tuple[Any, Any, Tokens]:
    """Backbone, tokenizer and tokens; a represented backbone stays in the store's cache for other algorithms."""
    model_cfg = cli.plain(cfg.model)
    built = {k: v for k, v in model_cfg.items() if k not in ("heads", "train")}
    folder = store.cache_dir / "backbones" / features.key(built, _selection(cfg, store), cfg.data.held_out, cfg.seed)
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
        tokens = tokenized(cfg, store, db, tokenizer)
        represent_stage(cfg, model.to(device), tokens, replay, run)
        backbone.save(model, tokenizer, folder)
        (folder / "done").touch()
        model, tokenizer = backbone.load(str(folder), cfg.model.dtype)
    return model.to(device), tokenizer, tokenized(cfg, store, db, tokenizer)


def tokenized(cfg: DictConfig, store: Store, db: duckdb.DuckDBPyConnection, tokenizer: Any) -> Tokens:
    """The selected steps' tokens, from the store's cache if this tokenizer has seen them."""
    folder = store.cache_dir / "tokens" / tokens_key(cfg, store, tokenizer)
    if not (folder / "meta.json").exists():
        rows = tqdm(replays.steps(db, cfg.data.where), "tokens", unit="step")
        tokenize(rows, tokenizer, max_tokens=cfg.data.max_tokens, history=cfg.data.history).save(folder)
    tokens = Tokens.load(folder)
    cuts = tokens.cuts
    if cuts.pages or cuts.histories or cuts.too_long:
        print(
            f"data.max_tokens={cfg.data.max_tokens}: {cuts.pages} of {len(tokens)} pages cut in the middle"
            f" ({cuts.page_tokens} tokens), {cuts.histories} histories shortened, {cuts.too_long} steps too long to use"
        )
    return tokens


def tokens_key(cfg: DictConfig, store: Store, tokenizer: Any) -> str:
    vocabulary = tokenizer.backend_tokenizer.to_str()
    return features.key(vocabulary, tokenizer.chat_template, _selection(cfg, store))


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
    """Readouts of every state and response, from the cache if these weights have read these tokens."""
    folder = store.cache_dir / "features" / features.key(features.fingerprint(model), tokens.fingerprint())
    return features.compute(model, tokens, folder, progress=lambda rows: tqdm(rows, "features", unit="row"))


def train_baselines(
    cfg: DictConfig,
    gamma: float,
    feats: Features,
    replay: Replay,
    tokens: Tokens,
    device: torch.device,
    name: str,
    run: Run,
) -> dict[str, Estimates]:
    """What every critic is held against: `q_mc` on the same features, the step's position alone, and a constant."""
    out = {}
    if name != "q_mc":
        torch.manual_seed(cfg.seed)
        low, high = _return_range(replay)
        heads = Heads(feats.v.shape[1], **cfg.model.heads, low=low, high=high).to(device)
        make = CachedBatches(feats, replay, tokens, device)
        train(QMC(gamma=gamma, polyak=0.01), heads, make, replay, cfg.optim, cfg.seed, run, prefix="q_mc/")
        out["q_mc"] = estimate(heads, feats, device, True)
    mean = np.nanmean(np.where(replay.held_out_rows, np.nan, replay.returns))
    return out | {
        "position_only": Estimates(position_only(replay), None),
        "constant": Estimates(np.full(len(replay), mean), None),
    }


@torch.no_grad()
def estimate(heads: Heads, feats: Features, device: torch.device, with_q: bool) -> Estimates:
    """V of every row, and Q of every response."""
    v = np.concatenate([heads.values(x).cpu().numpy() for x in _slices(feats.v, device)])
    if not with_q:
        return Estimates(v.astype(np.float64), None)
    ensemble = np.concatenate([heads.q_values(x).cpu().numpy() for x in _slices(feats.q, device)], axis=1)
    ensemble = ensemble.astype(np.float64)
    return Estimates(v.astype(np.float64), ensemble.min(axis=0), ensemble)


def _slices(x: Array, device: torch.device, size: int = 65_536) -> Iterator[torch.Tensor]:
    for i in range(0, len(x), size):
        yield torch.from_numpy(np.array(x[i : i + size])).to(device)


def _selection(cfg: DictConfig, store: Store) -> list[Any]:
    """What the text of the prompts depends on."""
    versions = store.versions()
    snapshot = [versions.get(table, 0) for table in ("episodes", "steps")]
    return [cfg.data.where, cfg.data.history, cfg.data.max_tokens, render.VERSION, snapshot]


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


def _return_range(replay: Replay) -> tuple[float, float]:
    known = replay.returns[~np.isnan(replay.returns) & ~replay.held_out_rows]
    if not len(known):
        raise UserError(
            "no selected step has a known return: these logs carry no reward, outcome or success to learn from"
        )
    return float(min(known.min(), 0.0)), float(max(known.max(), 0.0))


_Rule = tuple[str, Callable[[Any], bool], str]


def _one_of(*words: str) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(words)}", lambda x: x in words


def _number(x: Any, *kinds: type) -> bool:
    return isinstance(x, kinds or (int, float)) and not isinstance(x, bool)


_PARTS = " ".join(f"model.stage.{part.name}" for part in dataclasses.fields(represent.Weights))
_RULES: tuple[_Rule, ...] = (
    ("a whole number from 0", lambda x: _number(x, int) and x >= 0,
        "seed data.history optim.warmup model.stage.tokens"),
    ("a whole number from 1", lambda x: _number(x, int) and x >= 1,
        "data.max_tokens optim.steps optim.batch_size optim.log_every optim.checkpoint_every model.vocab_size"
        " model.width model.layers model.attention_heads model.stage.batch_tokens model.heads.ensemble"
        " model.heads.hidden"),
    ("a whole number from 2", lambda x: _number(x, int) and x >= 2, "model.stage.goals_per_page model.heads.bins"),
    ("null or a whole number from 1", lambda x: x is None or (_number(x, int) and x >= 1), "threads"),
    ("a number from 0", lambda x: _number(x) and 0 <= x < math.inf, f"optim.weight_decay {_PARTS}"),
    ("a number above 0", lambda x: _number(x) and 0 < x < math.inf, "optim.lr optim.clip model.stage.lr"),
    ("a number from 0 to 1", lambda x: _number(x) and 0 <= x <= 1, "model.stage.goals_first"),
    ("a share of tasks from 0 to below 1", lambda x: _number(x) and 0 <= x < 1, "data.held_out"),
    ("true or false", lambda x: isinstance(x, bool), "baselines logger.tensorboard"),
    (*_one_of("heads", "full"), "model.train"),
    (*_one_of("auto", "float32", "bfloat16", "float16"), "model.dtype"),
    (*_one_of("mse", "hl_gauss"), "model.heads.loss"),
    (*_one_of("outcome", "unknown"), "data.truncated"),
)  # fmt: skip
"""What is wanted, the test of it, and the keys that it holds for (those of them that the configuration has)."""


def _checked(cfg: DictConfig) -> torch.device:
    """The device to work on, after every mistake that can be seen before the work begins.

    Raises:
        UserError: a value of a wrong type or range, an unknown device, or a `run_dir` that cannot be written.
    """
    absent = object()
    for wanted, holds, keys in _RULES:
        for key in keys.split():
            value = OmegaConf.select(cfg, key, default=absent)
            if value is not absent and not holds(value):
                raise UserError(f"{key}={value}: {wanted} is wanted")
    if cfg.model.path is None and cfg.model.width % (2 * cfg.model.attention_heads):
        raise UserError(f"model.width={cfg.model.width}: a multiple of twice model.attention_heads is wanted")
    if cfg.run_dir is not None:
        try:
            Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cfg.run_dir).close()
        except OSError as error:
            raise UserError(f"run_dir={cfg.run_dir} cannot be written: {error.strerror}") from error
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    return devices.device(cfg.device)


def _say_selected(replay: Replay) -> None:
    tasks, held = len(set(replay.tasks)), len({t for t, h in zip(replay.tasks, replay.held_out, strict=True) if h})
    unknown = int((np.isnan(replay.returns) & replay.acted).sum())
    won = np.nanmean(replay.success) if not np.isnan(replay.success).all() else float("nan")
    print(
        f"selected {len(replay.episode_ids)} episodes, {int(replay.acted.sum())} decisions, {tasks} tasks"
        f" ({held} held out); mean success {won:.3f}, {unknown} decisions without a known return"
    )


def _say_compared(table: dict[str, dict[str, float]], name: str, replay: Replay) -> None:
    print(
        f"\n{'held-out tasks' if replay.held_out.any() else 'training tasks (a single task: none could be held out)'}:"
    )
    columns = list(table[name])
    print("  ".join([f"{'':14}", *(f"{c:>11}" for c in columns)]))
    for critic, row in table.items():
        cells = (f"{row[c]:11.4f}" if c in row and not np.isnan(row[c]) else f"{'-':>11}" for c in columns)
        print("  ".join([f"{critic:14}", *cells]))
    print(*verdict(name, table), sep="\n")


def _say_next(cfg: DictConfig, run: Run) -> None:
    store = cfg.data.store
    worst = f"SELECT task_id, step, action, v, q, advantage FROM run_values WHERE run_id = '{run.run_id}'"
    print(f"""
try:
  python -m offline_lm.query analysis/decisive_steps.sql run={run.run_id} store={store}
  python -m offline_lm.query analysis/where_value_was_lost.sql run={run.run_id} store={store}
  python -m offline_lm.query "{worst} ORDER BY advantage LIMIT 10" store={store}
""")


if __name__ == "__main__":
    raise SystemExit(main())
