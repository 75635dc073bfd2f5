"""``python -m offline_lm.loop``: collect, fit, act by what was fitted, and again; every round judged on unseen pages.

The order of work is the order of `_Loop`: `begin` (round 0, the logs), then `round` after round. What is done stands in
the store: an episode by its name (`collect`), a fit by the configuration that its run recorded, a round by its rows in
the table `diagnostics`, which come in one commit. So a kill loses the fit or the episodes under way, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from offline_lm import _collect_policies as policies
from offline_lm import _loop_judge as judge
from offline_lm import _loop_rounds as rounds
from offline_lm import cli, collect, fit
from offline_lm._loop_judge import Figure
from offline_lm._loop_rounds import Round
from offline_lm.algos.actor import Actor
from offline_lm.algos.archer import Archer
from offline_lm.batches import replay as replays
from offline_lm.errors import UserError
from offline_lm.models.critic import Critic
from offline_lm.store import Store

SEEDS = 10_000
"""Round k collects on pages from seed k * SEEDS on."""
UNSEEN = 100_000_000
"""The first seed of the pages that rounds are judged on."""

_SET = {
    "fit.data.where": ("true", "where="),
    "fit.data.version": (None, "where="),
    "fit.seed": (0, "seed="),
    "fit.heads_seed": (None, "seed="),
    "fit.sweep": (None, "--multirun"),
    "fit.actor.critic": (None, "algo@fit.algo.critic="),
    "collect.policy": ("random", "behaviours="),
    "collect.epsilon": (0, "behaviours= or explore.epsilon="),
    "collect.seed": (0, "seed="),
    "collect.first_seed": (0, "seed="),
    "collect.dataset": (None, "name="),
    "collect.fetch": (None, "`python -m offline_lm.collect fetch=...`"),
}
"""What a loop sets itself, by key: its default, and what to give instead."""
_ANYHOW = ("json", "threads", "device", "logger", "run_dir")
"""Keys of `fit` that do not change what comes of it."""
_OF_LOOP = {"store", "seed", "first_seed", "dataset", "fetch", "json", "redact"}
"""Keys of `collect` that one of its policies cannot have for itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """As every command; 143 or 130 if SIGTERM or SIGINT stopped it while it collected."""
    stopped: list[int] = []
    code = cli.run("loop", lambda cfg: loop(cfg, stopped), argv)
    return 128 + stopped[0] if stopped else code


def loop(cfg: DictConfig, stopped: list[int]) -> dict[str, Any]:
    """All rounds that are not in the store yet.

    Returns:
        loop: its id; arm: online or offline.
        rounds: of the arm, round 0 first: `round`, `arm`, `run`, `critic`, and the figures by name, each with `value`,
            `low`, `high` and `n`.
    """
    _check(cfg)
    store = Store.create(cfg.store) if cfg.where is None else Store.open(cfg.store)
    here = _Loop(cfg, store, f"{cfg.name}-s{cfg.seed}", "online" if cfg.online else "offline", stopped)
    settings = rounds.settings(cli.plain(cfg))
    rounds.check(store, here.id, settings)
    done = rounds.read(store, here.id)
    print(rounds.HEAD)
    for number in range(cfg.rounds + 1):
        arm = here.arm if number else rounds.LOGS
        if (arm, number) not in done:
            first = done.get((arm, 1))
            made = here.round(number, first and first.critic) if number else here.begin()
            rounds.write(store, here.id, made, None if number else settings)
            done[arm, number] = made
        print(rounds.line(done[arm, number]), flush=True)
    if cfg.plot is not None:
        with cli.replacing(Path(cfg.plot)) as beside:
            beside.write_text(rounds.picture(list(done.values())))
    print(f"by round: python -m offline_lm.query analysis/loop.sql store={cfg.store}")
    own = [done[here.arm if number else rounds.LOGS, number] for number in range(cfg.rounds + 1)]
    return {"loop": here.id, "arm": here.arm, "rounds": [each.told() for each in own]}


