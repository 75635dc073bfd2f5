"""A critic held against the exact values of a text site: order of actions, V, and the policy that Q would choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from offline_lm.envs.exact import TextMDP
from offline_lm.envs.play import Choose, play_once, play_texts
from offline_lm.ope.diagnostics import kendall, spearman
from offline_lm.types import Estimand

Array = np.ndarray


class Scorer(Protocol):
    """What is judged: `score` of `offline_lm.models.critic.Critic`."""

    def score(self, states: Any) -> Any: ...


def exact(
    critic: Scorer, tasks: Sequence[TextMDP], *, gamma: float, estimand: Estimand, tau: float | None = None
) -> dict[str, float]:
    """Exact-truth scores over *all* states of tasks that the critic has not seen, states weighted by the logs' visits.

    Args:
        gamma: the critic's discount.
        estimand: what its V and Q estimate; tau: the expectile, where it is that.

    Returns:
        kendall: mean over states of Kendall's tau of Q over the candidates against Q*, over pairs that Q* orders;
        hit: share of states whose best candidate by Q is one of the best by Q*;
        spearman_v: rank correlation over states of V with the value that it estimates, mean over tasks and pooled
            (`spearman_v_pooled`);
        rmse_v, rmse_q: root mean squared error of V, and of Q over the actions of a state, against what they estimate;
        sign: share of state-action pairs where Q - V has the sign of the true advantage of what they estimate, over
            pairs where that is not 0;
        behaviour, optimum, greedy: expected return within the step limit of the logs' policies, of the optimal one, and
            of the greedy policy of Q over candidates; gap_recovered: (greedy - behaviour) / (optimum - behaviour);
        greedy_once, gap_once: the same of the greedy policy that does nothing twice on a page (`envs.play.play_once`).
    """
    rows: list[dict[str, float]] = []
    pooled_v: list[Array] = []
    pooled_truth: list[Array] = []
    for task in tasks:
        mixture = task.mixture()
        _, q_star = task.optimal(gamma)
        v_true, q_true = _truth(task, mixture, gamma, estimand, tau)
        visits = np.mean([task.visitation(p) for p in task.behaviours().values()], axis=0)
        v, q = _score(critic, task)
        taus = np.array([kendall(q_star[s, m], q[s, m]) for s, m in enumerate(task.valid)])
        hits = np.array([q_star[s, np.nanargmax(q[s])] >= np.nanmax(q_star[s]) - 1e-9 for s in range(len(q))])
        ordered = ~np.isnan(taus)
        seen = visits > 0
        pooled_v.append(v[seen])
        pooled_truth.append(v_true[seen])
        optimum = task.play(task.greedy(q_star))
        greedy = play_texts(task, _best(critic)) if task.transcripts else task.play(task.greedy(q))
        advantage = q_true - v_true[:, None]
        right = (q > v[:, None]) == (advantage > 0)
        weight = np.broadcast_to(visits[:, None], q.shape)
        decided = task.valid & (np.abs(advantage) > 1e-9)
        q_error = np.nanmean((q - q_true) ** 2, axis=1)
        rows.append({
            "kendall": float(np.average(taus[ordered], weights=visits[ordered])),
            "hit": float(np.average(hits[ordered], weights=visits[ordered])),
            "spearman_v": spearman(v[seen], v_true[seen]),
            "mse_v": float(np.average((v - v_true) ** 2, weights=visits)),
            "mse_q": float(np.average(q_error, weights=visits)),
            "sign": float(np.average(right[decided], weights=weight[decided])),
            "behaviour": float(np.mean([task.play(p) for p in task.behaviours().values()])),
            "optimum": optimum,
            "greedy": greedy,
            "greedy_once": greedy if task.transcripts else play_once(task, q),  # a transcript never reads the same
        })  # fmt: skip
    out = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    out |= {f"rmse_{of}": float(np.sqrt(out.pop(f"mse_{of}"))) for of in "vq"}
    out["spearman_v_pooled"] = spearman(np.concatenate(pooled_v), np.concatenate(pooled_truth))
    for name, policy in (("gap_recovered", "greedy"), ("gap_once", "greedy_once")):
        out[name] = (out[policy] - out["behaviour"]) / (out["optimum"] - out["behaviour"])
    return out


def _best(critic: Scorer) -> Choose:
    """The policy that takes the candidate with the highest Q."""
    return lambda states: [int(np.argmax(score.q)) for score in critic.score(states)]


def _truth(task: TextMDP, mixture: Array, gamma: float, estimand: Estimand, tau: float | None) -> tuple[Array, Array]:
    if estimand == "optimum":
        return task.optimal(gamma)
    if estimand == "behaviour":
        return task.evaluate(mixture, gamma)
    if estimand == "returns":
        return _mean_returns(task, mixture, gamma)
    if tau is None:
        raise ValueError("the expectile of which tau?")
    return task.expectile(mixture, gamma, tau)


def _mean_returns(task: TextMDP, mixture: Array, gamma: float) -> tuple[Array, Array]:
    """V and Q of the logs' policies, each weighted by its visits; of the mixture where none of them comes."""
    v_sum, q_sum, visits, flows = (np.zeros(x.shape) for x in (mixture[:, 0], mixture, mixture[:, 0], mixture))
    for policy in task.behaviours().values():
        v, q = task.evaluate(policy, gamma)
        seen = task.visitation(policy)
        flow = seen[:, None] * policy
        v_sum, visits = v_sum + seen * v, visits + seen
        q_sum, flows = q_sum + flow * np.nan_to_num(q), flows + flow
    v, q = task.evaluate(mixture, gamma)
    v = np.where(visits > 0, v_sum / np.where(visits > 0, visits, 1.0), v)
    return v, np.where(flows > 0, q_sum / np.where(flows > 0, flows, 1.0), q)


def _score(critic: Scorer, task: TextMDP) -> tuple[Array, Array]:
    """V [S] and Q [S, A] of the critic for every state, reached by a shortest path; NaN where no action is."""
    states = [
        {"goal": task.goal, "observation": page, "history": path, "candidates": actions}
        for page, path, actions in zip(task.pages, task.paths, task.actions, strict=True)
    ]
    v, q = np.zeros(len(states)), np.full(task.next.shape, np.nan)
    for s, score in enumerate(critic.score(states)):
        v[s] = score.v
        if score.q is not None:
            q[s, : len(score.q)] = score.q
    return v, q
