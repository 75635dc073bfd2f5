"""Which planted faults raise their alarm, and how often sound critics raise any.

    python analysis/benchmarks/alarms.py [json=true] [clean=200] [faults=all] [seeds=1] [tasks=50] [pool=120]

Critics are made of the exact values of `envs.shop` tasks, seen through noise: for each run `tasks` tasks of a pool of
`pool` are trained on and as many held out, 4 episodes each. A sound critic is a regression on what it sees of the
truth, which leaves it mediocre (AUC 0.55 to 0.9 at mid-episode); it overfits a little; its ensemble disagrees a
little; pages name scores that mean nothing. It is one of `q_mc`, `iql_lm` (the expectile fixed point) and `critic_mc`;
one in four has logs without candidates. A fault breaks one such run. What is counted is whether its own alarm is among
those raised, and in how many sound runs there is any.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import _measure
import duckdb
import numpy as np
import pyarrow as pa

from offline_lm.algos.critic_mc import CriticMC
from offline_lm.algos.iql_lm import IQL
from offline_lm.algos.q_mc import QMC
from offline_lm.algos.sarsa import Sarsa
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.envs.exact import TextMDP
from offline_lm.envs.shop import Site, Task
from offline_lm.ope import alarms, diagnostics, leaks
from offline_lm.ope.diagnostics import Estimates
from offline_lm.types import Estimand
from offline_lm.values import stated_rewards

Array = np.ndarray
GAMMA, TAU, EPISODES = 0.95, 0.8, 4
ESTIMAND: dict[str, Estimand] = {
    "q_mc": QMC.estimand, "iql_lm": IQL.estimand, "critic_mc": CriticMC.estimand, "sarsa": Sarsa.estimand,
}  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """A task with the values of its logs' policies, and of their expectile: V [S], Q [S, A]."""

    mdp: TextMDP
    policies: list[Array]
    behaviour: tuple[Array, Array]
    expectile: tuple[Array, Array]


