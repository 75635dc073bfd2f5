"""Suite `real` of `evaluate`: can critics tell, on the way, how logged episodes of held-out tasks will end?

A critic and the baselines are judged on the same episodes at the same step: decision floor(T/2) of the T that were
logged, and for comparison the first, floor(T/4) and the last. T is known afterwards alone, so a step's number there
tells something of the length: that is what the baseline `position` is for. No baseline looks at T or at a held-out
outcome, and each is fitted on the judged outcome itself (success), which critics, fitted on returns, are not:

- `constant`: the success rate of the training episodes of the same source;
- `position`: that of those which came as far as this step;
- `n_gram`: logistic regression on words of goal, page and last action, what V sees; `n_gram_action`: and of the
  logged action, what Q sees. Each training episode counts once, whatever its length.

`brier` and `ece` take an estimate for the chance of success. V is a return: discounted, and with partial rewards where
the logs have them, so that a good V may be badly calibrated here (`algo.gamma=1` takes the discount out).
"""

from __future__ import annotations

import itertools
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import orjson
import pyarrow as pa
from omegaconf import DictConfig, ListConfig

from offline_lm._evaluate_commands import command
from offline_lm.batches import render
from offline_lm.errors import UserError
from offline_lm.ope import ngram
from offline_lm.ope.diagnostics import NAN, brier, calibration_error
from offline_lm.ope.ranking import METRICS, compare, words
from offline_lm.store import Store

Array = np.ndarray

MOMENTS = {"first": 0.0, "quarter": 0.25, "middle": 0.5, "last": 1.0}
"""Shares of an episode's decisions; of T, decision floor(share * T), the last at most."""
_WITH_ACTION = ("constant", "position", "n_gram_action")
BASELINES = {"v": ("constant", "position", "n_gram"), "q": _WITH_ACTION, "q_max": _WITH_ACTION}
SCORES = ("v", "q", "q_max", "n_gram", "n_gram_action", "position", "constant")
CASE = ("logs", "model", "algo", "score")
NGRAM_STEPS = 50_000
"""Training steps that the n-gram baselines are fitted on, at most."""

# `won` of held-out episodes is for the judge alone: every estimate is filtered to the training side.
_DECISIONS = """
CREATE TEMP TABLE decisions AS
WITH logged AS (
    SELECT
        episode_id, step, split, source, coalesce(site, '') AS site, coalesce(task_id, goal, episode_id) AS task, v, q,
        coalesce(success, outcome_reward >= 1)::INT AS won,
        coalesce(response, action) AS done,
        lag(done) OVER episode AS last_action,
        row_number() OVER episode - 1 AS decision,
        count(*) OVER (PARTITION BY episode_id) AS n_decisions
    FROM run_values
    WHERE run_id = $run AND NOT is_final_observation AND done IS NOT NULL
    WINDOW episode AS (PARTITION BY episode_id ORDER BY step)
)
SELECT
    *,
    coalesce(
        avg(won) FILTER (split = 'train' AND decision = 0) OVER (PARTITION BY source),
        avg(won) FILTER (split = 'train' AND decision = 0) OVER ()
    ) AS constant,
    -- five pseudo-episodes hold rare positions to the mean, as in `diagnostics.position_only`
    (coalesce(sum(won) FILTER (split = 'train') OVER here, 0) + 5 * constant)
        / (count(*) FILTER (split = 'train') OVER here + 5) AS position
FROM logged
WHERE won IS NOT NULL
WINDOW here AS (PARTITION BY source, least(decision, 63))
"""
_MOMENTS = """
CREATE TEMP TABLE moments AS
SELECT moment, episode_id, step
FROM decisions
JOIN (SELECT unnest($names) AS moment, unnest($shares) AS share)
    ON decision = least(floor(share * n_decisions), n_decisions - 1)
WHERE split = 'held_out'
QUALIFY count(v) OVER (PARTITION BY episode_id) = len($names)
"""
_SIDES = "SELECT (SELECT count(*) FROM moments), (SELECT count(*) FROM decisions WHERE split = 'train')"
_TEXTS = """
    SELECT
        d.episode_id, d.step, d.task, d.won, d.n_decisions, d.last_action, d.done,
        e.goal, e.start_url, s.url, s.observation_error, s.observation, s.messages
    FROM decisions AS d
    JOIN steps AS s USING (episode_id, step)
    JOIN episodes AS e USING (episode_id)
"""
_TRAINING = f"{_TEXTS} WHERE d.split = 'train' ORDER BY md5(d.episode_id || d.step), d.step LIMIT {NGRAM_STEPS}"
_HELD_OUT = f"{_TEXTS} SEMI JOIN moments AS m ON d.episode_id = m.episode_id AND d.step = m.step"
_JUDGED = """
    SELECT moment, d.*, n.n_gram, n.n_gram_action, c.q_max
    FROM moments
    JOIN decisions AS d USING (episode_id, step)
    JOIN n_grams AS n USING (episode_id, step)
    LEFT JOIN (
        SELECT episode_id, step, max(q) AS q_max FROM candidate_values WHERE run_id = $run GROUP BY ALL
    ) AS c USING (episode_id, step)
    ORDER BY d.task, d.episode_id
"""


