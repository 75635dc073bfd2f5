"""What a `Sampler` needs to know of a store: the order of episodes, their sources, and the TD errors of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.sampling import Sampler, episode_priority, sampler
from offline_lm.errors import UserError
from offline_lm.store import Store

Array = np.ndarray

_OF_RUN = """
    SELECT r.row, v.td_error
    FROM asked_rows AS r
    JOIN "values" AS v USING (episode_id, step)
    WHERE v.run_id = ? AND v.td_error IS NOT NULL
"""


def from_store(
    db: duckdb.DuckDBPyConnection, store: Store, replay: Replay, *, seed: int, strategy: str, capacity: int | None,
    mix: Mapping[str, Any] | None, half_life: float, alpha: float, beta: float, td_run: str,
) -> Sampler:  # fmt: skip
    """The sampler of the training side of `replay`, as `conf/data` describes it under `sampling`.

    Args:
        mix: name to share, where the name is a `source` or `policy_id` of episodes; or to {where: SQL over the view
            `episodes`, share}.
        td_run: the run whose TD errors are the priorities of strategy=td.

    Raises:
        UserError: a mix that names nothing, overlaps or does not sum to 1, a source without training episodes, a run
            that does not exist or has no TD error of them.
    """
    training, said = ~replay.held_out, []
    sources, order, priority = None, None, None
    if mix is not None:
        sources = _sources(db, replay, mix)
        none = training & ~np.logical_or.reduce([belongs for _, belongs in sources.values()])
        if none.any():
            said.append(f"mix: {none.sum()} of {training.sum()} training episodes are of no source, and are not drawn")
    if strategy == "recency" or (capacity is not None and training.sum() > capacity):
        order, by = _order(db, store, replay)
        if capacity is not None and training.sum() > capacity:
            said.append(f"capacity={capacity}: the newest of {training.sum()} training episodes, by {by}")
        if strategy == "recency":
            said.append(f"strategy=recency: episodes by {by}")
    if strategy == "td":
        run_id = store.resolve_run(td_run)
        priority = episode_priority(_td_errors(db, replay, run_id), replay.offsets)
        new = int(np.isnan(priority[training]).sum())
        if new == training.sum():
            raise UserError(f"data.sampling.td_run={run_id} has no TD error of the selected training episodes")
        also = f"; {new} that it has not seen have its greatest" if new else ""
        said.append(f"strategy=td: priorities of {run_id}{also}")
    drawn = sampler(
        training, seed, strategy, capacity=capacity, sources=sources, order=order, success=replay.success,
        priority=priority, half_life=half_life, alpha=alpha, beta=beta,
    )  # fmt: skip
    return dataclasses.replace(drawn, said=(*said, *drawn.said))


def _sources(db: duckdb.DuckDBPyConnection, replay: Replay, mix: Mapping[str, Any]) -> dict[str, tuple[float, Array]]:
    number = {episode: i for i, episode in enumerate(replay.episode_ids)}
    out: dict[str, tuple[float, Array]] = {}
    for name, given in mix.items():
        key = f"data.sampling.mix.{name}"
        known = isinstance(given, Mapping) and set(given) == {"where", "share"}
        share = given["share"] if known else given
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise UserError(f"{key}={given}: a share above 0, or {{where: SQL, share: ...}}, is wanted")
        if known:
            with replays.explained(given["where"], f"{key}.where"):
                found = db.sql(f"SELECT episode_id FROM (SELECT * FROM episodes WHERE {given['where']})").fetchall()
        else:
            found = db.execute("SELECT episode_id FROM episodes WHERE ? IN (source, policy_id)", [name]).fetchall()
        belongs = np.zeros(len(number), bool)
        belongs[[number[episode] for (episode,) in found if episode in number]] = True
        if not belongs.any():
            raise UserError(f"{key}: no selected episode is of it; there are {_named(db)}")
        for other, (_, theirs) in out.items():
            if both := int((belongs & theirs).sum()):
                raise UserError(f"{key}: {both} of its episodes are of {other}, too; sources must not overlap")
        out[name] = (float(share), belongs)
    total = sum(share for share, _ in out.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"data.sampling.mix: shares that sum to 1 are wanted, these sum to {total:g}")
    return out


def _named(db: duckdb.DuckDBPyConnection) -> str:
    said = []
    for column in ("source", "policy_id"):
        names = db.sql(f"SELECT DISTINCT {column} FROM episodes WHERE {column} IS NOT NULL ORDER BY 1").fetchall()
        said.append(f"{column} {', '.join(name for (name,) in names[:10])}" if names else f"no {column}")
    return " and ".join(said)


def _order(db: duckdb.DuckDBPyConnection, store: Store, replay: Replay) -> tuple[Array, str]:
    """int64 [E] ascending with time, and what it is taken from: `started_at`, where all have it."""
    started = dict(db.execute("SELECT episode_id, epoch_us(started_at) FROM episodes").fetchall())
    times = [started[episode] for episode in replay.episode_ids]
    if None not in times:
        return np.array(times, np.int64), "started_at"
    place = {episode: i for i, episode in enumerate(ingested(store))}
    missing = f"order of ingest ({times.count(None)} of {len(times)} episodes have no started_at)"
    return np.array([place[episode] for episode in replay.episode_ids], np.int64), missing


def ingested(store: Store) -> list[str]:
    """Episode ids, the oldest commit's first.

    `maintain.compact` keeps the order among the files that it merges; a file too large to be merged with them then
    counts as older than they are.
    """
    if not store.exists("episodes"):
        return []
    url, delta = store.table_url("episodes"), store.delta("episodes", store.pinned.get("episodes"))
    files = pa.table(delta.get_add_actions(flatten=True)).select(["path", "modification_time"]).to_pylist()
    # the snapshot lists the newest first, which orders what was written within a millisecond
    files = sorted(reversed(files), key=lambda file: file["modification_time"])
    tables = (store.read_file("episodes", f"{url}/{file['path']}", ["episode_id"]) for file in files)
    return [episode for table in tables for episode in table["episode_id"].to_pylist()]


def _td_errors(db: duckdb.DuckDBPyConnection, replay: Replay, run_id: str) -> Array:
    """float64 [N], NaN where the run has none."""
    ids = pa.array(replay.episode_ids, pa.string()).take(pa.array(replay.episode_of))
    with db.cursor() as cursor:
        cursor.register("asked_rows", pa.table({"episode_id": ids, "step": replay.step, "row": np.arange(len(replay))}))
        found = cursor.execute(_OF_RUN, [run_id]).fetchnumpy()
    out = np.full(len(replay), np.nan)
    out[found["row"]] = found["td_error"]
    return out
