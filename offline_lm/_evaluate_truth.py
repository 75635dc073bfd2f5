"""Suites `shop`, `office`, `fo_maze`, `po_maze` and `wordle`: critics held against the exact values of a text site."""

from __future__ import annotations

import math
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml
from omegaconf import DictConfig, ListConfig

from offline_lm import cli
from offline_lm._evaluate_commands import command
from offline_lm.envs import exact, shop, sites
from offline_lm.errors import UserError
from offline_lm.models.critic import Critic
from offline_lm.ope import truth
from offline_lm.store import Store

SUITES = tuple(sites.TASKS)
_SHOWN = (
    *("kendall", "hit", "sign", "spearman_v", "rmse_v", "rmse_q"),
    *("gap_recovered", "gap_once", "behaviour", "greedy", "greedy_once", "optimum"),
)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Judge `runs`, or record logs, fit and judge every algorithm on them."""
    if cfg.runs is not None:
        store = Store.open(cfg.store)
        names = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
        return _report([judge(store, store.resolve_run(name), cfg.suite) for name in names])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.workdir or temporary).absolute()
        return _report([row for seed in cfg.seeds for row in _fresh(cfg, folder, seed)])


def _fresh(cfg: DictConfig, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Record the logs of one site, and fit and judge each algorithm on them. Logs made before are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    options = _options(cfg)
    name = f"{cfg.suite}{seed}" + "".join(f"-{key}{value}" for key, value in options.items())
    log, url = folder / f"{name}.jsonl", folder / f"{name}.store"
    if not log.exists():
        tasks = (sites.TASKS[cfg.suite](seed, i, **options) for i in range(cfg.tasks))
        lines = [orjson.dumps(e) for e in exact.record(tasks, cfg.episodes, seed)]
        log.write_bytes(b"\n".join(lines) + b"\n")
    command("ingest", "source=jsonl", f"path={log}", f"store={url}")
    rows = []
    for algo in cfg.algos:
        # a maze's page says all; past actions would only set equal states apart
        shown = ["data.history=0"] if cfg.suite == "fo_maze" else []
        done = command(
            "fit",
            *shown,
            f"algo={algo}",
            f"data.store={url}",
            f"seed={seed}",
            "baselines=false",
            *shlex.split(cfg.overrides),
        )
        rows.append({**judge(Store.open(url), done["run_id"], cfg.suite), "seconds": done["seconds"]})
        print(_line(rows[-1]), flush=True)
    return rows


def _options(cfg: DictConfig) -> dict[str, int]:
    """What the tasks of the site are made with, beside their words and number."""
    if cfg.horizon is None:
        return {}
    if cfg.suite != "shop" or type(cfg.horizon) is not int or cfg.horizon < shop.HORIZON:
        raise UserError(f"horizon={cfg.horizon}: suite=shop takes one, a whole number from {shop.HORIZON}")
    return {"horizon": cfg.horizon}


def judge(store: Store, run_id: str, suite: str) -> dict[str, Any]:
    """Exact-truth scores of one run on the tasks of the suite's sites that it held out; also in table `diagnostics`."""
    with store.connect() as db:
        (config, algo, seed, run_dir) = db.execute(
            "SELECT config, algo, seed, run_dir FROM runs WHERE run_id = ?", [run_id]
        ).fetchone() or (None, None, None, None)
        held_out = db.execute(
            "SELECT DISTINCT task_id FROM run_values WHERE run_id = ? AND split = 'held_out' AND benchmark = ?",
            [run_id, suite],
        ).fetchall()
    if config is None or run_dir is None or not held_out:
        raise UserError(f"run {run_id} holds out no task of benchmark '{suite}': suite={suite} cannot judge it")
    tasks = [sites.named(task_id) for (task_id,) in sorted(held_out)]
    algorithm = cli.instantiate(yaml.safe_load(config)["algo"])
    critic = Critic.from_pretrained(run_dir)
    if not critic.config["has_q"]:
        raise UserError(f"run {run_id} ({algo}) has no Q: suite={suite} judges the order of actions")
    estimand = algorithm.estimand
    tau = algorithm.tau if estimand == "expectile" else None
    scores = truth.exact(critic, tasks, gamma=algorithm.gamma, estimand=estimand, tau=tau)
    row = {"run_id": run_id, "suite": suite, "split": "held_out", "group": algo, "n": len(tasks)}
    values = {name: None if math.isnan(value) else value for name, value in scores.items()}
    store.append("diagnostics", [{**row, "name": name, "value": value} for name, value in values.items()])
    return {"run_id": run_id, "algo": algo, "seed": seed, "tasks": len(tasks), **scores}


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table, and per algorithm the mean and the standard deviation over runs."""
    print("  ".join([f"{'run':34}", *(f"{name:>13}" for name in _SHOWN)]))
    for row in rows:
        print(_line(row))
    out: dict[str, Any] = {"runs": rows}
    for algo in dict.fromkeys(row["algo"] for row in rows):
        own = [row for row in rows if row["algo"] == algo]
        out[algo] = {name: float(np.mean([row[name] for row in own])) for name in _SHOWN}
        out[algo] |= {f"{name}_std": float(np.std([row[name] for row in own])) for name in _SHOWN}
        print(_line({"run_id": f"{algo}: mean of {len(own)}", **out[algo]}))
    return out


def _line(row: dict[str, Any]) -> str:
    return "  ".join([f"{row['run_id']:34}", *(f"{row[name]:13.3f}" for name in _SHOWN)])
