"""Suite `policies` of `evaluate`: what the policy that a run's Q stands for would earn, estimated from the logs alone.

The policy chooses among the logged candidates of a step by softmax(Q / temperature), or the best of them (greedy). It
is judged on held-out tasks, by the estimators of `ope.estimators` and by fitted Q evaluation (`ope.fqe`) on the
critic's frozen features. That is fitted on the training tasks, so that `dr`, `wdr` and `magic` go by a Q that never saw
what it is judged on. `dm` is what the run's own Q promises at the first step. Where the logs lack what an estimator
needs, its value is null, and `extra` says why.

On the exact sites `true_value` is that of the same policy, by dynamic programming within the step limit, where Q reads
each page as reached by a shortest path. Of several runs, each estimator chooses one: its regret is what the best run is
truly worth less what the chosen one is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import orjson
import yaml
from omegaconf import DictConfig, ListConfig
from scipy.special import softmax

from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import tokenize
from offline_lm.envs import maze, office, shop, sites
from offline_lm.errors import UserError
from offline_lm.models import features
from offline_lm.models.critic import Critic, find_run
from offline_lm.ope import estimators, fqe
from offline_lm.ope.estimators import NAN, Interval
from offline_lm.ope.selection import choose
from offline_lm.store import Store

Array = np.ndarray

_SITES = (shop.BENCHMARK, office.BENCHMARK, maze.FULLY)
"""Where a page shows the state, so that a policy of pages has an exact value."""
NAMES = (*estimators.ESTIMATORS, "magic", "fqe")
FEW = 50  # episodes: of fewer, effectively, intervals were too narrow (analysis/benchmarks/coverage.py behaviours=all)
_STEPS = """
    SELECT s.behavior_logprob, s.candidates_complete, v.split, e.benchmark, e.task_id, c.q, c.executed
    FROM "values" AS v
    JOIN steps AS s ON v.episode_id = s.episode_id AND v.step = s.step
    JOIN episodes AS e ON v.episode_id = e.episode_id
    LEFT JOIN (
        SELECT episode_id, step, list(q ORDER BY candidate) AS q, list(executed ORDER BY candidate) AS executed
        FROM candidate_values
        WHERE run_id = $run
        GROUP BY ALL
    ) AS c ON v.episode_id = c.episode_id AND v.step = c.step
    WHERE v.run_id = $run
    ORDER BY v.episode_id, v.step
"""


@dataclass(frozen=True)
class Logged:
    """The N steps of E episodes that a run scored, and its Q of their C candidates.

    Attributes:
        ptr: int64 [N+1]; the candidates of step n are `ptr[n]:ptr[n + 1]`.
        q: float64 [C]; executed: bool [C].
        log_behaviour: float64 [N], NaN where it was not logged.
        complete: bool [N]: whether the candidates are all that could be done.
        held_out: bool [E]; sites: [E], the task of an exact site, or None.
    """

    run_id: str
    algo: str
    seed: int
    config: dict[str, Any]
    replay: Replay
    ptr: Array
    q: Array
    executed: Array
    log_behaviour: Array
    complete: Array
    held_out: Array
    sites: list[str | None]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Judge the policies of `runs` on the episodes that all of them hold out, and choose among them."""
    if cfg.runs is None:
        raise UserError("suite=policies judges runs that are there: give runs=latest, or a list, and store=STORE")
    names = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    store, options, given = Store.open(cfg.store), cfg.policies, cfg.policies.temperatures
    if not isinstance(given, ListConfig) or not given or not all(isinstance(t, int | float) and t >= 0 for t in given):
        raise UserError(f"policies.temperatures={given}: a list of numbers from 0 is wanted")
    if not isinstance(options.ridge, int | float) or not options.ridge > 0:
        raise UserError(f"policies.ridge={options.ridge}: a number above 0 is wanted")
    with store.connect() as db:
        run_ids = dict.fromkeys(store.resolve_run(name) for name in names)
        runs = [logged(db, run_id, options.gamma) for run_id in run_ids]
        shared = set.intersection(*(set(np.array(r.replay.episode_ids)[r.held_out]) for r in runs))
        gammas = {r.config["algo"]["gamma"] for r in runs}
        if not shared:
            mend = "fit them with one seed (heads_seed may differ) and one data.held_out above 0"
            raise UserError(f"no episode is held out by all of runs=: {mend}")
        if options.gamma is None and len(gammas) > 1:
            raise UserError(f"these runs have different discounts ({sorted(gammas)}): give policies.gamma")
        judged = [judge(store, db, each, shared, options) for each in runs]
    chosen = selection(judged)
    store.append("diagnostics", [*(row for each in judged for row in _rows(each)), *_selection_rows(chosen, judged)])
    _print(judged, chosen)
    return {"runs": judged, "selection": chosen}


