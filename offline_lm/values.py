"""What a run writes back beside the steps: `values`, `candidate_values`, `diagnostics` of its estimates, and alarms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.ope import alarms, leaks
from offline_lm.ope.alarms import Alarm
from offline_lm.ope.clustered import Measured
from offline_lm.ope.diagnostics import Estimates, by_part, intervals, judge, td_errors
from offline_lm.store import Store
from offline_lm.types import Estimand

Array = np.ndarray

_NAMED = """
    SELECT c.run_id, s.episode_id, s.step, c.candidate, s.candidates[c.candidate + 1].action AS action, c.q, c.executed
    FROM scored AS c
    JOIN steps AS s USING (episode_id, step)
    ORDER BY s.episode_id, s.step, c.candidate
"""

_STATED = """
    WITH said AS (
        SELECT DISTINCT
            number,
            unnest(list_transform(
                regexp_extract_all(concat_ws(chr(10), observation, messages), $pattern), lambda x: lower(x)
            )) AS phrase
        FROM steps
        JOIN asked_episodes USING (episode_id)
        WHERE NOT is_final_observation
    )
    SELECT phrase, list(number ORDER BY number)
    FROM said
    GROUP BY phrase
    HAVING count(*) >= $fewest
    ORDER BY phrase
"""


def values(run_id: str, replay: Replay, tokens: Tokens, estimates: Estimates, gamma: float) -> pa.Table:
    """Rows of the table `values`, one for every step and final observation; what is unknown is null.

    q is the least of the ensemble. td_error is r + gamma * continue * V(s') - V(s); advantage is q - v, or the TD error
    for a critic of states alone.
    """
    n = len(replay)
    v = np.where(tokens.usable, estimates.v, np.nan)
    td = td_errors(v, replay, gamma)
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


def stated_rewards(db: duckdb.DuckDBPyConnection, episodes: Sequence[str]) -> dict[str, Array]:
    """Phrases that state a reward (`leaks.REWARD_WORDS`) on pages before an action: the numbers of their episodes.

    Phrases of fewer than `leaks.FEWEST` of the `episodes` are left out.
    """
    with db.cursor() as cursor:
        numbered = pa.table({"episode_id": pa.array(episodes, pa.string()), "number": np.arange(len(episodes))})
        cursor.register("asked_episodes", numbered)
        found = cursor.execute(_STATED, {"pattern": leaks.REWARD_WORDS, "fewest": leaks.FEWEST}).fetchall()
    return {phrase: np.array(numbers) for phrase, numbers in found}


def compare(
    store: Store, run_id: str, replay: Replay, tokens: Tokens, estimates: dict[str, Estimates], *, gamma: float,
    extra: Mapping[str, float] | None = None, site: Array | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Judge every estimate on both sides of the split; the held-out side is returned, or the only one.

    In the table `diagnostics`: suite `fit`, a row for each number of each of the `estimates`; suite `parts`, numbers of
    the first, the run's own, by turn, site and steps to the end, the part in `extra`.

    Args:
        extra: numbers of the run's own critic that were measured elsewhere.
        site: [E], None where not logged.
    """
    rows, table = [], {}
    for split, mask in (("train", ~replay.held_out_rows), ("held_out", replay.held_out_rows)):
        for i, critic in enumerate(estimates if mask.any() else ()):
            row = {"run_id": run_id, "split": split, "group": critic}
            table[critic] = judge(estimates[critic], replay, tokens, mask, gamma=gamma)
            if i == 0:
                table[critic] |= extra or {}
                parts = by_part(estimates[critic], replay, tokens, mask, gamma=gamma, site=site)
                rows += [
                    {**row, "suite": "parts", "name": k, "value": _null(v), "n": n, "extra": json.dumps(part)}
                    for k, v, n, part in parts
                    if n
                ]
            row |= {"suite": "fit", "n": int(mask.sum())}
            rows += [{**row, "name": k, "value": _null(v)} for k, v in table[critic].items()]
    store.append("diagnostics", rows)
    return table


def log_alarms(db: duckdb.DuckDBPyConnection, replay: Replay, tokens: Tokens) -> list[Alarm]:
    """What the logs of a selection give away (`alarms.of_logs`)."""
    told = leaks.telling(stated_rewards(db, replay.episode_ids), replay.success, replay.tasks)
    return alarms.of_logs(told, leaks.shared_starts(replay, tokens), leaks.both_sides(replay))


def critic_alarms(
    store: Store, run_id: str, replay: Replay, tokens: Tokens, estimates: dict[str, Estimates],
    table: dict[str, dict[str, float]], of_logs: Sequence[Alarm], *, estimand: Estimand,
) -> tuple[dict[str, Measured], list[Alarm]]:  # fmt: skip
    """What is compared of the run's own critic, with intervals, and all alarms, those of its logs at the end.

    In the table `diagnostics`: suites `intervals` and `alarms`; sentence and threshold of an alarm stand in `extra`.

    Args:
        estimates, table: as `compare` took and returned them.
        estimand: what the run's algorithm estimates.
    """
    held_out = bool(replay.held_out.any())
    mask = replay.held_out_rows if held_out else np.ones(len(replay), bool)
    critic, own = next(iter(estimates.items()))
    baselines = {k: v for k, v in estimates.items() if k in ("q_mc", "position_only") and k != critic}
    found = intervals(own, replay, tokens, mask, baselines)
    raised = alarms.of_critic(critic, table[critic], found, estimand=estimand)
    raised += of_logs
    row = {"run_id": run_id, "split": "held_out" if held_out else "train", "group": critic, "n": int(mask.sum())}
    rows = [
        {**row, "suite": "intervals", "name": k, "value": _null(m.value), "low": _null(m.low), "high": _null(m.high)}
        for k, m in found.items()
    ]
    store.append("diagnostics", rows + alarm_rows(row, raised))
    return found, raised


def alarm_rows(about: Mapping[str, Any], raised: Sequence[Alarm]) -> list[dict[str, Any]]:
    """Rows of the table `diagnostics`, as `analysis/alarms.sql` reads them."""
    rows = []
    for a in raised:
        said = json.dumps({"sentence": a.sentence, "threshold": a.threshold})
        rows.append({**about, "suite": "alarms", "name": a.name, "value": _null(a.value), "extra": said})
    return rows


def _null(x: float) -> float | None:
    return None if np.isnan(x) else x


def _episode_ids(replay: Replay) -> pa.Array:
    return pa.array(replay.episode_ids, pa.string()).take(pa.array(replay.episode_of))


def _nullable(x: Array) -> pa.Array:
    return pa.array(x, from_pandas=True)  # NaN is "unknown": null in SQL
