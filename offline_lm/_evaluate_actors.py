"""Suite `actors` of `evaluate`: the true success rates of actors trained on logs of the shop.

For each seed and horizon logs are recorded once, every algorithm is fitted on them, and each actor is judged on every
page of tasks that it did not see, and of some that it did. There it takes action a with a chance that goes by its
probability of the text of a: softmax over the page's actions of log pi(a | s) / temperature. How often that succeeds
within the step limit is computed, not sampled. It can be since the actors read the page and no past
(`data.history=0`), and the page says all.

Beside them stand the policies that made the logs, a random choice, the optimum, and `greedy_CRITIC`: the greedy policy
of each critic with a Q that an actor learnt from. Horizon 1 is the same purchase in a single click.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
from omegaconf import DictConfig, ListConfig
from scipy.special import softmax

from offline_lm import cli
from offline_lm._evaluate_commands import command
from offline_lm.algos.actor import Actor
from offline_lm.batches import replay as replays
from offline_lm.envs import exact, shop
from offline_lm.envs.exact import TextMDP
from offline_lm.errors import UserError
from offline_lm.models import devices
from offline_lm.models.critic import Critic
from offline_lm.policy import Policy
from offline_lm.store import Store

Array = np.ndarray
Policies = Callable[[TextMDP], Sequence[Array]]
"""Of a task the policies [S, A], one of which, all alike likely, acts in an episode."""

_GAMMA = 0.95  # of the optimum that is shown, and of the skilled behaviours
_TOLD = ("logprob_all", "logprob_success", "entropy", "approx_kl", "clip_fraction", "ess")
"""What is shown of the metrics of a run."""
_COLUMNS = {
    "success": "held out",
    "success_train": "train",
    "return": "return",
    "gain_behaviour": "- behaviour",
    "gain_filtered_bc": "- filtered_bc",
    "logprob_success": "logprob",
    "approx_kl": "KL",
    "seconds": "seconds",
    "critic_seconds": "critic s",
}
_FIGURES = tuple(dict.fromkeys((*_COLUMNS, *_TOLD)))


@dataclass(frozen=True)
class Plan:
    """How one algorithm is fitted.

    Attributes:
        overrides: the user's `key=value`, those of `actors.overrides` last.
        cfg: the whole configuration of `fit` that comes of it.
        critic: what its critic hangs on, as text; equal texts share one. None: it asks no critic.
    """

    name: str
    overrides: list[str]
    cfg: DictConfig
    actor: Actor
    critic: str | None


def run(cfg: DictConfig) -> dict[str, Any]:
    """Fit and judge every algorithm for each seed and horizon; print the table, write rows.

    Returns:
        measurement: the id of its rows in the table `diagnostics` of `store`; `success` there has the splits
            `held_out` and `train`.
        success: by algorithm, on held-out tasks, means over seeds and horizons.
        horizons: for each horizon (as text) and figure, means over seeds by algorithm, and their standard deviations
            (`success_std` ...); gains are in percentage points, log-probabilities in nats a response, KL a token.
        runs: one row for each seed, horizon and algorithm.
    """
    _check(cfg)
    plans = _plans(cfg)
    store = Store.create(cfg.store)
    measurement = f"actors-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:6]}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.workdir or temporary).absolute()
        for seed in cfg.seeds:
            for horizon in cfg.actors.horizons:
                found = _site(cfg, plans, folder, seed, horizon)
                store.append("diagnostics", [r for row in found for r in _stored(measurement, row)])
                rows += found
    horizons = {str(h): _means([row for row in rows if row["horizon"] == h]) for h in cfg.actors.horizons}
    for horizon, figures in horizons.items():
        _show(horizon, figures, len(cfg.seeds))
    return {"measurement": measurement, "success": _means(rows)["success"], "horizons": horizons, "runs": rows}


# -- what is fitted ----------------------------------------------------------------------------------------------


def _check(cfg: DictConfig) -> None:
    settings = cfg.actors
    if cfg.runs is not None:
        raise UserError("suite=actors fits anew, with actors.algos=: leave runs= out")
    if not isinstance(settings.algos, ListConfig) or not settings.algos:
        raise UserError(f"actors.algos={settings.algos}: a list of algorithms is wanted")
    if not isinstance(settings.horizons, ListConfig) or not settings.horizons:
        raise UserError(f"actors.horizons={settings.horizons}: a list is wanted")
    for h in settings.horizons:
        if type(h) is not int or not (h == 1 or h >= shop.HORIZON):
            raise UserError(f"actors.horizons={settings.horizons}: 1 and whole numbers from {shop.HORIZON} are wanted")
    temperature, most = settings.temperature, settings.train_tasks
    if type(temperature) not in (int, float) or not 0 <= temperature < np.inf:
        raise UserError(f"actors.temperature={temperature}: a number from 0 is wanted")
    if most is not None and (type(most) is not int or most < 1):
        raise UserError(f"actors.train_tasks={most}: null or a whole number from 1 is wanted")
    if not isinstance(settings.from_bc, bool):
        raise UserError(f"actors.from_bc={settings.from_bc}: true or false is wanted")
    own = settings.overrides
    if own is not None and not isinstance(own, DictConfig):
        raise UserError(f"actors.overrides={own}: null, or a text of key=value by algorithm, is wanted")


def _plans(cfg: DictConfig) -> list[Plan]:
    """The algorithms in the order of work: `bc` before what begins from it; `filtered_bc` is always among them."""
    settings = cfg.actors
    plans = [_plan(cfg, name) for name in dict.fromkeys(["filtered_bc", *settings.algos])]
    begins = settings.from_bc and any(plan.actor.ratios != "none" for plan in plans)
    if begins and "bc" not in settings.algos:
        plans.append(_plan(cfg, "bc"))
    plans.sort(key=lambda plan: plan.name != "bc")
    if unknown := sorted(set(settings.overrides or ()) - {plan.name for plan in plans}):
        raise UserError(f"actors.overrides has {', '.join(unknown)}, which actors.algos={settings.algos} lacks")
    for plan in plans:
        data, first = plan.cfg.data, plans[0].cfg.data
        if data.context != "actions" or data.history != 0:
            raise UserError(
                f"data.context={data.context} data.history={data.history}: suite=actors computes the success of what"
                " reads the page alone (data.context=actions data.history=0)"
            )
        if any(data[key] != first[key] for key in ("where", "held_out", "truncated")):
            raise UserError("data.where, .held_out and .truncated hold for all algorithms: set them in overrides=")
    return plans


def _plan(cfg: DictConfig, name: str) -> Plan:
    own = (cfg.actors.overrides or {}).get(name) or ""
    overrides = [*shlex.split(cfg.overrides), *shlex.split(own)]
    composed = cli.composed("fit", *_arguments(name, overrides))
    actor = cli.instantiate(composed.algo)
    if not isinstance(actor, Actor):
        raise UserError(f"actors.algos: {name} trains no actor")
    critic = None
    if actor.needs != "nothing":
        config = cli.plain(composed)
        del config["actor"]
        critic = orjson.dumps({**config, "algo": config["algo"]["critic"]}).decode()
    return Plan(name, overrides, composed, actor, critic)


def _arguments(name: str, overrides: Sequence[str], *handed: str) -> list[str]:
    return [f"algo={name}", "baselines=false", "data.history=0", *handed, *overrides]


def _site(cfg: DictConfig, plans: list[Plan], folder: Path, seed: int, horizon: int) -> list[dict[str, Any]]:
    """Record the logs, and fit and judge each algorithm on them."""
    tasks = {task.task_id: task for task in _tasks(seed, horizon, cfg.tasks)}
    url = _logs(cfg, folder, list(tasks.values()), seed, horizon)
    held_out, training = _split(Store.open(url), plans[0].cfg.data, seed, tasks)
    training = training[: cfg.actors.train_tasks]
    about = {"horizon": horizon, "seed": seed, "tasks": len(held_out), "train_tasks": len(training)}
    rows: list[dict[str, Any]] = []

    def judge(name: str, run_id: str | None, policies: Policies, **known: Any) -> None:
        rows.append({**about, "algo": name, "run_id": run_id, **scores(policies, held_out, training), **known})
        print(_line(name, [rows[-1].get(figure) for figure in _COLUMNS]), flush=True)

    print(
        f"shop, seed {seed}, horizon {horizon}: {len(held_out)} held-out tasks, {len(training)} training tasks judged"
    )
    print(_line("", list(_COLUMNS.values())))
    for name, policies in _references(cfg.episodes).items():
        judge(name, None, policies)
    critics: dict[str, str] = {}
    bc_run = None
    for plan in plans:
        handed = []
        if plan.critic in critics:
            handed += [f"actor.critic={critics[plan.critic]}"]
        if bc_run is not None and plan.actor.ratios != "none":
            handed += [f"actor.path=run:{bc_run}", "actor.clone_first=0"]
        arguments = _arguments(plan.name, plan.overrides, *handed)
        done = command("fit", *arguments, f"data.store={url}", f"seed={seed}")
        if cfg.actors.from_bc and plan.name == "bc":
            bc_run = done["run_id"]
        known = {figure: x for figure in _TOLD if (x := done["metrics"].get(figure)) is not None}  # null: not a number
        known |= {"seconds": done["seconds"], "alarms": [alarm["name"] for alarm in done["alarms"]]}
        of = _of_runs(url, [done["run_id"], done["critic_run"]])
        if plan.critic is not None:
            critic_run = done["critic_run"]
            name, known["critic_seconds"], run_dir = of[critic_run]
            if plan.critic not in critics:
                critics[plan.critic] = critic_run
                critic = _placed(Critic.from_pretrained(run_dir))
                taken = f"greedy_{name}" in (row["algo"] for row in rows)
                label = f"greedy_{name}" + f"_of_{plan.name}" * taken  # critics of one algorithm, set up differently
                if critic.config["has_q"]:
                    judge(label, critic_run, greedy(critic), critic_seconds=known["critic_seconds"])
        actor = _placed(Policy.from_pretrained(of[done["run_id"]][2]))
        judge(plan.name, done["run_id"], acting(actor, cfg.actors.temperature), **known)
    return _with_gains(rows)


def _tasks(seed: int, horizon: int, n: int) -> list[TextMDP]:
    words = shop.Site.draw(seed)
    tasks = [shop.Task(words, number, max(horizon, shop.HORIZON)).mdp for number in range(n)]
    return [shop.single_turn(task) for task in tasks] if horizon == 1 else tasks


def _logs(cfg: DictConfig, folder: Path, tasks: list[TextMDP], seed: int, horizon: int) -> str:
    """The store of their logs. Those made before are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"actors-{tasks[0].site}-{len(tasks)}x{cfg.episodes}"
    log, url = folder / f"{name}.jsonl", folder / f"{name}.store"
    if not log.exists():
        with cli.replacing(log) as beside:
            beside.write_bytes(b"\n".join(orjson.dumps(e) for e in exact.record(tasks, cfg.episodes, seed)) + b"\n")
    command("ingest", "source=jsonl", f"path={log}", f"store={url}")
    return str(url)


