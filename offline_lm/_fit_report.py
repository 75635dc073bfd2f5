"""What `fit` measures of its critics beside their values, and what it prints."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import duckdb
import numpy as np
import torch
from omegaconf import DictConfig

from offline_lm._fit_sweep import Setting
from offline_lm._fit_train import Learner, estimate, without_features
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.models.features import Features
from offline_lm.ope.alarms import Alarm, comparisons
from offline_lm.ope.clustered import Measured
from offline_lm.ope.diagnostics import Estimates, effective_rank, target_gap
from offline_lm.run import Run
from offline_lm.store import Store
from offline_lm.values import candidate_values, compare, critic_alarms, log_alarms, values


def say_selected(replay: Replay) -> None:
    tasks, held = len(set(replay.tasks)), len({t for t, h in zip(replay.tasks, replay.held_out, strict=True) if h})
    unknown = int((np.isnan(replay.returns) & replay.acted).sum())
    won = np.nanmean(replay.success) if not np.isnan(replay.success).all() else float("nan")
    print(
        f"selected {len(replay.episode_ids)} episodes, {int(replay.acted.sum())} decisions, {tasks} tasks"
        f" ({held} held out); mean success {won:.3f}, {unknown} decisions without a known return"
    )


_SHOWN = (
    "v_rmse", "v_explained", "auc_mid", "auc_first", "brier", "ece", "q_rmse", "spread", "sensitivity", "margin",
)  # fmt: skip
"""Of the diagnostics those that are printed; all stand in the store."""


def ranks(feats: Features) -> dict[str, float]:
    """Effective rank of the features of states and actions, on a sample; few rows have no rank to speak of."""
    sample = {"rank_v": feats.v[_sample(len(feats.v), 1024)], "rank_q": feats.q[_sample(len(feats.q), 1024)]}
    return {name: effective_rank(rows) for name, rows in sample.items() if len(rows) >= 64}


def target_gaps(
    name: str, learner: Learner, mine: Estimates, feats: Features, replay: Replay, device: torch.device
) -> dict[str, float]:
    """How far the target's V lies from the online heads', on a sample; of critics that bootstrap from it alone."""
    if learner.target is None or name in ("q_mc", "critic_mc"):
        return {}
    rows, behind = _sample(len(replay), 4096), copy.copy(learner)
    behind.heads = learner.target
    (slow,) = estimate([behind], Features(feats.v[rows], feats.q[:0]), device)
    return {"target_gap": target_gap(mine.v[rows], slow.v, replay)}


def _sample(n: int, size: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(n)[:size])


def sites(db: duckdb.DuckDBPyConnection, replay: Replay) -> np.ndarray:
    of = dict(db.execute("SELECT episode_id, site FROM episodes").fetchall())
    return np.array([of[episode] for episode in replay.episode_ids], object)


def write_back(
    cfg: DictConfig, store: Store, db: duckdb.DuckDBPyConnection, run: Run, replay: Replay, tokens: Tokens,
    mine: Estimates, setting: Setting, extra: Mapping[str, float],
) -> tuple[dict[str, dict[str, float]], dict[str, Measured], list[Alarm]]:  # fmt: skip
    """Write a run's values beside the steps, and judge them; what is compared of them, and its alarms.

    Args:
        extra: numbers of the run's critic that were measured elsewhere.
    """
    algo = setting.algo
    store.append("values", values(run.run_id, replay, tokens, mine, algo.gamma))
    store.append("candidate_values", candidate_values(db, run.run_id, replay, tokens, mine))
    said = {setting.name: mine, **(without_features(replay) if cfg.baselines else {})}
    site = sites(db, replay)
    table = compare(store, run.run_id, replay, tokens, said, gamma=algo.gamma, extra=extra, site=site)
    of_logs = log_alarms(db, replay, tokens)
    compared, raised = critic_alarms(
        store, run.run_id, replay, tokens, said, table, of_logs, estimand=algo.estimand
    )  # fmt: skip
    return table, compared, raised


def say_alarms(runs: list[Run], alarms: list[list[Alarm]]) -> None:
    """Every sentence once, however many runs it is said of."""
    said: dict[str, list[str]] = {}
    for run, raised in zip(runs, alarms, strict=True):
        for alarm in raised:
            said.setdefault(alarm.sentence, []).append(run.run_id)
    for sentence, of in said.items():
        print(f"ALARM: {sentence}" + (f" ({', '.join(of)})" if len(runs) > 1 else ""))


def say_compared(
    setting: Setting, run: Run, table: dict[str, dict[str, float]], compared: dict[str, Measured], replay: Replay
) -> None:
    name = setting.name
    swept = "".join(f", {key}={value}" for key, value in setting.swept.items())
    side = "held-out tasks" if replay.held_out.any() else "training tasks (a single task: none could be held out)"
    print(f"\n{side}{f' ({run.run_id}{swept})' if swept else ''}:")
    columns = [name for name in _SHOWN if name in table[setting.name]]
    print("  ".join([f"{'':14}", *(f"{c:>11}" for c in columns)]))
    for critic, row in table.items():
        cells = (f"{row[c]:11.4f}" if c in row and not np.isnan(row[c]) else f"{'-':>11}" for c in columns)
        print("  ".join([f"{critic:14}", *cells]))
    print(*comparisons(name, table, compared), sep="\n")


def say_next(cfg: DictConfig, run: Run) -> None:
    store = cfg.data.store
    worst = f"SELECT task_id, step, action, v, q, advantage FROM run_values WHERE run_id = '{run.run_id}'"
    print(f"""
try:
  python -m offline_lm.query analysis/decisive_steps.sql run={run.run_id} store={store}
  python -m offline_lm.query analysis/where_value_was_lost.sql run={run.run_id} store={store}
  python -m offline_lm.query "{worst} ORDER BY advantage LIMIT 10" store={store}
""")