def _check(cfg: DictConfig) -> None:
    if not isinstance(cfg.name, str) or not re.fullmatch(r"[\w-]+", cfg.name, re.ASCII):
        raise UserError(f"name={cfg.name}: letters, digits, - and _ are wanted")
    for key, least in (("rounds", 1), ("seed", 0), ("kl_steps", 0), ("resamples", 1), ("collect.episodes", 1)):
        value = OmegaConf.select(cfg, key)
        if type(value) is not int or value < least or (key == "collect.episodes" and value > SEEDS):
            upto = f" to {SEEDS}" if key == "collect.episodes" else ""
            raise UserError(f"{key}={value}: a whole number from {least}{upto} is wanted")
    for key in ("online", "represent_once"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]}: true or false is wanted")
    if cfg.fresh is not None and (type(cfg.fresh) not in (int, float) or not 0 < cfg.fresh < 1):
        raise UserError(f"fresh={cfg.fresh}: null or a share between 0 and 1 is wanted")
    if cfg.fresh is not None and cfg.fit.data.sampling.mix is not None:
        raise UserError("fit.data.sampling.mix: give fresh=null with it, or fresh= alone")
    if not isinstance(cfg.behaviours, ListConfig) or not cfg.behaviours:
        raise UserError(f"behaviours={cfg.behaviours}: a list is wanted")
    played = [(f"behaviours[{i}]", each, ("policy", "episodes")) for i, each in enumerate(cfg.behaviours)]
    for key, each, needed in (*played, ("explore", cfg.explore, ()), ("evaluation", cfg.evaluation, ("episodes",))):
        if not isinstance(each, DictConfig) or any(name not in each for name in needed):
            raise UserError(f"{key}={each}: keys of collect are wanted" + "".join(f", {name} too" for name in needed))
        if unknown := sorted(set(each) - (set(cfg.collect) - _OF_LOOP)):
            raise UserError(f"{key}.{unknown[0]}: no such key of collect, or one that the loop sets")
        if needed and (type(each.episodes) is not int or not 1 <= each.episodes <= SEEDS):
            raise UserError(f"{key}.episodes={each.episodes}: a whole number from 1 to {SEEDS} is wanted")
    for key, (default, instead) in _SET.items():
        if (value := OmegaConf.select(cfg, key)) != default:
            raise UserError(f"{key}={value}: the loop sets it; give {instead}")