def _split(
    store: Store, data: DictConfig, seed: int, tasks: Mapping[str, TextMDP]
) -> tuple[list[TextMDP], list[TextMDP]]:
    """The tasks that `fit` holds out, and those that it trains on, by number."""
    with store.connect() as db:
        replay = replays.select(
            db, where=data.where, gamma=_GAMMA, truncated=data.truncated, held_out=data.held_out, seed=seed
        )
    held = dict(zip(replay.tasks, replay.held_out.tolist(), strict=True))
    if not any(held.values()):
        raise UserError(f"data.held_out={data.held_out} keeps none of {len(held)} tasks: nothing to judge on")
    return [t for name, t in tasks.items() if held.get(name) is True], [
        t for n, t in tasks.items() if not held.get(n, 1)
    ]


def _of_runs(url: str, run_ids: list[str | None]) -> dict[str, tuple[str, float, str]]:
    """By run: its algorithm, seconds and folder."""
    query = "SELECT run_id, algo, seconds, run_dir FROM runs WHERE list_contains(?, run_id)"
    with Store.open(url).connect() as db:
        found = db.execute(query, [[run_id for run_id in run_ids if run_id]]).fetchall()
    return {run_id: (algo, round(seconds, 1), run_dir) for run_id, algo, seconds, run_dir in found}