def run(cfg: DictConfig) -> dict[str, Any]:
    """Judge `runs`, or fit every model and algorithm on the logs and judge them."""
    resamples = cfg.real.resamples
    if cfg.runs is not None:
        store = Store.open(cfg.store)
        names = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
        return _report((judge(store, store.resolve_run(name), resamples) for name in names), resamples)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.workdir or temporary).absolute()
        return _report((each for url in _stores(cfg, folder) for each in _fresh(cfg, url)), resamples)


def _stores(cfg: DictConfig, folder: Path) -> Iterator[str]:
    """`store`, or for each of `real.path` a store with what lies there; one made before is used again."""
    paths = cfg.real.path if isinstance(cfg.real.path, ListConfig) else [cfg.real.path]
    for i, path in enumerate(paths):
        url = cfg.store if path is None else str(folder / f"real{i}")
        if path is not None:
            command("ingest", f"source={cfg.real.source}", f"path={path}", f"store={url}")
        yield url


def _fresh(cfg: DictConfig, url: str) -> Iterator[dict[str, Any]]:
    """Fit and judge every model with every algorithm and seed. An entry of `real.models` may go on with overrides."""
    for seed, entry, algo in itertools.product(cfg.seeds, cfg.real.models, cfg.algos):
        model, *own = shlex.split(entry)
        chosen = (f"algo={algo}", f"model={model}", f"data.store={url}", f"seed={seed}", "baselines=false")
        done = command("fit", *chosen, *shlex.split(cfg.overrides), *own)
        judged = judge(Store.open(url), done["run_id"], cfg.real.resamples)
        yield {**judged, "model": entry, "seconds": done["seconds"]}


def judge(store: Store, run_id: str, resamples: int) -> dict[str, Any]:
    """Scores of one run and of the baselines on its held-out tasks; they go to the table `diagnostics` as well.

    Returns:
        run_id, model, algo, seed; `columns`, the judged steps; `logs`: for each part of the logs (a source, a site
        of several, `all` of several sources) and each moment what `_measure` says, with `episodes`, `tasks`, `success`.

    Raises:
        UserError: as `judged_steps` does.
    """
    with store.connect() as db:
        named = "SELECT model, algo, seed FROM runs WHERE run_id = ?"
        model, algo, seed = db.execute(named, [run_id]).fetchone() or (None, None, None)
        columns = judged_steps(db, run_id)
    logs = {}
    for name, part in _parts(columns):
        here = part & (columns["moment"] == "middle")
        won = columns["won"][here]
        logs[name] = {"episodes": len(won), "tasks": len(set(columns["task"][here])), "success": float(won.mean())}
        for moment in MOMENTS:
            chosen = _masked(columns, part & (columns["moment"] == moment))
            logs[name][moment] = _measure(chosen, resamples if moment == "middle" else 0)
    store.append("diagnostics", list(_rows(run_id, logs)))
    return {"run_id": run_id, "model": model, "algo": algo, "seed": seed, "logs": logs, "columns": columns}


