"""How often the 95 % intervals of off-policy estimates hold the true value, on logs of an exact site.

    python analysis/benchmarks/coverage.py [json=true] [site=shop] [task=0] [logs=200] [episodes=200] [resamples=300]
        [behaviours=skilled-0.4] [q=fqe] [noise=0.1] [errs=0.1] [epsilon=0.1] [gamma=0.95] [seed=0]

Each log holds `episodes` of one task, by `behaviours` in turn (names with commas between, or `all` four of the site).
A judge who errs in a share `errs` of the episodes labels the outcomes, so that rewards are random. The target is
epsilon-greedy for Q*; its value within the step limit is known by dynamic programming.

`fqe` is tabular, fitted on the log itself and again in each resample. Q of `dm`, `dr`, `wdr` and `magic` is `fqe`,
fitted on a second log as long; `noisy`, the true one plus normal noise of deviation `noise`, drawn for each log; or
`exact`. (`dm` does not know how wrong its Q is: at a single start its interval is a point.)

    coverage   share of the logs whose interval holds the value
    width      mean width of the intervals
    bias       mean of the estimates less the value; rmse: root of the mean squared error
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import _measure
import numpy as np

from offline_lm.envs import office, shop
from offline_lm.envs.exact import TextMDP
from offline_lm.ope import estimators

Array = np.ndarray
SITES = {site.BENCHMARK: site for site in (shop, office)}


@dataclass(frozen=True)
class Log:
    """N steps of E episodes end to end; `after` is the next state, -1 behind the last, `behaviour` is b(a|s)."""

    state: Array
    action: Array
    reward: Array
    after: Array
    behaviour: Array
    offsets: Array


def simulate(mdp: TextMDP, policies: list[Array], episodes: int, errs: float, rng: np.random.Generator) -> Log:
    """Episodes by the policies [S, A] in turn, all of them a step at a time. Where the judge errs, r becomes 1 - r."""
    policy = np.stack(policies)[np.arange(episodes) % len(policies)]
    alive, s = np.arange(episodes), np.zeros(episodes, np.int64)
    steps = []
    for t in range(mdp.limit):
        p = policy[alive, s]
        a = (p.cumsum(axis=1) < rng.random((len(alive), 1))).sum(axis=1)
        a = np.minimum(a, p.shape[1] - 1 - (p[:, ::-1] > 0).argmax(axis=1))  # where rounding leaves the sum below 1
        after = mdp.next[s, a]
        wrong = (after < 0) & (rng.random(len(alive)) < errs)
        reward = np.where(wrong, 1 - mdp.reward[s, a], mdp.reward[s, a])
        steps.append((alive, np.full(len(alive), t), s, a, reward, after, p[np.arange(len(alive)), a]))
        alive, s = alive[after >= 0], after[after >= 0]
    episode, t, *columns = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.lexsort((t, episode))
    offsets = np.r_[0, np.cumsum(np.bincount(episode, minlength=episodes))]
    state, action, reward, after, behaviour = (column[order] for column in columns)
    return Log(state, action, reward, after, behaviour, offsets)


def labelled(mdp: TextMDP, errs: float) -> TextMDP:
    """The same task with the reward that the judge gives on average."""
    return replace(mdp, reward=np.where(mdp.next == -1, (1 - 2 * errs) * mdp.reward + errs, mdp.reward))


def value(mdp: TextMDP, policy: Array, gamma: float) -> float:
    """Expected discounted return of a policy [S, A] within the step limit, exactly."""
    by_step = np.diff([mdp.play(policy, limit) for limit in range(mdp.limit + 1)])
    return float(by_step @ gamma ** np.arange(mdp.limit))


def judged(log: Log, target: Array, q: Array, gamma: float) -> estimators.Trajectories:
    """What the estimators take, for a target [S, A] and values Q [S, A]."""
    with np.errstate(divide="ignore"):
        log_ratio = np.log(target[log.state, log.action]) - np.log(log.behaviour)
    q = np.nan_to_num(q)
    return estimators.trajectories(
        log_ratio,
        log.reward,
        (log.after >= 0).astype(float),
        log.offsets,
        gamma=gamma,
        q=q[log.state, log.action],
        v=(target * q).sum(axis=1)[log.state],
    )


def tabular_fqe(mdp: TextMDP, log: Log, target: Array, counts: Array, gamma: float) -> Array:
    """Q [B, S, A] of FQE with a feature for each pair of state and action: the mean target of its logged steps.

    Where a resample does not hold a pair, its value is 0, as with a small ridge. The sites are deterministic, so that
    a pair is followed by one state.
    """
    shape = target.shape
    pair = log.state * shape[1] + log.action
    episode = np.repeat(np.arange(len(log.offsets) - 1), np.diff(log.offsets))
    steps, earned = np.zeros((2, len(log.offsets) - 1, target.size))
    np.add.at(steps, (episode, pair), 1.0)
    np.add.at(earned, (episode, pair), log.reward)
    n = counts @ steps
    reward = np.divide(counts @ earned, n, out=np.zeros_like(n), where=n > 0)
    stays = (mdp.next >= 0).ravel() & (n > 0)
    q = np.zeros_like(reward)
    for _ in range(mdp.limit):
        v = (q.reshape(-1, *shape) * target).sum(axis=2)
        q = reward + gamma * np.where(stays, v[:, mdp.next.ravel()], 0.0)
    return q.reshape(-1, *shape)


def coverage(
    mdp: TextMDP, *, behaviours: str, logs: int, episodes: int, resamples: int, q: str, noise: float, errs: float,
    epsilon: float, gamma: float, seed: int = 0,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """By estimator: coverage, width, bias and rmse; and `value`, the truth, with the mean effective sample size."""
    task = labelled(mdp, errs)
    target = mdp.greedy(mdp.optimal(gamma)[1], epsilon)
    exact, truth = task.evaluate(target, gamma)[1], value(task, target, gamma)
    named = mdp.behaviours()
    policies = list(named.values()) if behaviours == "all" else [named[name] for name in behaviours.split(",")]
    found: dict[str, list[estimators.Interval]] = {}
    sizes = []
    for i in range(logs):
        rng = np.random.default_rng([seed, i])
        log = simulate(mdp, policies, episodes, errs, rng)
        counts = estimators.resampled(episodes, resamples, seed=i)
        model = exact + noise * (q == "noisy") * rng.standard_normal(exact.shape)
        if q == "fqe":
            model = tabular_fqe(mdp, simulate(mdp, policies, episodes, errs, rng), target, counts[:1], gamma)[0]
        t = judged(log, target, model, gamma)
        own = estimators.estimates(t, counts)
        fitted = tabular_fqe(mdp, log, target, counts, gamma)
        own["fqe"] = estimators.interval((fitted[:, 0] * target[0]).sum(axis=1), basic=True)
        for name, each in own.items():
            found.setdefault(name, []).append(each)
        sizes.append(estimators.effective_sample_size(t.weight[:, -1]))
    out = {"value": {"value": truth, "ess": float(np.mean(sizes))}}
    for name, intervals in found.items():
        point, low, high = np.array(intervals).T
        out[name] = {
            "coverage": float(np.mean((low <= truth) & (truth <= high))),
            "width": float(np.nanmean(high - low)),
            "bias": float(np.nanmean(point) - truth),
            "rmse": float(np.sqrt(np.nanmean((point - truth) ** 2))),
        }
    return out


def main(argv: list[str]) -> None:
    given = _measure.arguments(
        argv, site="shop", task="0", logs="200", episodes="200", resamples="300", behaviours="skilled-0.4", q="fqe",
        noise="0.1", errs="0.1", epsilon="0.1", gamma="0.95", seed="0",
    )  # fmt: skip
    site = SITES[given["site"]]
    numbers: dict[str, Any] = {name: int(given[name]) for name in ("logs", "episodes", "resamples", "seed")}
    numbers |= {name: float(given[name]) for name in ("noise", "errs", "epsilon", "gamma")}
    found = coverage(
        site.Task(site.Site.draw(0), int(given["task"])).mdp,
        behaviours=given["behaviours"],
        q=given["q"],
        **numbers,
    )
    if given["json"] == "true":
        print(json.dumps({**found, "versions": _measure.versions("numpy", **given)}))
        return
    truth = found.pop("value")
    print(f"value {truth['value']:.4f}; {given['episodes']} episodes are worth {truth['ess']:.1f} of the target (ESS)")
    print(f"{'':8}{'coverage':>10}{'width':>10}{'bias':>10}{'rmse':>10}")
    for name, row in found.items():
        print(f"{name:8}" + "".join(f"{x:10.4f}" for x in row.values()))
    print(" ".join(["python", os.path.relpath(__file__), *argv]))


if __name__ == "__main__":
    main(sys.argv[1:])
