"""Replay: the steps that a run trains on, selected in SQL, as flat arrays; and batches of whole episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch

from offline_lm.batches.pack import packed_lengths
from offline_lm.batches.sampling import Sampler, rows_of, uniform
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.losses.returns import bootstrap_mask, discounted_returns

Array = np.ndarray

_SELECTED = """
    SELECT s.episode_id, s.step, {columns}
    FROM steps AS s
    JOIN (SELECT * FROM episodes WHERE {where}) AS e USING (episode_id)
    LEFT JOIN transitions AS t USING (episode_id, step)
    ORDER BY s.episode_id, s.step
"""
_NUMBERS = """
    coalesce(e.task_id, e.goal, e.episode_id) AS task, s.is_final_observation AS final,
    s.action IS NOT NULL OR s.response IS NOT NULL AS acted,
    t.reward, coalesce(t.terminated, false) AS terminated,
    coalesce(t.truncated, false) AS truncated, coalesce(t.outcome_known, false) AS outcome_known,
    e.success, e.outcome_reward
"""
STEP_COLUMNS = """
    e.goal, e.start_url, s.url, s.observation, s.messages, s.observation_error, s.response, s.action,
    s.candidates, s.tokenizer_id, s.prompt_token_ids, s.response_token_ids
"""


@dataclass(frozen=True)
class Replay:
    """N steps of E episodes end to end; a final observation, where logged, is an episode's last row.

    Attributes:
        offsets: int64 [E+1]; the rows of episode e are `offsets[e]:offsets[e+1]`.
        step: int64 [N], as in the store.
        tasks: [E] what an episode is grouped and split by: its task_id, else its goal, else itself.
        acted: bool [N].
        reward: float64 [N], NaN where not logged, 0 at final observations.
        terminated: bool [N].
        returns: float64 [N]: G_t, NaN where it is unknown (DESIGN section 3).
        bootstraps: bool [N]: whether a one-step target exists.
        success: float64 [E]: 0 or 1, the outcome where only that is known, or NaN.
        held_out: bool [E].
    """

    episode_ids: list[str]
    offsets: Array
    step: Array
    tasks: list[str]
    acted: Array
    reward: Array
    terminated: Array
    returns: Array
    bootstraps: Array
    success: Array
    held_out: Array

    def __len__(self) -> int:
        return len(self.step)

    @property
    def episode_of(self) -> Array:
        """int64 [N]: the episode of every row."""
        return np.repeat(np.arange(len(self.episode_ids)), np.diff(self.offsets))

    @property
    def held_out_rows(self) -> Array:
        return self.held_out[self.episode_of]

    @property
    def steps_to_end(self) -> Array:
        """int64 [N]: rows of the same episode behind this one."""
        return self.offsets[1:][self.episode_of] - 1 - np.arange(len(self))


def select(
    db: duckdb.DuckDBPyConnection, *, where: str, gamma: float, truncated: str, held_out: float, seed: int
) -> Replay:
    """The steps of the episodes for which the SQL condition `where` holds.

    Args:
        where: over the columns of the view `episodes`.
        truncated: what a step limit means for returns: `outcome` (the limit is part of the task, the return ends in
            the labelled outcome) or `unknown` (the return of a truncated episode is masked).
        held_out: share of *tasks* kept for evaluation, drawn with `seed` (trap 14).

    Raises:
        UserError: a condition that is not SQL, that selects nothing, or an empty store.
    """
    with explained(where):
        table = _query(db, _NUMBERS, where).to_arrow_table()
    if table.num_rows == 0:
        ((total,),) = db.sql("SELECT count(*) FROM episodes").fetchall()
        if total == 0:
            raise UserError("the store holds no episodes: run `python -m offline_lm.ingest path=LOGS` first")
        raise UserError(f"data.where={where!r} selects none of the store's {total} episodes")
    column = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    first = np.flatnonzero(np.r_[True, column["episode_id"][1:] != column["episode_id"][:-1]])
    offsets = np.r_[first, table.num_rows].astype(np.int64)
    final = column["final"].astype(bool)
    reward = np.where(final, 0.0, column["reward"].astype(np.float64))
    terminated, cut, known = (column[n].astype(bool) for n in ("terminated", "truncated", "outcome_known"))

    # Returns run over all rows; a final observation adds nothing. An unknown outcome makes the reward unknown.
    cut_off = cut & ~(known & (truncated == "outcome"))
    continues = torch.from_numpy((~terminated).astype(np.float64))
    torch_offsets = torch.from_numpy(offsets)
    labelled = torch.from_numpy(np.where(cut_off, np.nan, reward))
    returns = discounted_returns(labelled, continues, torch_offsets, gamma=gamma)
    returns = np.where(final, np.nan, returns.numpy())

    tasks = [str(t) for t in column["task"][first]]
    success, outcome = (column[name][first].astype(np.float64) for name in ("success", "outcome_reward"))
    return Replay(
        episode_ids=[str(e) for e in column["episode_id"][first]],
        offsets=offsets,
        step=column["step"].astype(np.int64),
        tasks=tasks,
        acted=column["acted"].astype(bool) & ~final,
        reward=reward,
        terminated=terminated,
        returns=returns,
        bootstraps=bootstrap_mask(continues, torch_offsets).numpy() & ~final & ~np.isnan(reward),
        success=np.where(np.isnan(success), outcome, success),
        held_out=split(tasks, held_out, seed),
    )


def split(tasks: list[str], share: float, seed: int) -> Array:
    """bool [E]: episodes of held-out tasks. Every episode of a task is on one side; a single task is never held out."""
    names = sorted(set(tasks))
    n = min(round(share * len(names)) or (share > 0), len(names) - 1)
    drawn = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[: int(n)]}
    return np.array([t in drawn for t in tasks], dtype=bool)


def steps(db: duckdb.DuckDBPyConnection, where: str, episodes: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The text of the same rows in the same order, as `tokens.tokenize` takes them, streamed.

    Args:
        episodes: ids of the only episodes that are wanted.
    """
    if episodes is not None:
        db.register("wanted_episodes", pa.table({"episode_id": pa.array(episodes, pa.string())}))
        where = f"({where}) AND episode_id IN (SELECT episode_id FROM wanted_episodes)"
    try:
        for batch in _query(db, STEP_COLUMNS, where).to_arrow_reader(1024):
            yield from batch.to_pylist()
    finally:
        if episodes is not None:
            db.unregister("wanted_episodes")


