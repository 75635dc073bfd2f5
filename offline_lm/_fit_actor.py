"""How `fit` trains an actor: a critic's values out of the store, advantages, and updates of a language model.

The critic comes first, as a run of its own whose values stand in the store (`actor.critic` names one that is there).
What the actor learns from is read back from there, so that it is what a query shows. The updates are in `_fit_updates`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from offline_lm import cli
from offline_lm._fit_growth import Growing
from offline_lm._fit_logged import fitting_run, read_logged, training_side
from offline_lm._fit_memory import Peaks
from offline_lm._fit_prepare import check_starting_policy, reading, starting_policy, tokenized
from offline_lm._fit_report import say_alarms, say_selected
from offline_lm._fit_updates import ActorLearner, Drawn
from offline_lm.algos.actor import Actor
from offline_lm.batches.sampling_store import from_store
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.models.encoding import training
from offline_lm.ope import updates
from offline_lm.policy import save_policy
from offline_lm.run import Run, failing
from offline_lm.values import alarm_rows


def fit_actor(
    cfg: DictConfig, algo: Actor, name: str, device: torch.device, train_critic: Callable[[DictConfig], dict[str, Any]]
) -> dict[str, Any]:
    """Train an actor; its critic first, with `train_critic`, where it needs one and `actor.critic` names none.

    Raises:
        UserError: a sweep, rounds with a critic, or what `read_logged` and `logged_logprobs` refuse.
    """
    if cfg.sweep is not None:
        raise UserError(f"sweep: algo={name} trains one actor; --multirun runs each setting by itself")
    rounds = cfg.actor.rounds or 1
    if rounds > 1 and algo.needs != "nothing":
        raise UserError(
            f"actor.rounds={rounds}: algo={name} learns from the values of a run that is done, and what is new in the"
            " store has none; give actor.rounds=1, or algo=archer, whose critic goes on learning"
        )
    check_starting_policy(cfg)
    critic_run = _critic_run(cfg, algo, train_critic)
    peaks = Peaks(device)
    with ExitStack() as stack:
        source = Growing(cfg, algo.gamma, stack)
        say_selected(source.replay)
        run = Run.start(source.store, cfg, name)
        with failing([run]):
            with peaks.stage("prepare"):
                model, tokenizer, tokens = starting_policy(cfg, source.store, source.db, source.replay, run, device)
            torch.manual_seed(cfg.seed)  # adapters begin at random
            how = {"how": cfg.actor.train, "target": "heads", "adapters": cli.plain(cfg.model.lora)}
            checkpointing = cfg.model.gradient_checkpointing
            with peaks.stage("actor"), training(model, **how, gradient_checkpointing=checkpointing) as (_, autocast):
                drawn, counted = _drawn(cfg, algo, name, source, tokens, critic_run)
                learner = ActorLearner(cfg, algo, model, drawn, run, source.store, device, autocast)
                before = learner.health()
                for number in range(1, rounds + 1):
                    if number > 1:
                        if source.grew(run):
                            tokens = tokenized(cfg, source.store, source.db, source.replay, tokenizer, grounding=False)
                            drawn, counted = _drawn(
                                cfg, algo, name, source, tokens, critic_run, start=learner.drawn.taken
                            )
                        learner.turn_to(algo, drawn)
                    whole = learner.train(source.db, until=round(cfg.actor.steps * number / rounds))
                    if not whole:
                        break
                after = learner.health()
            save_policy(run.folder, model, tokenizer, {**reading(cfg), "critic_run": critic_run})
            raised = updates.alarms(before, after, learner.last, learner.drawn.silent)
            metrics = {**{f"start_{k}": v for k, v in before.items()}, **after, **learner.last, **counted}
            store_metrics(run, name, metrics)
            source.store.append("diagnostics", alarm_rows({"run_id": run.run_id, "group": name}, raised))
            run.finish("finished" if whole else "interrupted", learner.step, {**metrics, **peaks.metrics})
    say_likelihoods(before, after, held_out=bool(source.replay.held_out.any()))
    say_alarms([run], [raised])
    seconds = round(run.seconds, 1)
    print(f"{run.run_id}: {'finished' if whole else 'interrupted, but usable'} in {seconds} s, {peaks}")
    return {
        "run_id": run.run_id, "steps": learner.step, "seconds": seconds, "critic_run": critic_run, "metrics": metrics,
        "alarms": [a._asdict() for a in raised],
    }  # fmt: skip


def store_metrics(run: Run, name: str, metrics: dict[str, float]) -> None:
    """Numbers of an actor as rows of the table `diagnostics`."""
    row = {"run_id": run.run_id, "suite": "actor", "group": name}
    run.store.append("diagnostics", [{**row, "name": k, "value": v} for k, v in metrics.items() if np.isfinite(v)])


def say_likelihoods(before: dict[str, float], after: dict[str, float], *, held_out: bool) -> None:
    told = ", ".join(f"{k.removeprefix('logprob_')} {before[k]:.3f} to {after[k]:.3f}" for k in before if "prob" in k)
    print(f"log-likelihood of a logged response, {'held-out' if held_out else 'training'} tasks: {told}")


def _critic_run(cfg: DictConfig, algo: Actor, train_critic: Callable[[DictConfig], dict[str, Any]]) -> str | None:
    """The run whose values are learnt from: that of `actor.critic`, or a new one of `algo.critic`."""
    if algo.needs == "nothing":
        return None
    if cfg.actor.critic is not None:
        return fitting_run(cfg, algo.gamma)
    if algo.critic is None:
        raise UserError("algo.critic: the algorithm of a critic is wanted, or actor.critic=RUN")
    if algo.critic.gamma != algo.gamma:
        raise UserError(f"algo.critic.gamma={algo.critic.gamma}: the actor's returns have algo.gamma={algo.gamma}")
    own = cfg.copy()
    own.algo = OmegaConf.create(OmegaConf.to_container(cfg.algo.critic, resolve=True))
    return train_critic(own)["run_id"]


def _drawn(
    cfg: DictConfig, algo: Actor, name: str, source: Growing, tokens: Tokens, critic_run: str | None, start: int = 0
) -> tuple[Drawn, dict[str, float]]:
    """What there is to train on, and what the algorithm counted."""
    replay = source.replay
    logged = read_logged(source.db, replay, tokens, critic_run, algo.needs)
    advantages, counted = algo.advantages(training_side(logged, replay))
    draws = from_store(source.db, source.store, replay, seed=cfg.seed, **cli.plain(cfg.data.sampling))
    print(*draws.said, sep="\n", end="\n" * bool(draws.said))
    candidates = algo.candidates
    drawn = Drawn(cfg, replay, tokens, advantages.numpy(), logged, draws, candidates=candidates, start=start)
    print(f"{name}: {drawn.told()}" + "".join(f", {k} {v:.3f}" for k, v in counted.items()))
    return drawn, counted