def _placed(reader: Any) -> Any:
    """A critic or policy on the device where reading is fast."""
    device = devices.device("auto")
    reader.model.to(device)
    if isinstance(reader, Critic):
        reader.heads.to(device)
    return reader


# -- policies and what they come to --------------------------------------------------------------------------------


def scores(policies: Policies, held_out: Sequence[TextMDP], training: Sequence[TextMDP]) -> dict[str, float]:
    """True success rate and return within the step limit, means over tasks and policies."""

    def acts(tasks: Sequence[TextMDP]) -> list[tuple[TextMDP, Array]]:
        return [(task, p) for task in tasks for p in policies(task)]

    unseen = acts(held_out)
    return {
        "success": float(np.mean([task.success_rate(p) for task, p in unseen])),
        "success_train": float(np.mean([task.success_rate(p) for task, p in acts(training)])),
        "return": float(np.mean([task.play(p) for task, p in unseen])),
    }


def _references(episodes: int) -> dict[str, Policies]:
    """Policies that nobody trained; `behaviour` is those of the logs, each as often as `exact.record` takes it."""

    def behaviour(task: TextMDP) -> list[Array]:
        policies = list(task.behaviours(_GAMMA).values())
        return [policies[trial % len(policies)] for trial in range(episodes)]

    return {
        "random": lambda task: [task.greedy(task.reward, epsilon=1.0)],
        "behaviour": behaviour,
        "optimum": lambda task: [task.greedy(task.optimal(_GAMMA)[1])],
    }