def _query(db: duckdb.DuckDBPyConnection, columns: str, where: str) -> duckdb.DuckDBPyRelation:
    return db.sql(_SELECTED.format(columns=columns, where=where))


@contextmanager
def explained(where: str, key: str = "data.where") -> Iterator[None]:
    """Turns an error of DuckDB into a UserError about the condition `where`, which the user gave as `key`."""
    try:
        yield
    except (duckdb.ProgrammingError, duckdb.DataError) as error:
        reason = str(error).split("\n\nLINE ")[0]  # DuckDB goes on with our own query and a caret
        raise UserError(
            f"{key}={where!r} is not a condition over the view `episodes`: {' '.join(reason.split())}"
        ) from error


def episode_batches(
    replay: Replay, size: int, seed: int, *, draws: Sampler | None = None, start: int = 0
) -> Iterator[Array]:
    """Endless batches of at least `size` rows: whole training episodes, by default shuffled anew in every epoch.

    Rows of an episode stay together and in order, so that V(s_{t+1}) is the next row of the batch.

    Args:
        draws: which episodes; `seed` is not used then.
        start: the step of the first batch. The batch of a step depends on nothing else.
    """
    draws = draws or uniform(~replay.held_out, seed)
    for episodes in draws.batches(np.diff(replay.offsets), at_least=size, start=start):
        yield rows_of(replay.offsets, episodes)


def token_batches(
    replay: Replay, tokens: Tokens, budget: int, seed: int, *, candidates: bool = False,
    draws: Sampler | None = None, start: int = 0,
) -> Iterator[Array]:  # fmt: skip
    """Endless batches of rows for training through the backbone: whole training episodes of `budget` tokens together.

    Tokens are counted as they are packed, each state's prompt with its logged action (or all its `candidates`), and
    what prompts of an episode share once. A batch ends before the episode that would exceed the budget, and an episode
    that alone exceeds it is a batch of its own. Else, and `draws` and `start`, as in `episode_batches`.
    """
    if candidates:
        said = np.diff(tokens.response_ptr[tokens.branch_ptr])
    else:
        said = np.zeros(len(tokens), np.int64)
        said[tokens.acted] = np.diff(tokens.response_ptr)[tokens.branch_ptr[:-1][tokens.acted]]
    lengths, shared = packed_lengths(tokens, np.arange(len(tokens)), said)
    shared[replay.offsets[:-1]] = 0
    sizes = np.add.reduceat(lengths - shared, replay.offsets[:-1])
    draws = draws or uniform(~replay.held_out, seed)
    for episodes in draws.batches(sizes, at_most=budget, start=start):
        yield rows_of(replay.offsets, episodes)