def logged(db: duckdb.DuckDBPyConnection, run_id: str, gamma: float | None) -> Logged:
    """What `run_id` scored.

    Raises:
        UserError: it gave no candidate a Q, or the logs are no longer those that it scored.
    """
    ((algo, seed, config),) = db.execute("SELECT algo, seed, config FROM runs WHERE run_id = ?", [run_id]).fetchall()
    settings = yaml.safe_load(config)
    table = db.sql(_STEPS, params={"run": run_id}).to_arrow_table().combine_chunks()
    lists = table["q"].combine_chunks()
    if not len(lists) or lists.null_count == len(lists):
        wanted = "logs with `candidates`, and a critic of actions (algo=q_mc, iql_lm ...)"
        raise UserError(f"run {run_id} ({algo}) gave no candidate a Q: suite=policies needs {wanted}")
    replay = replays.select(
        db,
        where=f"episode_id IN (SELECT episode_id FROM \"values\" WHERE run_id = '{run_id}')",
        gamma=settings["algo"]["gamma"] if gamma is None else gamma,
        truncated=settings["data"]["truncated"],
        held_out=0.0,
        seed=0,
    )
    if len(replay) != len(table):
        raise UserError(f"run {run_id} scored {len(table)} steps of episodes that now have {len(replay)}: fit again")
    column = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names[:5]}
    first = replay.offsets[:-1]
    of = zip(column["benchmark"][first], column["task_id"][first], strict=True)
    return Logged(
        run_id, algo, seed, settings, replay,
        ptr=np.r_[0, np.cumsum(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))].astype(np.int64),
        q=lists.flatten().to_numpy(zero_copy_only=False),
        executed=table["executed"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(bool),
        log_behaviour=column["behavior_logprob"].astype(np.float64),
        complete=column["candidates_complete"] == True,  # noqa: E712  (null is not complete)
        held_out=column["split"][first] == "held_out",
        sites=[task if site in _SITES else None for site, task in of],
    )  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """x: [A, d], features of every response; candidate_of: int64 [C], logged: int64 [N]: which stand where, or -1."""

    x: Array
    candidate_of: Array
    logged: Array


def fit_on(store: Store, db: duckdb.DuckDBPyConnection, run: Logged, rank: int) -> Fit:
    """Frozen features of the run's own backbone, from the store's cache where they are there; projected to `rank`.

    Raises:
        UserError: the run has no critic (policies.fqe=false needs none), or its tokens are not those of its values.
    """
    critic = Critic.from_pretrained(find_run(run.run_id, store.url))
    where = f"episode_id IN (SELECT episode_id FROM \"values\" WHERE run_id = '{run.run_id}')"
    tokens = tokenize(replays.steps(db, where), critic.tokenizer, **critic.rendering)
    if not np.array_equal(tokens.candidate_ptr, run.ptr):
        raise UserError(f"the candidates of {run.run_id}'s steps are no longer those that it scored: fit again")
    found = features.compute(critic.model, tokens, store.cache_dir / "features", dtype=run.config["model"]["features"])
    at = np.where(tokens.acted, tokens.branch_ptr[:-1], -1)
    train = at[(at >= 0) & ~run.held_out[run.replay.episode_of]]  # a split never holds out every task
    projection = fqe.Projection.fit(np.asarray(found.q[train], np.float64), rank)
    return Fit(projection(found.q[:]), np.asarray(tokens.candidate_branch, np.int64), at)