def acting(actor: Policy, temperature: float) -> Policies:
    """The policy of a language model over each page's actions; at temperature 0 the likeliest."""

    def policies(task: TextMDP) -> list[Array]:
        logprobs = _table(task, actor.logprobs(_states(task)))
        if temperature == 0:
            return [task.greedy(logprobs)]
        return [softmax(np.where(task.valid, logprobs / temperature, -np.inf), axis=1)]

    return policies


def greedy(critic: Critic) -> Policies:
    """The policy that takes the action with the highest Q."""
    return lambda task: [task.greedy(_table(task, [score.q or () for score in critic.score(_states(task))]))]


def _states(task: TextMDP) -> list[dict[str, Any]]:
    return [
        {"goal": task.goal, "observation": page, "candidates": actions}
        for page, actions in zip(task.pages, task.actions, strict=True)
    ]


def _table(task: TextMDP, of_actions: Sequence[Sequence[float] | Array]) -> Array:
    """[S, A] of what each state's actions have; NaN where no action is."""
    out = np.full(task.next.shape, np.nan)
    for s, own in enumerate(of_actions):
        out[s, : len(own)] = own
    return out


# -- the report ----------------------------------------------------------------------------------------------------


def _with_gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one seed and horizon with what each is above the logs, and above cloning the best of them."""
    success = {row["algo"]: row["success"] for row in rows}
    return [
        row | {f"gain_{than}": 100 * (row["success"] - success[than]) for than in ("behaviour", "filtered_bc")}
        for row in rows
    ]


def _stored(measurement: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of `diagnostics` for each figure; what the figure is about stands in `extra`."""
    about = {key: row[key] for key in ("horizon", "seed", "run_id")}
    common = {"run_id": measurement, "suite": "actors", "group": row["algo"], "extra": orjson.dumps(about).decode()}
    out = []
    for figure in _FIGURES:
        if figure in row:
            train = figure == "success_train"
            split, n = ("train", row["train_tasks"]) if train else ("held_out", row["tasks"])
            name = "success" if train else figure
            out.append({**common, "name": name, "split": split, "value": row[figure], "n": n})
    return out


def _means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By figure and algorithm: the mean, and as `FIGURE_std` the standard deviation, over those rows that have it."""
    out: dict[str, dict[str, float]] = {}
    for figure in _FIGURES:
        for algo in dict.fromkeys(row["algo"] for row in rows if figure in row):
            own = [row[figure] for row in rows if row["algo"] == algo and figure in row]
            out.setdefault(figure, {})[algo] = float(np.mean(own))
            out.setdefault(f"{figure}_std", {})[algo] = float(np.std(own))
    return out


def _show(horizon: str, figures: dict[str, dict[str, float]], seeds: int) -> None:
    """One line for each algorithm."""
    print(f"horizon {horizon}: means and standard deviations over {seeds} seeds; success within the step limit in %,")
    print("gains in points; log-probability of the responses of successful held-out runs, KL to where its loss began")
    print(_line("", list(_COLUMNS.values())))
    for algo in figures["success"]:
        print(_line(algo, [_cell(figures, column, algo) for column in _COLUMNS]))


def _cell(figures: dict[str, dict[str, float]], figure: str, algo: str) -> str | None:
    if algo not in figures.get(figure, {}):
        return None
    scale = 100 if figure.startswith("success") else 1
    mean, std = (scale * figures[of][algo] for of in (figure, f"{figure}_std"))
    digits = 1 if scale == 100 or figure.startswith("gain") or figure.endswith("seconds") else 3
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def _line(name: str, cells: Sequence[Any]) -> str:
    texts = ["" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
    return " | ".join([f"{name:20}", *(f"{text:>15}" for text in texts)])