def pool(n: int) -> list[Truth]:
    """`n` tasks of three sites."""
    out = []
    for i in range(n):
        mdp = Task(Site.draw(i % 3), i // 3).mdp
        mixture = mdp.mixture()
        out.append(Truth(mdp, list(mdp.behaviours().values()), mdp.evaluate(mixture, GAMMA), _expectile(mdp, mixture)))
    return out


def _expectile(mdp: TextMDP, mixture: Array) -> tuple[Array, Array]:
    return mdp.expectile(mixture, GAMMA, TAU)


@dataclass(frozen=True)
class Run:
    """What `fit` would have at its end."""

    algo: str
    replay: Replay
    tokens: Tokens
    own: Estimates
    q_mc: Estimates
    pages: list[str]
    features: Array
    target: Array


def sound(
    truths: list[Truth], seed: int, tasks: int = 50, *, algo: str | None = None, candidates: bool | None = None
) -> Run:
    """A run of a mediocre critic that has no fault."""
    rng = np.random.default_rng([seed, 7])
    algo = algo or str(rng.choice(["q_mc", "q_mc", "iql_lm", "critic_mc"]))
    chosen = rng.choice(len(truths), 2 * tasks, replace=False)
    candidates = bool(rng.random() < 0.75) if candidates is None else candidates
    kind = "expectile" if algo == "iql_lm" else "behaviour"
    rows: list[tuple[int, int, int, float, bool]] = []  # task, state, action (-1: final), reward, terminated
    lengths, owners = [], []
    for k in chosen.tolist():
        for trial in range(EPISODES):
            played = _play(truths[k], trial, rng)
            rows += [(k, *step) for step in played]
            lengths.append(len(played))
            owners.append(k)
    task, state, action = (np.array([row[i] for row in rows]) for i in range(3))
    reward, terminated = np.array([row[3] for row in rows]), np.array([row[4] for row in rows])
    offsets = np.r_[0, np.cumsum(lengths)]
    replay = _replay(truths, owners, offsets, action, reward, terminated, held=set(chosen[:tasks].tolist()))
    tokens, branch_row, branch_action = _tokens(truths, task, state, action, candidates)
    noise = rng.uniform(0.4, 1.6)
    spread = float(np.nanstd(replay.returns))
    own, q_mc = (
        _seen(truths, of, rng, replay, (task, state), (branch_row, branch_action), spread, noise, with_q=q)
        for of, q in ((kind, algo != "critic_mc"), ("behaviour", True))
    )
    pages = [truths[k].mdp.pages[s] for k, s in zip(task.tolist(), state.tolist(), strict=True)]
    scores = rng.choice(["", "\nScore: 4.6", "\nScore: 3.9", "\nOutcome: 2"], len(pages), p=[0.85, 0.05, 0.05, 0.05])
    pages = [page + score for page, score in zip(pages, scores.tolist(), strict=True)]
    features = rng.normal(size=(512, 24)) * 0.8 ** np.arange(24)
    target = own.v + rng.normal(0, 0.02 * spread, len(own.v))
    return Run(algo, replay, tokens, own, q_mc, pages, features, target)


def _play(truth: Truth, trial: int, rng: np.random.Generator) -> list[tuple[int, int, float, bool]]:
    mdp, policy, s = truth.mdp, truth.policies[trial % len(truth.policies)], 0
    steps: list[tuple[int, int, float, bool]] = []
    while s >= 0 and len(steps) < mdp.limit:
        a = int(np.searchsorted(np.cumsum(policy[s]), rng.random()))
        steps.append((s, a, float(mdp.reward[s, a]), bool(mdp.next[s, a] < 0)))
        s = int(mdp.next[s, a])
    return steps if s < 0 else [*steps, (s, -1, 0.0, False)]


def _replay(
    truths: list[Truth], owners: list[int], offsets: Array, action: Array, reward: Array, terminated: Array,
    held: set[int],
) -> Replay:  # fmt: skip
    n, returns = len(reward), np.full(len(reward), np.nan)
    for first, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        g = 0.0
        for t in range(stop - 1, first - 1, -1):
            g = reward[t] + GAMMA * g
            returns[t] = g if action[t] >= 0 else np.nan
    names = [f"{truths[k].mdp.task_id}" for k in owners]
    return Replay(
        episode_ids=[f"e{i}" for i in range(len(owners))], offsets=offsets,
        step=np.arange(n) - np.repeat(offsets[:-1], np.diff(offsets)), tasks=names, acted=action >= 0, reward=reward,
        terminated=terminated, returns=returns, bootstraps=action >= 0,
        success=np.array([float(reward[stop - 1] == 1) for stop in offsets[1:].tolist()]),
        held_out=np.array([k in held for k in owners]),
    )  # fmt: skip


def _tokens(truths: list[Truth], task: Array, state: Array, action: Array, candidates: bool) -> tuple[Tokens, Any, Any]:
    """Tokens whose lengths are the words of the texts; and of every response its row and action."""
    rows, actions, prompts, responses = [], [], [], []
    for n, (k, s, a) in enumerate(zip(task.tolist(), state.tolist(), action.tolist(), strict=True)):
        mdp = truths[k].mdp
        prompts.append(np.full(len(f"{mdp.goal} {mdp.pages[s]}".split()), 1000 * k + s))
        options = [] if a < 0 else [a, *(b for b in range(len(mdp.actions[s])) if b != a and candidates)]
        rows += [n] * len(options)
        actions += options
        responses += [len(mdp.actions[s][b].split()) for b in options]
    n = len(task)
    counts = np.bincount(rows, minlength=n)
    tokens = Tokens(
        np.concatenate(prompts), np.r_[0, np.cumsum([len(p) for p in prompts])], np.zeros(sum(responses), int),
        np.r_[0, np.cumsum(responses)], np.r_[0, np.cumsum(counts)], action >= 0, np.ones(n, bool),
        np.zeros(n + 1, int), np.zeros(0, int), 1000 * task + state, np.zeros((n, 2), int), np.zeros((n, 4), int),
    )  # fmt: skip
    return tokens, np.array(rows), np.array(actions)


def _seen(
    truths: list[Truth], kind: str, rng: np.random.Generator, replay: Replay, at: tuple[Array, Array],
    branch: tuple[Array, Array], spread: float, noise: float, *, with_q: bool,
) -> Estimates:  # fmt: skip
    """What a regression makes of the truth seen through noise: of the task, of the page and of the action.

    Seen with noise of variance e², a truth of variance s² is shrunk by s² / (s² + e²) towards what the turn tells:
    whoever sees the past actions knows that.
    """
    task, state = at
    shape = max(len(t.mdp.states) for t in truths)
    widest = max(t.mdp.next.shape[1] for t in truths)
    of_task = rng.normal(size=len(truths)) * 0.5
    of_page = rng.normal(size=(len(truths), shape)) * np.sqrt(0.75)
    of_action = rng.normal(size=(len(truths), shape, widest))
    v_true = np.array([getattr(truths[k], kind)[0][s] for k, s in zip(task.tolist(), state.tolist(), strict=True)])
    e = noise * v_true.std()
    w = 1 / (1 + noise**2)
    prior = np.bincount(replay.step, v_true)[replay.step] / np.bincount(replay.step)[replay.step]
    seen = v_true - prior + e * (of_task[task] + of_page[task, state])
    told = diagnostics.position_only(replay) if kind == "behaviour" else prior
    v = told + w * seen + rng.normal(0, 0.05 * spread, len(v_true))
    if not with_q:
        return Estimates(v, None)
    row, a = branch
    q_true = np.array([
        getattr(truths[k], kind)[1][s, b]
        for k, s, b in zip(task[row].tolist(), state[row].tolist(), a.tolist(), strict=True)
    ])  # fmt: skip
    advantage = q_true - v_true[row]
    e = noise * advantage.std()
    advantage = w * (advantage + e * of_action[task[row], state[row], a])
    members = v[row] + advantage + rng.normal(0, 0.03 * spread, (2, len(row)))
    return Estimates(v, members.min(axis=0), members)


def judged(run: Run) -> list[alarms.Alarm]:
    """What `fit` would say of it."""
    replay, tokens = run.replay, run.tokens
    rows = replay.held_out_rows
    baselines = {"q_mc": run.q_mc, "position_only": Estimates(diagnostics.position_only(replay), None)}
    if run.algo == "q_mc":
        del baselines["q_mc"]
    numbers = diagnostics.judge(run.own, replay, tokens, rows, gamma=GAMMA)
    numbers |= {"rank_v": diagnostics.effective_rank(run.features)}
    numbers |= {"target_gap": diagnostics.target_gap(run.own.v, run.target, replay)}
    compared = diagnostics.intervals(run.own, replay, tokens, rows, baselines)
    found = alarms.of_critic(run.algo, numbers, compared, estimand=ESTIMAND[run.algo])
    with duckdb.connect() as db:
        columns = {
            "episode_id": np.array(replay.episode_ids)[replay.episode_of], "observation": run.pages,
            "messages": pa.nulls(len(run.pages), pa.string()), "is_final_observation": ~replay.acted,
        }  # fmt: skip
        db.register("pages", pa.table(columns))
        db.execute("CREATE TABLE steps AS FROM pages")
        told = leaks.telling(stated_rewards(db, replay.episode_ids), replay.success, replay.tasks)
    return found + alarms.of_logs(told, leaks.shared_starts(replay, tokens), leaks.both_sides(replay))


# -- faults: each breaks a sound run, and names the alarm that it must raise --------------------------------------


def _with(run: Run, *, v: Array | None = None, ensemble: Array | None = None) -> Run:
    own = run.own
    v, ensemble = own.v if v is None else v, own.ensemble if ensemble is None else ensemble
    q = None if ensemble is None else ensemble.min(axis=0)
    return replace(run, own=Estimates(v, q, ensemble))


def _rng(run: Run) -> np.random.Generator:
    return np.random.default_rng(len(run.replay))


def _q(run: Run) -> Array:
    assert run.own.ensemble is not None
    return run.own.ensemble


def _per_row(run: Run) -> Array:
    """The row of every response."""
    return np.repeat(np.arange(len(run.replay)), np.diff(run.tokens.branch_ptr))


def _state_mean(run: Run) -> Array:
    row = _per_row(run)
    return np.array([np.bincount(row, q, len(run.replay))[row] / np.bincount(row)[row] for q in _q(run)])


def _known(run: Run) -> Array:
    return np.nan_to_num(run.replay.returns)


def not_a_number(run: Run) -> Run:
    v = run.own.v.copy()
    v[_rng(run).integers(len(v), size=50)] = np.nan
    return _with(run, v=v)


def q_not_a_number(run: Run) -> Run:
    return _with(run, ensemble=np.where(_rng(run).random(_q(run).shape) < 0.01, np.inf, _q(run)))


def exploding_q(run: Run) -> Run:
    return _with(run, ensemble=1e4 * _q(run))


def past_the_terminal(run: Run) -> Run:
    """A last transition chained to itself is worth R / (1 - gamma)."""
    return _with(run, v=run.own.v / (1 - GAMMA), ensemble=_q(run) / (1 - GAMMA))


def reward_summed_over_steps(run: Run) -> Run:
    """The outcome copied to every step: values grow with the steps to come."""
    left = run.replay.steps_to_end + 1
    return _with(run, v=run.own.v * left, ensemble=_q(run) * left[_per_row(run)])


def constant_v(run: Run) -> Run:
    return _with(run, v=0.4 + 1e-3 * run.own.v)


def constant_q(run: Run) -> Run:
    return _with(run, ensemble=0.4 + 1e-3 * _q(run))


def action_ignored(run: Run) -> Run:
    return _with(run, ensemble=_state_mean(run))


def actions_upside_down(run: Run) -> Run:
    return _with(run, ensemble=2 * _state_mean(run) - _q(run))


def shuffled_v(run: Run) -> Run:
    return _with(run, v=_rng(run).permutation(run.own.v))


def tripled_v(run: Run) -> Run:
    return _with(run, v=3 * run.own.v)


def upside_down_v(run: Run) -> Run:
    return _with(run, v=run.own.v.max() - run.own.v)


def optimistic(run: Run) -> Run:
    return _with(run, v=run.own.v + 0.25, ensemble=_q(run) + 0.25)


def pessimistic(run: Run) -> Run:
    return _with(run, v=run.own.v - 0.25, ensemble=_q(run) - 0.25)


def all_or_nothing(run: Run) -> Run:
    """A poor V pushed to the ends of its range, right on the average: confidence that it has not earned."""
    v = run.own.v + _rng(run).normal(0, run.own.v.std(), len(run.own.v))
    high = v > np.quantile(v, 1 - np.nanmean(run.replay.returns))
    return _with(run, v=np.where(high, 1.0, 0.0) + 0.01 * v)


def turn_alone(run: Run) -> Run:
    position = diagnostics.position_only(run.replay)
    return _with(run, v=position + _rng(run).normal(0, 0.1 * position.std(), len(position)))


def length_alone(run: Run) -> Run:
    length = np.diff(run.tokens.prompt_ptr).astype(float)
    v = 0.4 + 0.2 * (length - length.mean()) / length.std()
    return _with(run, v=v + _rng(run).normal(0, 0.01, len(v)))


def rewards_one_step_off(run: Run) -> Run:
    """A reward that was given to the action before the one that earned it: last actions are worth nothing."""
    return _with(run, v=np.where(run.replay.terminated, _rng(run).normal(0, 0.02, len(run.own.v)), run.own.v))


def blurred(run: Run) -> Run:
    """Most of what V saw is gone: it is far below `q_mc` on the same features."""
    v = run.own.v
    return _with(run, v=v.mean() + 0.2 * (v - v.mean()) + _rng(run).normal(0, 0.6 * v.std(), len(v)))


def knows_the_outcome(run: Run) -> Run:
    """The outcome stands in what the first page is made of."""
    return _with(run, v=0.7 * run.own.v + 0.3 * run.replay.success[run.replay.episode_of])


def collapsed_features(run: Run) -> Run:
    return replace(run, features=run.features[:, :1] * np.ones(24) + 1e-4 * run.features)


def one_head_twice(run: Run) -> Run:
    return _with(run, ensemble=np.array([_q(run)[0], _q(run)[0]]))


def unrelated_ensemble(run: Run) -> Run:
    noise = _rng(run).normal(0, 3 * _q(run).std(), _q(run).shape)
    return _with(run, ensemble=_q(run) + noise)


def stale_target(run: Run) -> Run:
    return replace(run, target=run.target - 0.5)


def page_says_the_reward(run: Run) -> Run:
    """Pages of the second half of an episode end in its outcome, in three of four episodes."""
    replay = run.replay
    said = (_rng(run).random(len(replay.success)) < 0.75)[replay.episode_of] & (replay.steps_to_end < 3)
    won = replay.success[replay.episode_of]
    pages = [f"{p}\nreward: {w}" if s else p for p, w, s in zip(run.pages, won.tolist(), said.tolist(), strict=True)]
    return replace(run, pages=pages)


def split_by_episode(run: Run) -> Run:
    """Every episode its own task: the split puts trials of one task on both sides."""
    replay = run.replay
    names = [f"{task}#{i}" for i, task in enumerate(replay.tasks)]
    return replace(run, replay=replace(replay, tasks=names, held_out=_rng(run).permutation(replay.held_out)))


def split_at_random(run: Run) -> Run:
    held = _rng(run).permutation(run.replay.held_out)
    return replace(run, replay=replace(run.replay, held_out=held))


FAULTS: dict[Callable[[Run], Run], str] = {
    not_a_number: "diverged", q_not_a_number: "diverged", exploding_q: "diverged", past_the_terminal: "out_of_bounds",
    reward_summed_over_steps: "out_of_bounds", constant_v: "dead_head", constant_q: "dead_head",
    action_ignored: "action_insensitive", actions_upside_down: "actions_misordered",
    shuffled_v: "worse_than_constant", tripled_v: "worse_than_constant", upside_down_v: "worse_than_position_only",
    optimistic: "overestimates", pessimistic: "underestimates", all_or_nothing: "uncalibrated",
    turn_alone: "tracks_turn", length_alone: "tracks_length", rewards_one_step_off: "blind_at_the_end",
    blurred: "worse_than_q_mc", knows_the_outcome: "leak_first_page", collapsed_features: "collapsed_features",
    one_head_twice: "ensemble_identical", unrelated_ensemble: "ensemble_disagrees", stale_target: "target_lags",
    page_says_the_reward: "leak_reward_words", split_by_episode: "leak_split", split_at_random: "leak_split",
}  # fmt: skip


def planted(truths: list[Truth], fault: Callable[[Run], Run], seed: int, tasks: int = 50) -> list[alarms.Alarm]:
    """What a run with this fault raises. It is of SARSA, which is held against `q_mc`, on logs with candidates."""
    return judged(fault(sound(truths, seed, tasks, algo="sarsa", candidates=True)))


def measure(given: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    tasks, clean, seeds = (int(given[name]) for name in ("tasks", "clean", "seeds"))
    truths = pool(int(given["pool"]))
    rows = []
    for fault, wanted in FAULTS.items():
        if given["faults"] in ("all", fault.__name__):
            names = [{alarm.name for alarm in planted(truths, fault, seed, tasks)} for seed in range(seeds)]
            flagged = sum(wanted in found for found in names)
            others = ", ".join(sorted(set().union(*names) - {wanted}))
            rows.append({"fault": fault.__name__, "alarm": wanted, "flagged": flagged, "of": seeds, "others": others})
    false: list[tuple[int, str]] = []
    for seed in range(clean):
        run = sound(truths, seed, tasks)
        false += [(seed, f"{alarm.name}: {alarm.sentence}") for alarm in judged(run)]
    for seed, sentence in false:
        print(f"sound run {seed}: {sentence}", file=sys.stderr)
    result = {
        "faults": len(rows), "flagged": sum(row["flagged"] == row["of"] for row in rows), "seeds": seeds,
        "clean": clean, "false_alarms": len({seed for seed, _ in false}), "tasks": tasks,
        "versions": _measure.versions("numpy", "scipy"),
    }  # fmt: skip
    return result, rows


def main() -> int:
    given = _measure.arguments(sys.argv[1:], clean="200", faults="all", seeds="1", tasks="50", pool="120")
    result, rows = measure(given)
    if given["json"] == "true":
        print(json.dumps({**result, "rows": rows}))
    else:
        for row in rows:
            print(f"{row['fault']:26} {row['alarm']:26} {row['flagged']}/{row['of']}   also {row['others'] or '-'}")
        print(f"\nflagged {result['flagged']}/{result['faults']} faults with every one of {result['seeds']} seeds;")
        print(
            f"false alarms in {result['false_alarms']}/{result['clean']} sound runs of {result['tasks']} held-out tasks"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