def judge(store: Store, db: duckdb.DuckDBPyConnection, run: Logged, shared: set[str], options: Any) -> dict[str, Any]:
    """Estimates for each temperature, on the `shared` episodes.

    Returns:
        run_id, algo, seed, gamma, `episodes`; `mean_return` of the logs; `policies`: by name (`greedy`, `softmax-0.1`)
        `estimates` (by estimator value, low, high, and `reason` where it is null), `ess` and `true_value` if known.
    """
    gamma = run.config["algo"]["gamma"] if options.gamma is None else options.gamma
    episodes = np.flatnonzero([e in shared for e in run.replay.episode_ids])
    model = fit_on(store, db, run, options.rank) if options.fqe else None
    out: dict[str, Any] = {key: getattr(run, key) for key in ("run_id", "algo", "seed")}
    out |= {"gamma": gamma, "episodes": len(episodes)}
    truth = true_values(store, run, episodes, options.temperatures, gamma) if options.truth else None
    policies = out["policies"] = {}
    for i, temperature in enumerate(options.temperatures):
        judged = estimate(run, model, episodes, temperature, gamma, options)
        out["mean_return"] = judged.pop("mean_return")
        if truth is not None:
            judged["true_value"] = truth[i]
        policies[_named(temperature)] = judged
    return out


def estimate(
    run: Logged, model: Fit | None, episodes: Array, temperature: float, gamma: float, options: Any
) -> dict[str, Any]:
    """`mean_return`, `estimates` and `ess` of one policy, on `episodes` (indices)."""
    replay, own = run.replay, np.arange(len(run.q))
    chosen = replay.acted & np.isin(replay.episode_of, episodes)
    offsets = np.r_[0, np.cumsum(np.bincount(replay.episode_of[chosen], minlength=len(replay.episode_ids))[episodes])]
    starts = replay.offsets[:-1][episodes]
    counts = estimators.resampled(len(episodes), options.resamples)
    reward, continues = replay.reward[chosen], (~replay.terminated[chosen]).astype(np.float64)

    probability = fqe.policy(run.q, run.ptr, temperature)
    target = fqe.expected(probability, own, run.ptr, run.executed)
    q, v = run.q, fqe.expected(probability, own, run.ptr, run.q)
    found: dict[str, Interval] = dict.fromkeys(NAMES, Interval(NAN, NAN, NAN))
    why: dict[str, str] = {"fqe": "policies.fqe=false"}
    unscored = np.diff(run.ptr) == 0
    if n := int(unscored[starts].sum()):
        why |= dict.fromkeys(("dm", "fqe"), f"{n} of {len(starts)} judged first steps have no scored candidates")
    else:
        found["dm"] = estimators.interval(counts @ v[starts] / len(episodes))
        if model is not None:
            (q, v), found["fqe"] = _fitted(run, model, probability, starts, gamma, options)
            del why["fqe"]
    ess, mean_return = NAN, Interval(NAN, NAN, NAN)
    if not np.isnan(replay.returns[chosen]).any():
        logs = estimators.trajectories(np.zeros_like(reward), reward, continues, offsets, gamma=gamma)
        mean_return = estimators.interval(estimators.on_policy(logs, counts))
    if reason := _lacking(run, chosen, unscored):
        why |= dict.fromkeys((name for name in NAMES if name not in ("dm", "fqe")), reason)
    else:
        with np.errstate(divide="ignore"):
            log_ratio = np.log(np.minimum(target[chosen], 1.0)) - run.log_behaviour[chosen]
        twice = fqe.expected(run.executed, own, run.ptr, run.executed)  # where equal texts are several candidates
        q_logged = fqe.expected(run.executed, own, run.ptr, q) / np.maximum(twice, 1)
        t = estimators.trajectories(log_ratio, reward, continues, offsets, gamma=gamma, q=q_logged[chosen], v=v[chosen])
        ess = estimators.effective_sample_size(t.weight[:, -1])
        found |= {name: each for name, each in estimators.estimates(t, counts).items() if name != "dm"}
        for name in ("wis", "wpdis"):
            if np.isnan(found[name].value):
                why[name] = "from some step on, no judged episode did only what the policy would do"
    told = {name: {**found[name]._asdict(), **({"reason": why[name]} if name in why else {})} for name in NAMES}
    return {"mean_return": mean_return._asdict(), "temperature": temperature, "ess": ess, "estimates": told}


