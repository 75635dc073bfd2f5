"""What an actor learns from, out of the store: a critic's values, outcomes, and the agent's own log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import duckdb
import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.models import acting
from offline_lm.store import Store
from offline_lm.types import Logged

Array = np.ndarray

_NEWEST_CRITIC = """
    SELECT run_id
    FROM runs
    WHERE status = 'finished' AND run_id IN (SELECT run_id FROM "values")
    ORDER BY written_at DESC, run_id
    LIMIT 1
"""


def fitting_run(cfg: DictConfig, gamma: float) -> str:
    """The run that `actor.critic` names; latest: the newest finished one that has values.

    Raises:
        UserError: none has, its values are of another discount, or it was trained on tasks that are held out here.
    """
    store = Store.open(cfg.data.store)
    with store.connect() as db:
        if cfg.actor.critic == "latest":
            found = db.execute(_NEWEST_CRITIC).fetchone()
            if found is None:
                raise UserError(
                    "actor.critic=latest: no finished run has values; actor.critic=null trains a critic first"
                )
            (run_id,) = found
        else:
            run_id = store.resolve_run(cfg.actor.critic)
        ((recorded,),) = db.execute("SELECT config FROM runs WHERE run_id = ?", [run_id]).fetchall()
    own = OmegaConf.create(yaml.safe_load(recorded))
    wanted = {"algo.gamma": gamma} | {
        key: OmegaConf.select(cfg, key) for key in ("seed", "data.held_out", "data.where")
    }
    for key, value in wanted.items():
        if (found := OmegaConf.select(own, key)) != value:
            raise UserError(f"actor.critic={run_id}: it was trained with {key}={found}, and this is {key}={value}")
    return run_id


def read_logged(
    db: duckdb.DuckDBPyConnection, replay: Replay, tokens: Tokens, critic_run: str | None, needs: str = "v"
) -> Logged:
    """The steps of `replay` with what the values of a run say of them; NaN where they say nothing.

    Raises:
        UserError: the run has no values of these steps, or no Q where `needs` is "q".
    """
    n = len(replay)
    v, q, of_response = np.full(n, np.nan), np.full(n, np.nan), np.full(len(tokens.response_ptr) - 1, np.nan)
    if critic_run is not None:
        at = {key: i for i, key in enumerate(zip(_ids(replay), replay.step.tolist(), strict=True))}
        found = db.execute("SELECT episode_id, step, v, q FROM run_values WHERE run_id = ?", [critic_run]).fetchall()
        for episode, step, value, action in found:
            if (i := at.get((str(episode), step))) is not None:
                v[i], q[i] = (np.nan if x is None else x for x in (value, action))
        if np.isnan(v).all():
            raise UserError(f"actor.critic={critic_run}: that run has no values of the selected steps")
        if needs == "q" and np.isnan(q).all():
            raise UserError(f"actor.critic={critic_run}: that run has no Q; name one of iql_lm, q_mc ...")
        listed = db.execute(
            "SELECT episode_id, step, candidate, q FROM candidate_values WHERE run_id = ?", [critic_run]
        ).fetchall()
        for episode, step, candidate, action in listed:
            i = at.get((str(episode), step))
            if i is None or action is None:
                continue
            if (candidate := tokens.candidate_ptr[i] + candidate) < tokens.candidate_ptr[i + 1]:
                of_response[tokens.candidate_branch[candidate]] = action
    acted = replay.acted & tokens.acted & tokens.usable
    logged_branch = tokens.branch_ptr[:-1][acted]
    of_response[logged_branch] = np.where(np.isnan(q[acted]), of_response[logged_branch], q[acted])
    _, task = np.unique(replay.tasks, return_inverse=True)
    _, page = np.unique(np.stack([task[replay.episode_of], tokens.page]), axis=1, return_inverse=True)
    rewards = np.where(replay.acted, replay.reward, 0.0)
    outcome = np.add.reduceat(rewards, replay.offsets[:-1])
    outcome[np.isnan(replay.returns[replay.offsets[:-1]])] = np.nan  # cut off, and what it came to is not known
    columns = {
        "offsets": replay.offsets, "reward": replay.reward, "continues": 1.0 - replay.terminated,
        "returns": replay.returns, "acted": acted, "bootstrap_mask": replay.bootstraps & acted, "v": v, "q": q,
        "outcome": outcome, "task": task, "page": page, "response_q": of_response,
        "response_of": np.repeat(np.arange(n), np.diff(tokens.branch_ptr)),
    }  # fmt: skip
    return Logged(**{name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in columns.items()})


def training_side(logged: Logged, replay: Replay) -> Logged:
    """Without the outcomes of held-out tasks, so that no mean or spread over the logs is made of them."""
    held_rows, held = torch.from_numpy(replay.held_out_rows), torch.from_numpy(replay.held_out)
    return replace(
        logged,
        acted=logged.acted & ~held_rows,
        returns=logged.returns.masked_fill(held_rows, torch.nan),
        outcome=logged.outcome.masked_fill(held, torch.nan),
    )


def judged_rows(replay: Replay, acted: Array, most: int) -> Array:
    """int64: rows of the held-out side (or the only one) with a response, the first so many."""
    side = replay.held_out_rows if replay.held_out.any() else np.ones(len(replay), bool)
    return np.flatnonzero(acted & side)[:most]


def complete(db: duckdb.DuckDBPyConnection, replay: Replay) -> Array:
    """bool [N]: whether the candidates of a step are known to be all that could be done there."""
    found = db.sql("SELECT episode_id, step FROM steps WHERE candidates_complete").fetchall()
    said = {(str(episode), step) for episode, step in found}
    return np.array([key in said for key in zip(_ids(replay), replay.step.tolist(), strict=True)], bool)


def _ids(replay: Replay) -> list[str]:
    return [replay.episode_ids[e] for e in replay.episode_of]


def logged_logprobs(db: duckdb.DuckDBPyConnection, replay: Replay, tokens: Tokens, branches: Array) -> Array:
    """float32 [T]: what `steps.response_logprobs` says of the tokens of these logged responses.

    Raises:
        UserError: a response whose log-probabilities were not logged for these very tokens.
    """
    rows = np.searchsorted(tokens.branch_ptr, branches, side="right") - 1
    found = {
        (str(episode), step): (values, ids)
        for episode, step, values, ids in db.execute(
            "SELECT episode_id, step, response_logprobs, response_token_ids FROM steps"
            " WHERE response_logprobs IS NOT NULL AND response_token_ids IS NOT NULL"
        ).fetchall()
    }
    out = []
    for row, branch, size in zip(rows.tolist(), branches.tolist(), acting.lengths(tokens, branches), strict=True):
        episode, step = replay.episode_ids[replay.episode_of[row]], int(replay.step[row])
        values, ids = found.get((episode, step), ([], [])) if branch == tokens.branch_ptr[row] else ([], [])
        if len(values) != size or ids != tokens.response(branch).tolist():
            raise UserError(
                f"actor.behaviour=logged: step {step} of episode {episode} has {len(values)} logged log-probabilities,"
                f" where these {size} tokens are trained on; actor.behaviour=start computes them"
            )
        out.append(values)
    return np.concatenate(out).astype(np.float32)
