"""Value functions in SQL: `v_value` and `q_value` read texts with the critic of a run, wherever SQL has texts.

    v_value(run, goal, observation [, url] [, history])            V(s), DOUBLE
    q_value(run, goal, observation, action [, url] [, history])    Q(s, a), the least of the ensemble, DOUBLE
    scored_steps(run)                                              table (episode_id, step, v, q) of every stored step

`run` is a run id, latest, or the folder of a run; `history` the past actions, oldest first. The optional arguments may
be named: `history := h`. Null in, null out; null too for Q of a critic that has none, and for a state too long to read.

Rows come as whole vectors (at most 2,048), are merged where they ask about the same state, packed and encoded together.
Torch and the critic are loaded when the first row comes. A call in both WHERE and SELECT is evaluated twice: from
memory where its rows are among the last `KEPT`, else anew. Once is enough, however many rows there are, in
`WITH scored AS MATERIALIZED (SELECT ..., v_value(...) AS v ...)`.
"""

from __future__ import annotations

import atexit
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import orjson
import pyarrow as pa

from offline_lm.errors import UserError
from offline_lm.store import Store

if TYPE_CHECKING:
    from offline_lm.models.critic import Critic

KEPT = 2**16
"""Scores that a connection remembers."""

_FIELDS = {
    **dict.fromkeys(("goal", "start_url", "url", "observation", "messages", "observation_error"), "VARCHAR"),
    "history": "VARCHAR[]",
    **dict.fromkeys(("action", "response", "tokenizer_id"), "VARCHAR"),
    **dict.fromkeys(("prompt_token_ids", "response_token_ids"), "INTEGER[]"),
}
_STATE = f"STRUCT({', '.join(f'{name} {kind}' for name, kind in _FIELDS.items())})"
_SCORE = pa.struct({"v": pa.float64(), "q": pa.float64()})


def _state(**given: str) -> str:
    """SQL of a state with these fields, the others null."""
    return "{" + ", ".join(f"{name}: ({given.get(name, 'NULL')})::{kind}" for name, kind in _FIELDS.items()) + "}"


_TEXTS = {name: name for name in ("goal", "url", "observation", "history")}
_STEP = {name: f"s.{name}" for name in _FIELDS if name not in ("goal", "start_url", "history")}
_MACROS = f"""
CREATE MACRO v_value(run, goal, observation, url := NULL, history := NULL) AS
    critic_score(run, CASE WHEN goal IS NOT NULL AND observation IS NOT NULL THEN {_state(**_TEXTS)} END).v;

CREATE MACRO q_value(run, goal, observation, action, url := NULL, history := NULL) AS
    critic_score(
        run,
        CASE WHEN goal IS NOT NULL AND observation IS NOT NULL AND action IS NOT NULL
        THEN {_state(**_TEXTS, action="action")} END
    ).q;

-- What `fit` reads: every text of a step, and as its history what the episode's earlier steps did.
CREATE MACRO scored_steps(run) AS TABLE
    WITH seen AS (
        SELECT s.episode_id, s.step, {_state(goal="e.goal", start_url="e.start_url", history="past", **_STEP)} AS state
        FROM (
            SELECT *, list(coalesce(nullif(action, ''), response)) FILTER (action IS NOT NULL OR response IS NOT NULL)
                OVER (PARTITION BY episode_id ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS past
            FROM steps
        ) AS s
        JOIN episodes AS e USING (episode_id)
    ),
    scored AS (SELECT episode_id, step, critic_score(run, state) AS score FROM seen)
    SELECT episode_id, step, score.v AS v, score.q AS q FROM scored;
"""

_scorer = ThreadPoolExecutor(1, "critic")
"""DuckDB calls from threads of its own, and torch would start a team of threads for each: one does all the work."""
_registered: weakref.WeakSet[duckdb.DuckDBPyConnection] = weakref.WeakSet()


def register(db: duckdb.DuckDBPyConnection, store: Store) -> None:
    """Give a connection to `store` the functions above. Imports neither torch nor the critic."""
    reader = _Reader(store)
    db.create_function(
        "critic_score", reader.scores, ["VARCHAR", _STATE], "STRUCT(v DOUBLE, q DOUBLE)",  # pyright: ignore
        type="arrow", null_handling="special",  # pyright: ignore
    )  # fmt: skip
    db.execute(_MACROS)
    _registered.add(db)


@atexit.register
def _close() -> None:
    """A connection with a function that is still open when Python ends makes DuckDB print what it leaked."""
    for db in list(_registered):
        db.close()


class _Reader:
    """What one connection knows: which folder a run is, and the scores of the rows that came last."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folders: dict[str, Path] = {}
        self.known: OrderedDict[bytes, tuple[float | None, float | None]] = OrderedDict()

    def scores(self, runs: pa.ChunkedArray, states: pa.ChunkedArray) -> pa.Array:
        """(v, q) of every row; called by DuckDB.

        Raises:
            UserError: no such run, no critic in its folder, or one that reads more of the past than SQL gives. DuckDB
                passes its text on.
        """
        return _scorer.submit(self._scores, runs, states).result()

    def _scores(self, runs: pa.ChunkedArray, states: pa.ChunkedArray) -> pa.Array:
        named, rows = runs.to_pylist(), states.to_pylist()
        keys = [
            None if run is None or row is None else sha256(orjson.dumps([run, row])).digest()
            for run, row in zip(named, rows, strict=True)
        ]
        new = {key: i for i, key in enumerate(keys) if key is not None and key not in self.known}
        for run in dict.fromkeys(named[i] for i in new.values()):
            mine = [key for key, i in new.items() if named[i] == run]
            critic, asked = self._critic(run), [rows[new[key]] for key in mine]
            if critic.rendering["context"] == "turns" and any(row["history"] for row in asked):
                raise UserError(
                    f"run {run} reads whole past turns (data.context=turns), and `history` in SQL is actions alone:"
                    ' use `python -m offline_lm.score`; stored steps have their values in the table "values"'
                )
            found = critic.score_chunk(asked)
            for key, score in zip(mine, found, strict=True):
                self.known[key] = (None, None) if score is None else (score.v, score.q[0] if score.q else None)
        out = [(None, None) if key is None else self.known[key] for key in keys]
        self._forget(keys)
        return pa.array([{"v": v, "q": q} for v, q in out], _SCORE)

    def _critic(self, run: str) -> Critic:
        from offline_lm.models.critic import find_run

        if run not in self.folders:  # found once: `latest` stays the same run for as long as the connection lives
            self.folders[run] = find_run(run, self.store.url)
        folder = self.folders[run]
        file = folder / "critic.json"
        return _load(folder, file.stat().st_mtime_ns if file.exists() else 0)

    def _forget(self, used: Sequence[Any]) -> None:
        for key in used:
            if key is not None:
                self.known.move_to_end(key)
        while len(self.known) > KEPT:
            self.known.popitem(last=False)


@lru_cache(maxsize=2)
def _load(folder: Path, written: int) -> Critic:
    """The critic in a folder, loaded once for as long as it stays as `written`."""
    from offline_lm.models import devices
    from offline_lm.models.critic import Critic

    critic = Critic.from_pretrained(folder)
    device = devices.device("auto")
    critic.model.to(device)
    critic.heads.to(device)
    return critic