def _lacking(run: Logged, chosen: Array, unscored: Array) -> str | None:
    """What importance weights or returns of the `chosen` steps cannot be had for, in words."""
    has_executed = fqe.expected(np.ones(len(run.q)), np.arange(len(run.q)), run.ptr, run.executed) > 0
    told = []
    for missing, words in (
        (np.isnan(run.log_behaviour), "no behavior_logprob"),
        (~run.complete, "candidates that are not known to be complete (candidates_complete)"),
        (unscored, "no scored candidates"),
        (~unscored & ~has_executed, "a logged action that is none of the candidates"),
        (np.isnan(run.replay.returns), "no known return"),
    ):
        if n := int(missing[chosen].sum()):
            told.append(f"{n} of {int(chosen.sum())} judged steps have {words}")
    return "; ".join(told) or None


def _fitted(
    run: Logged, model: Fit, probability: Array, starts: Array, gamma: float, options: Any
) -> tuple[tuple[Array, Array], Interval]:
    """((Q [C], V [N]), value) by FQE: fitted on the training episodes, as many iterations as the longest has steps."""
    replay = run.replay
    mean_x = fqe.expected(probability, model.candidate_of, run.ptr, model.x)
    later = np.r_[mean_x[1:], np.zeros((1, mean_x.shape[1]))]
    follows = np.r_[np.diff(run.ptr)[1:] > 0, False] & (replay.steps_to_end > 0)
    # A step whose next one has no candidates, as a final observation has none, is left out (DESIGN section 3)
    used = replay.acted & (model.logged >= 0) & ~np.isnan(replay.reward) & (replay.terminated | follows)
    used &= ~run.held_out[replay.episode_of]
    train = np.flatnonzero(~run.held_out)
    rows = np.bincount(replay.episode_of[used], minlength=len(run.held_out))[train]
    x, reward = model.x[model.logged[used]], replay.reward[used]
    next_x = np.where(replay.terminated[used][:, None], 0.0, later[used])
    longest = int(np.bincount(replay.episode_of[replay.acted]).max())
    settings: Any = {"gamma": gamma, "iterations": longest, "ridge": options.ridge}
    samples = fqe.fqe_values(
        x, reward, next_x, np.r_[0, np.cumsum(rows)], mean_x[starts],
        counts=estimators.resampled(len(train), options.fqe_resamples, seed=1),
        start_counts=estimators.resampled(len(starts), options.fqe_resamples, seed=2), **settings,
    )  # fmt: skip
    w = fqe.linear_fqe(x, reward, next_x, **settings)
    return ((model.x @ w)[model.candidate_of], mean_x @ w), estimators.interval(samples, basic=True)


# -- truth and selection ---------------------------------------------------------------------------------------


