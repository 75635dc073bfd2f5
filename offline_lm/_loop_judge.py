"""What a round of `loop` is judged by: success, values held against outcomes, the distance to the logs' policy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import duckdb
import numpy as np

from offline_lm.envs.policies import Choice, Policy, State, Turn
from offline_lm.models.critic import Critic
from offline_lm.ope import clustered
from offline_lm.ope.estimators import interval, resampled

Array = np.ndarray
NAN = float("nan")

_FIRST_PAGES = """
    SELECT e.episode_id, coalesce(e.task_id, e.goal, e.episode_id), e.goal, s.url, s.observation, r."return"
    FROM (SELECT * FROM episodes WHERE {where}) AS e
    JOIN steps AS s USING (episode_id)
    JOIN discounted_returns($gamma) AS r ON r.episode_id = s.episode_id AND r.step = s.step
    WHERE s.step = 0 AND s.observation IS NOT NULL AND r."return" IS NOT NULL
    ORDER BY e.episode_id
"""

_DECISIONS = """
    WITH decisions AS (
        SELECT
            e.episode_id, s.step, e.task_id, e.goal, s.url, s.observation, s.action, s.behavior_logprob, s.candidates,
            s.candidates_complete,
            s.action_grammar,
            coalesce(list({{'observation': s.observation, 'action': s.action, 'url': s.url, 'error': s.action_error}})
                OVER (PARTITION BY e.episode_id ORDER BY s.step ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), [])
                AS turns
        FROM (SELECT * FROM episodes WHERE {where}) AS e
        JOIN steps AS s USING (episode_id)
        WHERE NOT s.is_final_observation
    )
    SELECT task_id, goal, url, observation, action, behavior_logprob, candidates, turns,
        action_grammar
    FROM decisions
    WHERE candidates_complete AND len(candidates) > 0 AND observation IS NOT NULL
        AND list_contains(list_transform(candidates, lambda c: c.action), action) AND behavior_logprob IS NOT NULL
        AND NOT list_contains(list_transform(turns, lambda t: t.action IS NULL OR t.observation IS NULL), true)
    ORDER BY md5(concat_ws('/', episode_id, step))
    LIMIT $most
"""


class Figure(NamedTuple):
    """A number with its interval, and of how many it is made; NaN where there is none."""

    value: float
    low: float = NAN
    high: float = NAN
    n: int | None = None


def success(db: duckdb.DuckDBPyConnection, where: str, resamples: int) -> Figure:
    """The share of the episodes that succeeded, of those of which it is known (a crash is none)."""
    rows = db.sql(
        f"SELECT success FROM episodes WHERE ({where}) AND success IS NOT NULL ORDER BY episode_id"
    ).fetchall()
    return mean(np.array([float(won) for (won,) in rows]), resamples)


def mean(x: Array, resamples: int) -> Figure:
    """Of independent x [n], with the percentile bootstrap's 95 % interval (Efron 1979)."""
    if not len(x):
        return Figure(NAN, n=0)
    return Figure(*interval(resampled(len(x), resamples) @ x / len(x)), n=len(x))


def calibration(
    critic: Critic, db: duckdb.DuckDBPyConnection, where: str, gamma: float, resamples: int
) -> dict[str, Figure]:
    """V of the episodes' first pages, held against what came of them.

    Returns:
        v_first, return_first: means, of V and of the discounted return.
        v_error: the mean of V less the return, above 0 where the critic promises too much.
        calibration_error: expected calibration error, as `clustered.calibration` measures it, with its 99 % interval;
            NaN of fewer than `clustered.TASKS` episodes.
    """
    rows = db.execute(_FIRST_PAGES.format(where=where), {"gamma": gamma}).fetchall()
    states = [{"goal": goal, "url": url, "observation": page} for _, _, goal, url, page, _ in rows]
    v = np.array([score.v for score in critic.score(states)])
    returns = np.array([row[-1] for row in rows], np.float64)
    cluster = clustered.clusters(np.array([row[1] for row in rows]), np.array([row[0] for row in rows]))
    # as many bins as hold enough clusters each, of which fewer count as 0
    bins = min(5, len(np.unique(cluster)) // clustered.TASKS)
    error = Figure(*clustered.calibration(v, returns, cluster, bins) if bins else (NAN,), n=len(rows))
    return {
        "v_first": mean(v, resamples),
        "return_first": mean(returns, resamples),
        "v_error": mean(v - returns, resamples),
        "calibration_error": error,
    }


def kl_to_logs(policy: Policy, db: duckdb.DuckDBPyConnection, where: str, most: int) -> Figure:
    """KL(policy || the logs' policy) in nats, its mean over steps of the logs, at most so many of them.

    Those steps count where the log says what could be done, and how likely what was done was. Where it gives the
    probability of all candidates, the sum over them is taken; else w log w, with w = p(a) / behaviour(a) for the logged
    a, which has the same mean. What the logs' policy cannot do is not counted: the KL would be infinite.
    """
    rows = db.execute(_DECISIONS.format(where=where), {"most": most}).fetchall()
    states = [
        State(
            goal or "", page, tuple(dict.fromkeys(c["action"] for c in candidates)), np.random.default_rng(0), url,
            tuple(turn["action"] for turn in turns), task or "", tuple(Turn(**turn) for turn in turns), grammar or "",
        )
        for task, goal, url, page, _, _, candidates, turns, grammar in rows
    ]  # fmt: skip
    choices = policy.act(states) if states else []
    found = [
        _divergence(choice, action, behaviour, {c["action"]: c["logprob"] for c in candidates})
        for choice, (_, _, _, _, action, behaviour, candidates, *_) in zip(choices, rows, strict=True)
    ]
    known = [x for x in found if x is not None]
    return Figure(float(np.mean(known)) if known else NAN, n=len(known))


def _divergence(choice: Choice, action: str, behaviour: float, logged: dict[str, float | None]) -> float | None:
    """See `kl_to_logs`; None where the policy has no probabilities, or does what the logs' policy cannot."""
    if not choice.complete:
        return None
    own = {c.action: c.logprob for c in choice.candidates if c.logprob is not None}
    if all(logprob is None for logprob in logged.values()):
        if action not in own:
            return 0.0
        log_w = own[action] - behaviour
        return math.exp(log_w) * log_w
    total = 0.0
    for name, logprob in own.items():
        other = logged.get(name)
        if other is None:
            return None
        total += math.exp(logprob) * (logprob - other)
    return total


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans (begin, seconds) was under way."""
    total, until = 0.0, -math.inf
    for begin, seconds in sorted(spans):
        total += max(0.0, begin + seconds - max(begin, until))
        until = max(until, begin + seconds)
    return total
