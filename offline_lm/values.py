"""What a run writes back beside the steps: `values`, `candidate_values`, and the `diagnostics` of its estimates."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import torch

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.losses.returns import td_residuals
from offline_lm.ope.diagnostics import Estimates, judge
from offline_lm.store import Store

Array = np.ndarray

_NAMED = """
    SELECT c.run_id, s.episode_id, s.step, c.candidate, s.candidates[c.candidate + 1].action AS action, c.q, c.executed
    FROM scored AS c
    JOIN steps AS s USING (episode_id, step)
    ORDER BY s.episode_id, s.step, c.candidate
"""


def values(run_id: str, replay: Replay, tokens: Tokens, estimates: Estimates, gamma: float) -> pa.Table:
    """Rows of the table `values`, one for every step and final observation; what is unknown is null.

    q is the least of the ensemble. td_error is r + gamma * continue * V(s') - V(s); advantage is q - v, or the TD error
    for a critic of states alone.
    """
    n = len(replay)
    v = np.where(tokens.usable, estimates.v, np.nan)
    next_v = np.where(replay.steps_to_end > 0, np.roll(v, -1), np.nan)
    reward, continues = torch.from_numpy(replay.reward), torch.from_numpy((~replay.terminated).astype(np.float64))
    td = td_residuals(reward, continues, torch.from_numpy(v), torch.from_numpy(next_v), gamma=gamma).numpy()
    td = np.where(replay.acted & replay.bootstraps, td, np.nan)
    q, ensemble = np.full(n, np.nan), pa.nulls(n)
    if estimates.q is not None and estimates.ensemble is not None:
        acted = np.asarray(tokens.acted)
        logged = tokens.branch_ptr[:-1][acted]
        q[acted] = estimates.q[logged]
        members = iter(estimates.ensemble[:, logged].T.tolist())
        ensemble = pa.array([next(members) if has else None for has in acted], pa.list_(pa.float64()))
    return pa.table({
        "run_id": pa.array([run_id] * n),
        "episode_id": _episode_ids(replay),
        "step": replay.step,
        "split": np.where(replay.held_out_rows, "held_out", "train"),
        "v": _nullable(v),
        "q": _nullable(q),
        "q_ensemble": ensemble,
        "advantage": _nullable(td if estimates.q is None else q - v),
        "td_error": _nullable(td),
        "return": _nullable(replay.returns),
        "return_mask": ~np.isnan(replay.returns),
        "bootstrap_mask": replay.bootstraps,
    })  # fmt: skip


def candidate_values(
    db: duckdb.DuckDBPyConnection, run_id: str, replay: Replay, tokens: Tokens, estimates: Estimates
) -> pa.Table:
    """Rows of the table `candidate_values`, one for every logged candidate; none where Q is untrained."""
    counts = np.diff(tokens.candidate_ptr) if estimates.q is not None else np.zeros(len(replay), np.int64)
    rows = np.repeat(np.arange(len(replay)), counts)
    branch = tokens.candidate_branch[: len(rows)]
    scored = pa.table({
        "run_id": pa.array([run_id] * len(rows), pa.string()),
        "episode_id": _episode_ids(replay).take(pa.array(rows)),
        "step": replay.step[rows],
        "candidate": np.arange(len(rows)) - np.repeat(tokens.candidate_ptr[:-1], counts),
        "q": np.zeros(0) if estimates.q is None else estimates.q[branch],
        "executed": tokens.acted[rows] & (branch == tokens.branch_ptr[rows]),
    })  # fmt: skip
    with db.cursor() as cursor:
        cursor.register("scored", scored)
        return cursor.sql(_NAMED).to_arrow_table()


def compare(
    store: Store, run_id: str, replay: Replay, tokens: Tokens, estimates: dict[str, Estimates]
) -> dict[str, dict[str, float]]:
    """Judge every estimate on both sides of the split; all rows go to `diagnostics`, the held-out ones are returned."""
    rows, table = [], {}
    for split, mask in (("train", ~replay.held_out_rows), ("held_out", replay.held_out_rows)):
        for critic in estimates if mask.any() else ():
            table[critic] = judge(estimates[critic], replay, tokens, mask)
            row = {"run_id": run_id, "suite": "fit", "split": split, "group": critic, "n": int(mask.sum())}
            rows += [{**row, "name": k, "value": None if np.isnan(v) else v} for k, v in table[critic].items()]
    store.append("diagnostics", rows)
    return table


def _episode_ids(replay: Replay) -> pa.Array:
    return pa.array(replay.episode_ids, pa.string()).take(pa.array(replay.episode_of))


def _nullable(x: Array) -> pa.Array:
    return pa.array(x, from_pandas=True)  # NaN is "unknown": null in SQL