def true_values(
    store: Store, run: Logged, episodes: Array, temperatures: Iterable[float], gamma: float
) -> list[float] | None:
    """The value of the policy of each temperature, mean over the tasks of `episodes`; None unless all are exact."""
    tasks = Counter(run.sites[e] for e in episodes)
    if None in tasks:
        return None
    critic = Critic.from_pretrained(find_run(run.run_id, store.url))
    values = []
    for task_id in filter(None, tasks):
        mdp = sites.named(task_id)
        q = np.full(mdp.next.shape, -np.inf)
        pages = zip(mdp.pages, mdp.paths, mdp.actions, strict=True)
        states = ({"goal": mdp.goal, "observation": p, "history": h, "candidates": c} for p, h, c in pages)
        for s, score in enumerate(critic.score(states)):
            q[s, : len(score.q or ())] = score.q
        policies = [softmax(q / t, axis=1) if t else mdp.greedy(q) for t in temperatures]
        discount = gamma ** np.arange(mdp.limit)
        values.append([np.diff([mdp.play(p, n) for n in range(mdp.limit + 1)]) @ discount for p in policies])
    return np.average(values, axis=0, weights=list(tasks.values())).tolist()


def selection(judged: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By policy and estimator: the run `chosen`, `regret` and `spearman` over runs, NaN where the truth is not known.

    An estimator that lacks a value for some run chooses none.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for name in judged[0]["policies"] if len(judged) > 1 else ():
        each = [one["policies"][name] for one in judged]
        true = np.array([one.get("true_value", NAN) for one in each])
        out[name] = {}
        for estimator in NAMES:
            choice = choose(np.array([one["estimates"][estimator]["value"] for one in each]), true)
            if choice is not None:
                out[name][estimator] = choice._asdict() | {"chosen": judged[choice.chosen]["run_id"]}
    return out


# -- what is told ----------------------------------------------------------------------------------------------


def _named(temperature: float) -> str:
    return f"softmax-{temperature:g}" if temperature else "greedy"


def _rows(judged: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of `diagnostics`: `group` is the policy, `name` the estimator; `extra` has the discount, and what lacked."""
    common = {"run_id": judged["run_id"], "suite": "policies", "split": "held_out", "n": judged["episodes"]}
    settings = {"gamma": judged["gamma"]}
    yield common | {"group": "behaviour", "name": "mean_return"} | _numbers(judged["mean_return"], settings)
    for group, policy in judged["policies"].items():
        for name, each in policy["estimates"].items():
            told = settings | {key: each[key] for key in ("reason",) if key in each}
            yield common | {"group": group, "name": name} | _numbers(each, told)
        for name in ("ess", "true_value"):
            if name in policy:
                yield common | {"group": group, "name": name} | _numbers({"value": policy[name]}, settings)


def _selection_rows(chosen: dict[str, Any], judged: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Regrets (null where the truth is not known), each beside the run that was chosen; `n` is how many there were."""
    among = {"among": [each["run_id"] for each in judged]}
    common = {"suite": "policies", "split": "held_out", "n": len(judged)}
    for group, by_estimator in chosen.items():
        for name, row in by_estimator.items():
            named = {"run_id": row["chosen"], "group": group, "name": f"regret_{name}"}
            yield common | named | _numbers({"value": row["regret"]}, among)


def _numbers(values: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    numbers = {k: None if np.isnan(values[k]) else values[k] for k in ("value", "low", "high") if k in values}
    return {**numbers, "extra": orjson.dumps(extra).decode()}


def _print(judged: list[dict[str, Any]], chosen: dict[str, Any]) -> None:
    for each in judged:
        print(f"\n{each['run_id']}: {each['episodes']} held-out episodes, discount {each['gamma']:g}")
        print(f"{'':14}{'mean return':14}{_shown(each['mean_return'])}")
        for group, policy in each["policies"].items():
            known = f", true value {policy['true_value']:.3f}" if "true_value" in policy else ""
            few = " (few: all intervals but fqe's are too narrow)" if policy["ess"] < FEW else ""
            print(f"{group:14}effective sample size {policy['ess']:.1f}{few}{known}")
            for name, row in policy["estimates"].items():
                print(f"{'':14}{name:14}{_shown(row)}")
    for group, by_estimator in chosen.items():
        print(f"\n{group:14}{'regret':>10}{'spearman':>10}  chosen")
        for name, row in by_estimator.items():
            print(f"{name:14}{row['regret']:10.3f}{row['spearman']:10.3f}  {row['chosen']}")


def _shown(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"- ({row['reason']})"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