def judged_steps(db: duckdb.DuckDBPyConnection, run_id: str) -> dict[str, Array]:
    """Columns [n] of the held-out steps at `MOMENTS` that `run_id` gave a value: identity, `won` and `SCORES`.

    A score is NaN where the run or its logs do not have it: Q of a critic of states, q_max without candidates.

    Raises:
        UserError: the run holds out no episode whose outcome is known, or trained on none.
    """
    db.execute(_DECISIONS, {"run": run_id})
    db.execute(_MOMENTS, {"names": list(MOMENTS), "shares": list(MOMENTS.values())})
    if not all(all(sides) for sides in db.execute(_SIDES).fetchall()):
        raise UserError(
            f"run {run_id} does not have episodes with outcomes on both sides of the split: suite=real needs success or"
            " a reward in the logs, and a data.held_out that leaves tasks on either side"
        )
    db.register("n_grams", _n_grams(db))
    table = db.sql(_JUDGED, params={"run": run_id}).to_arrow_table()
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    return columns | {"won": columns["won"].astype(bool)}


def _n_grams(db: duckdb.DuckDBPyConnection) -> pa.Table:
    """(episode_id, step, n_gram, n_gram_action) of the steps to judge, by models of the training steps."""
    train, test = (db.sql(sql).to_arrow_table().to_pylist() for sql in (_TRAINING, _HELD_OUT))
    out: dict[str, Any] = {name: [row[name] for row in test] for name in ("episode_id", "step")}
    won = np.array([row["won"] for row in train], np.float64)
    weight = np.array([1 / row["n_decisions"] for row in train])
    task = np.unique([row["task"] for row in train], return_inverse=True)[1]
    for name, fields in (("n_gram", 3), ("n_gram_action", 4)):
        x, asked = (ngram.bag(_fields(row)[:fields] for row in rows) for rows in (train, test))
        out[name] = ngram.predict(x, won, weight, task, asked)
    kinds = {"episode_id": pa.string(), "step": pa.int64(), "n_gram": pa.float64(), "n_gram_action": pa.float64()}
    return pa.table(out, schema=pa.schema(kinds))


def _fields(row: dict[str, Any]) -> tuple[str, ...]:
    goal = render.goal_text(row["goal"], row["start_url"])
    return goal, render.page_text(row), row["last_action"] or "", row["done"]


def _measure(columns: dict[str, Array], resamples: int) -> dict[str, dict[str, Any]]:
    """What `ranking.compare` says of every score that all rows have; and `brier` and `ece` of it, cut to 0..1."""
    scores = _scores(columns)
    out = compare(scores, columns["won"], columns["task"], BASELINES, resamples)
    for name, score in scores.items():
        p, won = score.clip(0, 1), columns["won"]
        out[name] |= {"brier": brier(p, won), "ece": calibration_error(p, won)}
    return out


def _scores(columns: dict[str, Array]) -> dict[str, Array]:
    return {name: columns[name] for name in SCORES if not np.isnan(columns[name]).any()}