@dataclass(frozen=True)
class _Loop:
    """One loop under way."""

    cfg: DictConfig
    store: Store
    id: str
    arm: str
    stopped: list[int]

    def begin(self) -> Round:
        """Round 0: the logs, and how their policies do on the pages that rounds are judged on, where these can play."""
        if self.cfg.where is not None:
            with self.store.connect() as db, replays.explained(self._logs, "where"):
                won = judge.success(db, self._logs, self.cfg.resamples)
            if not (episodes := self._episodes(self._logs)):
                raise UserError(
                    f"where={self.cfg.where}: no episode of {self.store.url} is selected; ingest logs first"
                )
            return Round(0, rounds.LOGS, None, None, "logs", {"success": won, "episodes": Figure(episodes)})
        judged, total = cli.plain(self.cfg.evaluation), sum(each.episodes for each in self.cfg.behaviours)
        shares = [max(1, round(judged["episodes"] * each.episodes / total)) for each in self.cfg.behaviours]
        for each in self.cfg.behaviours:
            self._collect("0", 0, each)
        if (episodes := self._episodes(self._logs)) > total:
            raise UserError(
                f"{self._dataset('0')} of {self.store.url} has {episodes} episodes, and behaviours= play {total}:"
                " a loop with others began there; give another name="
            )
        for each, share in zip(self.cfg.behaviours, shares, strict=True):
            self._collect("unseen/behaviours", UNSEEN, judged, each, {"episodes": share})
        figures = self._played("unseen/behaviours", "0") | {"episodes": Figure(episodes)}
        return Round(0, rounds.LOGS, None, None, "unseen", figures)

    def round(self, number: int, represented: str | None) -> Round:
        """Fit on the rounds before, judge, collect.

        Args:
            represented: the critic whose backbone serves this round too; None: the first round is this.
        """
        cfg, fitted = self.cfg, self._fit_config(number, represented)
        algo, critic = cli.instantiate(fitted.algo), None
        if isinstance(algo, Actor) and not isinstance(algo, Archer) and algo.needs != "nothing":
            if algo.critic is None:
                raise UserError("algo@fit.algo.critic: the algorithm of a critic is wanted")
            first = fitted.copy()
            first.algo = OmegaConf.create(OmegaConf.to_container(fitted.algo.critic, resolve=True))
            critic = fitted.actor.critic = self._fitted(first)
        run = self._fitted(fitted)
        critic = critic or run
        unseen, acting = f"unseen/{run}", {"policy": f"run:{run}"}
        self._collect(unseen, UNSEEN, cfg.evaluation, acting)
        if cfg.online:
            self._collect(str(number), number * SEEDS, cfg.explore, acting)
        figures = self._played(unseen, str(number) if cfg.online else None)
        figures |= self._values(critic, unseen, algo.gamma) | self._kl(cfg.evaluation, acting)
        figures |= {"episodes": Figure(self._episodes(fitted.data.where)), "seconds_fit": Figure(self._seconds(run))}
        if critic != run:
            figures["seconds_critic"] = Figure(self._seconds(critic))
        return Round(number, self.arm, run, critic, "unseen", figures)

    # -- phases --------------------------------------------------------------------------------------------------

    def _collect(self, part: str, first_seed: int, *how: Mapping[Any, Any]) -> None:
        """Episodes into the dataset of that part, those that lack."""
        own = self._playing(*how)
        own.seed, own.first_seed, own.dataset = self.cfg.seed, first_seed, self._dataset(part)
        told = collect.command(own, self.stopped)
        if self.stopped:
            raise KeyboardInterrupt
        if told["duplicates"]:
            raise UserError(
                f"{told['duplicates']} of the episodes of {self._dataset(part)} stand in {self.store.url} under another"
                " name, and an episode is stored once: give another seed= or store="
            )

    def _playing(self, *how: Mapping[Any, Any]) -> DictConfig:
        """The configuration of `collect`, with what is not null of `how`."""
        own = self.cfg.collect.copy()
        own.store = self.cfg.store
        for each in how:
            own.update({key: value for key, value in each.items() if value is not None})
        return own

    def _fitted(self, cfg: DictConfig) -> str:
        """The finished run of that configuration: the store's, else a new one."""
        wanted = _identity(cli.plain(cfg))
        fits = "SELECT run_id, config FROM runs WHERE status = 'finished' AND command = 'fit' ORDER BY written_at"
        for run_id, config in self._ask(fits):
            if _identity(json.loads(config)) == wanted:
                return run_id
        run_id = fit.fit(cfg)["run_id"]
        ((status,),) = self._ask("SELECT status FROM runs WHERE run_id = ?", run_id)
        if status != "finished":
            print(f"{run_id} is {status}: the same command fits anew")
            raise KeyboardInterrupt
        return run_id

    def _fit_config(self, number: int, represented: str | None) -> DictConfig:
        """The configuration of `fit` in that round."""
        own = self.cfg.fit.copy()
        fresh = [self._dataset(str(k)) for k in range(1, number)] if self.cfg.online else []
        own.seed, own.heads_seed = self.cfg.seed, 1000 * self.cfg.seed + number
        own.data.store, own.data.where = self.cfg.store, self._logs
        if fresh:
            of_loop = _any_of(fresh)
            own.data.where = f"({self._logs}) OR {of_loop}"
            if self.cfg.fresh is not None:
                share = self.cfg.fresh
                own.data.sampling.mix = {
                    "logged": {"where": self._logs, "share": 1 - share},
                    "fresh": {"where": of_loop, "share": share},
                }
        if represented is not None and self.cfg.represent_once and own.model.stage.tokens:
            own.model.path, own.model.stage.tokens = str(self._folder(represented) / "backbone"), 0
        return own

    # -- what stands in the store ----------------------------------------------------------------------------------

    def _dataset(self, part: str) -> str:
        return f"loop/{self.id}/{part}"

    @property
    def _logs(self) -> str:
        """SQL: the episodes of round 0."""
        if self.cfg.where is None:
            return _any_of([self._dataset("0")])
        where = str(self.cfg.where).lower() if isinstance(self.cfg.where, bool) else self.cfg.where
        return f"({where}) AND NOT starts_with(coalesce(dataset, ''), 'loop/')"

    def _ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.store.connect() as db:
            return db.execute(sql, list(values)).fetchall()

    def _episodes(self, where: str) -> int:
        return self._ask(f"SELECT count(*) FROM episodes WHERE {where}")[0][0]

    def _seconds(self, run: str) -> float:
        return self._ask("SELECT seconds FROM runs WHERE run_id = ?", run)[0][0]

    def _folder(self, run: str) -> Path:
        return Path(self._ask("SELECT run_dir FROM runs WHERE run_id = ?", run)[0][0])

    # -- figures ---------------------------------------------------------------------------------------------------

    def _played(self, unseen: str, collected: str | None) -> dict[str, Figure]:
        """Success on unseen pages, and where the policy explored; seconds that took."""
        figures = {}
        with self.store.connect() as db:
            for part, suffix, phase in ((unseen, "", "evaluate"), (collected, "_exploring", "collect")):
                if part is not None:
                    where = _any_of([self._dataset(part)])
                    figures[f"success{suffix}"] = judge.success(db, where, self.cfg.resamples)
                    spans = db.sql(f"SELECT epoch(started_at), duration_s FROM episodes WHERE {where}").fetchall()
                    figures[f"seconds_{phase}"] = Figure(judge.busy(spans))
        return figures

    def _values(self, critic: str, unseen: str, gamma: float) -> dict[str, Figure]:
        folder = self._folder(critic)
        if not (folder / "critic.json").is_file():  # algo=bc has none
            return {}
        with self.store.connect() as db:
            where = _any_of([self._dataset(unseen)])
            return judge.calibration(Critic.from_pretrained(folder), db, where, gamma, self.cfg.resamples)

    def _kl(self, *how: Mapping[Any, Any]) -> dict[str, Figure]:
        if not self.cfg.kl_steps:
            return {}
        own = self._playing(*how)
        policy = policies.named(own.policy, **policies.Settings.of(cli.plain(own)))
        with self.store.connect() as db:
            return {"kl": judge.kl_to_logs(policy, db, self._logs, self.cfg.kl_steps)}


def _any_of(datasets: Sequence[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in datasets)
    return f"dataset IN ({listed})"


def _identity(config: dict[str, Any]) -> str:
    """What tells a fit from others."""
    kept = {k: v for k, v in config.items() if k not in _ANYHOW}
    kept["data"] = {k: v for k, v in config["data"].items() if k not in ("store", "resident")}
    return json.dumps(kept, sort_keys=True)


if __name__ == "__main__":
    raise SystemExit(main())