def _parts(columns: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Names and rows bool [n]: every source, every site of a source that has several, and `all` of several sources."""
    sources = sorted(set(columns["source"]))
    if len(sources) > 1:
        yield "all", np.ones(len(columns["source"]), bool)
    for source in sources:
        here = columns["source"] == source
        yield source, here
        sites = sorted(set(columns["site"][here]))
        for site in sites if len(sites) > 1 else ():
            yield f"{source}/{site}", here & (columns["site"] == site)


def _rows(run_id: str, logs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of `diagnostics`: `name` is METRIC_MOMENT, `group` the score, the part of the logs stands in `extra`."""
    for (part, measured), moment in itertools.product(logs.items(), MOMENTS):
        extra = orjson.dumps({"logs": part}).decode()
        common = {"run_id": run_id, "suite": "real", "split": "held_out", "n": measured["episodes"], "extra": extra}
        for score, own in measured[moment].items():
            named = {metric: own[metric] for metric in METRICS}
            named |= {metric: {"value": own[metric]} for metric in ("brier", "ece")}
            for baseline, above in own["above"].items():
                named |= {f"{metric}_above_{baseline}": values for metric, values in above.items()}
            for metric, values in named.items():
                numbers = {k: None if np.isnan(v) else v for k, v in values.items()}
                yield {**common, "name": f"{metric}_{moment}", "group": score, **numbers}


def _report(judged: Iterable[dict[str, Any]], resamples: int) -> dict[str, Any]:
    """Everything at mid-episode as tables, each as soon as it is known; in words, what a critic does not beat."""
    print(f"At decision floor(T/2) of held-out tasks; 95 % intervals over episodes, {resamples} resamples.")
    done = []
    for each in judged:
        _print_run(each)
        done.append(each)
    models, means = list(_models(done, resamples)), list(_means(done))
    for row in models:
        case = f"{row['model']}, {row['score']} of {row['algo']}, seed {row['seed']}, on {row['logs']}"
        print(f"\n{case}: {words(row['above'])}")
    print(f"\n{'mean of runs':60}{'AUC (runs)':19}AUC within tasks (runs)")
    for row in means:
        known = [metric for metric in METRICS if row[f"{metric}_runs"]]
        cells = [f"{row[metric]:.3f} ± {row[f'{metric}_std']:.3f} ({row[f'{metric}_runs']})" for metric in known]
        print(f"{', '.join(row[key] for key in CASE):60}{'  '.join(cells)}")
    runs = [{k: v for k, v in each.items() if k != "columns"} for each in done]
    return {"runs": runs, "models": models, "means": means}


def _print_run(judged: dict[str, Any]) -> None:
    for part, measured in judged["logs"].items():
        known = f"{measured['episodes']} episodes of {measured['tasks']} tasks, success {measured['success']:.3f}"
        print(f"\n{judged['run_id']} ({judged['model']}, seed {judged['seed']}) on {part}: {known}")
        print(f"{'':15}{'AUC':22} {'AUC within tasks':22} {'Brier':>6} {'ECE':>6}   AUC at {', '.join(MOMENTS)}")
        for score, own in measured["middle"].items():
            cells = [f"{_shown(own[metric]):22}" for metric in METRICS] + [f"{own['brier']:6.3f} {own['ece']:6.3f}  "]
            cells += [f"{measured[moment][score]['auc']['value']:6.3f}" for moment in MOMENTS]
            print(f"{score:15}{' '.join(cells)}  {words(own['above'])}".rstrip(), flush=True)


def _shown(interval: dict[str, float]) -> str:
    if np.isnan(interval["value"]):
        return "- (one outcome)"
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _models(judged: list[dict[str, Any]], resamples: int) -> Iterator[dict[str, Any]]:
    """Each model against those before it, of the same algorithm and seed, at the middle of what both judged."""
    for other, own in itertools.combinations(judged, 2):
        if other["model"] == own["model"] or any(other[key] != own[key] for key in ("algo", "seed")):
            continue
        theirs, mine = (_masked(each["columns"], each["columns"]["moment"] == "middle") for each in (other, own))
        _, at_theirs, at_mine = np.intersect1d(theirs["episode_id"], mine["episode_id"], return_indices=True)
        theirs, mine = _masked(theirs, at_theirs), _masked(mine, at_mine)
        for part, rows in _parts(mine):
            won, task = mine["won"][rows], mine["task"][rows]
            before, after = (_scores(_masked(columns, rows)) for columns in (theirs, mine))
            for score in (name for name in BASELINES if name in before and name in after):
                pair = {score: after[score], other["model"]: before[score]}
                compared = compare(pair, won, task, {score: [other["model"]]}, resamples)
                yield {k: own[k] for k in ("model", "algo", "seed")} | {"logs": part, "score": score} | compared[score]


def _masked(columns: dict[str, Array], rows: Array) -> dict[str, Array]:
    return {name: column[rows] for name, column in columns.items()}


def _means(judged: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean, standard deviation and number of the AUCs at mid-episode over the runs where they are defined."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for each in judged:
        for part, measured in each["logs"].items():
            for score, own in measured["middle"].items():
                found.setdefault((part, each["model"], each["algo"], score), []).append(own)
    for case, runs in found.items():
        row: dict[str, Any] = dict(zip(CASE, case, strict=True))
        for metric in METRICS:
            values = np.array([run[metric]["value"] for run in runs])
            values = values[~np.isnan(values)]
            spread = (values.mean(), values.std()) if len(values) else (NAN, NAN)
            row |= {metric: float(spread[0]), f"{metric}_std": float(spread[1]), f"{metric}_runs": len(values)}
        yield row
