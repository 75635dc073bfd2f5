"""How `fit algo=archer` trains: a critic of the actor's own values and the actor take turns, round by round.

In a round the store is read again, what the actor would do at its states is found out, the critic's heads learn the
values of that from cached features of a frozen backbone, and the actor, a language model of its own, climbs them. Both
are of one run: `score` reads its critic, `offline_lm.policy` its actor.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from offline_lm import cli
from offline_lm._fit_actor import say_likelihoods, store_metrics
from offline_lm._fit_checks import check_alone
from offline_lm._fit_growth import Growing
from offline_lm._fit_logged import complete, read_logged
from offline_lm._fit_memory import Peaks
from offline_lm._fit_prepare import (
    check_starting_policy,
    compute_features,
    described,
    keep_backbone,
    kept_outside,
    prepare,
    reading,
    tokenized,
    tokens_key,
)
from offline_lm._fit_report import ranks, say_alarms, say_compared, say_next, say_selected, target_gaps, write_back
from offline_lm._fit_sweep import Setting
from offline_lm._fit_train import (
    Learner,
    estimate,
    examples,
    head_options,
    return_range,
    target_rate,
    train,
    whitening_floor,
)
from offline_lm._fit_updates import ActorLearner, Drawn
from offline_lm.algos.archer import Archer
from offline_lm.algos.bc import BC
from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.responses import with_responses
from offline_lm.batches.sampling import Sampler
from offline_lm.batches.sampling_store import from_store
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.losses.expectations import candidate_softmax
from offline_lm.models import acting, backbone, generation
from offline_lm.models.batching import CachedBatches, branches_of
from offline_lm.models.critic import save_heads
from offline_lm.models.encoding import training
from offline_lm.models.features import Features
from offline_lm.models.heads import Heads
from offline_lm.ope import updates
from offline_lm.ope.diagnostics import Estimates
from offline_lm.policy import end_of, save_policy, start_of
from offline_lm.run import Run, failing
from offline_lm.types import Batch, Logged

Array = np.ndarray

ROUNDS = 10
"""Where `actor.rounds` is null."""


def fit_archer(cfg: DictConfig, algo: Archer, name: str, device: torch.device) -> dict[str, Any]:
    """Train critic and actor in turn, score every step, write the values back.

    Raises:
        UserError: a setting that it does not take, or no known return to learn from.
    """
    check_alone(cfg, "archer", {"sweep": None, "model.train": "heads", "actor.critic": None})
    if algo.critic.gamma != algo.gamma:
        raise UserError(f"algo.critic.gamma={algo.critic.gamma}: the actor's returns have algo.gamma={algo.gamma}")
    check_starting_policy(cfg)
    rounds, settings = cfg.actor.rounds or ROUNDS, cfg.actor
    peaks = Peaks(device)
    with ExitStack() as stack:
        source = Growing(cfg, algo.gamma, stack)
        say_selected(source.replay)
        return_range(source.replay)  # raises where no return is known
        run = Run.start(source.store, cfg, name)
        with failing([run]):
            with peaks.stage("prepare"):
                reader, tokenizer, _ = prepare(cfg, source.store, source.db, source.replay, run, device)
                tokens = tokenized(cfg, source.store, source.db, source.replay, tokenizer, grounding=False)
                model = _actor(cfg, source, reader, tokenizer, device)
            torch.manual_seed(cfg.seed)  # adapters begin at random
            how = {"how": settings.train, "target": "heads", "adapters": cli.plain(cfg.model.lora)}
            checkpointing = cfg.model.gradient_checkpointing
            with peaks.stage("rounds"), training(model, **how, gradient_checkpointing=checkpointing) as (_, autocast):
                draws = _draws(cfg, source)
                logs = read_logged(source.db, source.replay, tokens, None)
                clones = BC(algo.gamma, "sum")
                every = clones.advantages(logs)[0].numpy()
                drawn = Drawn(cfg, source.replay, tokens, every, logs, draws)
                actor = ActorLearner(cfg, clones, model, drawn, run, source.store, device, autocast)
                before = actor.health()
                cloned = round(settings.clone_first * settings.steps)
                whole = actor.train(source.db, until=cloned)
                critic = _Critic(cfg, algo, name, reader, run, device)
                mine: Estimates | None = None
                for number in range(1, rounds + 1):
                    if number > 1 and source.grew(run):
                        tokens = tokenized(cfg, source.store, source.db, source.replay, tokenizer, grounding=False)
                        draws = _draws(cfg, source)
                    replay = source.replay
                    able = replay.acted & tokens.acted & tokens.usable & ~replay.held_out_rows
                    known = actions_of(
                        model, tokens, able, complete(source.db, replay), algo.samples, end=end_of(tokenizer)[-1],
                        budget=actor.budget, autocast=autocast, seed=(cfg.seed, number),
                    )  # fmt: skip
                    if number == 1:
                        print(f"{name}: {known.told(able)}")
                    critic.read(source, known, draws)
                    share = algo.critic_warmup + (1 - algo.critic_warmup) * number / rounds
                    mine, learnt = critic.train(until=round(cfg.optim.steps * share))
                    whole = whole and learnt
                    run.log(actor.step, known.numbers(mine, replay) | {"episodes": len(replay.episode_ids)}, "round/")
                    if not whole:
                        break
                    logged = known.valued(read_logged(source.db, replay, known.tokens, None), mine)
                    advantages = algo.advantages(logged)[0].numpy()
                    actor.turn_to(algo, Drawn(
                        cfg, replay, known.tokens, advantages, logged, draws, candidates=algo.candidates,
                        proposal=known.proposal, start=actor.drawn.taken,
                    ))  # fmt: skip
                    whole = actor.train(source.db, until=cloned + round((settings.steps - cloned) * number / rounds))
                    if not whole:
                        break
                after = actor.health()
            assert mine is not None
            setting = critic.setting
            save_heads(run.folder, critic.learner.heads, {**described(setting), "grounding": False}, kept_outside(cfg))
            keep_backbone(cfg, reader, tokenizer, run.folder)
            save_policy(run.folder, model, tokenizer, reading(cfg))
            with peaks.stage("values"):
                gaps = target_gaps(name, critic.learner, mine, critic.feats, replay, device)
                table, compared, raised = write_back(
                    cfg, source.store, source.db, run, replay, known.tokens, mine, setting, ranks(critic.feats) | gaps
                )
            raised = [*updates.alarms(before, after, actor.last, actor.drawn.silent), *raised]
            metrics = {**{f"start_{k}": v for k, v in before.items()}, **after, **actor.last}
            store_metrics(run, name, metrics)
            metrics = {**table[name], **metrics, **peaks.metrics}
            run.finish("finished" if whole else "interrupted", actor.step, metrics)
    say_compared(setting, run, table, compared, replay)
    say_likelihoods(before, after, held_out=bool(replay.held_out.any()))
    say_alarms([run], [raised])
    say_next(cfg, run)
    seconds = round(run.seconds, 1)
    print(f"{run.run_id}: {'finished' if whole else 'interrupted, but usable'} in {seconds} s, {peaks}")
    return {
        "run_id": run.run_id, "steps": actor.step, "seconds": seconds, "critic_run": run.run_id, "metrics": metrics,
        "baselines": table, "alarms": [alarm._asdict() for alarm in raised],
    }  # fmt: skip


def _actor(cfg: DictConfig, source: Growing, reader: Any, tokenizer: Any, device: torch.device) -> Any:
    """The language model that acts: a copy of the critic's backbone, or that of `actor.path`."""
    if cfg.actor.path is None:
        return copy.deepcopy(reader)
    model, own = backbone.load(start_of(cfg.actor.path, cfg.data.store), cfg.model.dtype, "actor.path")
    if tokens_key(cfg, source.db, own, False) != tokens_key(cfg, source.db, tokenizer, False):
        raise UserError(
            f"actor.path={cfg.actor.path}: its tokenizer is not that of model=, whose features the critic reads; begin"
            " with an actor of this store and model=, or give the same model.path"
        )
    return model.to(device)


def _draws(cfg: DictConfig, source: Growing) -> Sampler:
    draws = from_store(source.db, source.store, source.replay, seed=cfg.seed, **cli.plain(cfg.data.sampling))
    print(*draws.said, sep="\n", end="\n" * bool(draws.said))
    return draws


# -- what the actor would do ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Actions:
    """What an actor could do at N states, and how likely each of the A responses is to it.

    Attributes:
        tokens: the logs, with the responses that were drawn of the actor.
        proposal: float64 [A], `losses.expectations`: -inf where a response stands for nothing that the actor does.
        probability: float32 [A], among the responses to a state; 0 for all of one that was not asked about.
        drawn: int, states whose responses were drawn.
    """

    tokens: Tokens
    proposal: Array
    probability: Tensor
    drawn: int

    def told(self, asked: Array) -> str:
        n = int(asked.sum())
        exact = f"the actor is valued exactly, over all candidates, at {n - self.drawn} of {n} states"
        return exact + (f", by responses drawn of it at {self.drawn}" if self.drawn else "")

    def valued(self, logged: Logged, estimates: Estimates) -> Logged:
        """`logged` with a critic's values; NaN is Q of a response that stands for nothing."""
        assert estimates.q is not None
        q = np.where(self.proposal > -np.inf, estimates.q, np.nan)
        return replace(logged, v=torch.from_numpy(estimates.v), response_q=torch.from_numpy(q))

    def numbers(self, estimates: Estimates, replay: Replay) -> dict[str, float]:
        """What the critic thinks that the actor, and that the logged action, is worth at the states asked about."""
        owner = np.repeat(np.arange(len(replay)), np.diff(self.tokens.branch_ptr))
        p = self.probability.double().cpu().numpy()
        asked = np.bincount(owner, p, minlength=len(replay)) > 0
        assert estimates.q is not None
        of_logs = estimates.q[self.tokens.branch_ptr[:-1][asked]].mean()
        return {"q_actor": float((p * estimates.q).sum() / asked.sum()), "q_logged": float(of_logs)}


def actions_of(
    model: Any, tokens: Tokens, asked: Array, whole: Array, samples: int, *, end: int, budget: int,
    autocast: torch.dtype | None = None, seed: tuple[int, int] = (0, 0),
) -> Actions:  # fmt: skip
    """What `model` would do at the states `asked` about (bool [N]) as it is now; equal states are asked once.

    Where the candidates are the `whole` choice (bool [N]) they are the actions. Else `samples` responses are drawn, up
    to the length of the longest logged one; the candidates there, the logged action too, are drawn or do not count.
    """
    model.eval()
    first, _ = acting.distinct(tokens)
    rows = np.flatnonzero(asked & ~whole)
    longest = int(acting.lengths(tokens, tokens.branch_ptr[:-1][tokens.acted]).max())
    prompts = sorted(set(first[rows].tolist()))
    responses = generation.generate(
        model, [tokens.prompt(n).tolist() for n in prompts], samples,
        [np.random.default_rng([*seed, n]) for n in prompts], end=end, max_tokens=longest,
    )  # fmt: skip
    said = {n: Counter(tuple(each.ids) for each in own) for n, own in zip(prompts, responses, strict=True)}
    logged = {n: {tuple(tokens.response(a).tolist()) for a in _branches(tokens, n)} for n in rows.tolist()}
    more = {n: [ids for ids in said[int(first[n])] if ids not in logged[n]] for n in rows.tolist()}
    tokens = with_responses(tokens, more)
    counts = np.repeat((asked & whole).astype(np.float64), np.diff(tokens.branch_ptr))
    for n in rows.tolist():
        for a in _branches(tokens, n):
            counts[a] = said[int(first[n])][tuple(tokens.response(a).tolist())]
    owner = np.repeat(np.arange(len(tokens)), np.diff(tokens.branch_ptr))
    _, same = acting.distinct(tokens)
    needed = np.unique(same[counts > 0])
    logprobs = np.zeros(len(counts))
    found = acting.all_logprobs(model, tokens, needed, budget=budget, autocast=autocast)
    logprobs[needed] = acting.of_responses(tokens, needed, found)
    logprobs = logprobs[same]
    with np.errstate(divide="ignore"):
        proposal = np.log(counts) - np.where(whole[owner], 0.0, logprobs)
    scores = torch.from_numpy(logprobs + proposal)
    probability = candidate_softmax(scores, torch.from_numpy(owner), len(tokens)).float()
    return Actions(tokens, proposal, probability, len(rows))


def _branches(tokens: Tokens, n: int) -> range:
    return range(int(tokens.branch_ptr[n]), int(tokens.branch_ptr[n + 1]))


# -- the critic ----------------------------------------------------------------------------------------------------


class _Critic:
    """Heads on features of a frozen backbone, which go on learning as the actor and the store change."""

    def __init__(self, cfg: DictConfig, algo: Archer, name: str, reader: Any, run: Run, device: torch.device) -> None:
        self.cfg, self.reader, self.run, self.device = cfg, reader, run, device
        self.setting = Setting(cfg, algo.critic, name, {})
        self.step = 0
        self._tokens: Tokens | None = None

    def read(self, source: Growing, known: Actions, draws: Sampler) -> None:
        """Learn from these logs, and of this actor, from now on."""
        self.replay, self.draws, replay = source.replay, draws, source.replay
        if known.tokens is not self._tokens:
            self._tokens = known.tokens
            self.feats: Features = compute_features(self.cfg, source.store, self.reader, known.tokens)
            self.batches = CachedBatches(
                self.feats, replay, known.tokens, self.device, candidates=True, resident=self.cfg.data.resident
            )
        if not self.step:
            self.learner = self._learner(replay, known.tokens)
        if draws.beta:
            weights = draws.weights(len(replay.episode_ids))[replay.episode_of]
            self.learner.weights = torch.from_numpy(weights).float().to(self.device)
        self.probability = known.probability.to(self.device)

    def train(self, until: int) -> tuple[Estimates, bool]:
        """The updates up to number `until`; what is estimated then, and whether Ctrl-C did not end them."""
        assert self._tokens is not None
        optim, seed = self.cfg.optim, self.cfg.seed
        drawn = replays.episode_batches(self.replay, optim.batch_size, seed, draws=self.draws, start=self.step)
        steps = range(self.step + 1, until + 1)
        self.step, whole = train([self.learner], self._batch, self.replay, optim, seed, drawn, steps)
        return estimate([self.learner], self.feats, self.device)[0], whole

    def _batch(self, rows: Array) -> Batch:
        assert self._tokens is not None
        branches, _ = branches_of(np.asarray(self._tokens.branch_ptr), rows)
        return replace(self.batches(rows), candidate_weight=self.probability[torch.from_numpy(branches)])

    def _learner(self, replay: Replay, tokens: Tokens) -> Learner:
        cfg = self.cfg
        low, high = return_range(replay)
        floor = whitening_floor(self.feats, replay, tokens) if cfg.model.heads.whitening == "auto" else None
        torch.manual_seed(cfg.seed if cfg.heads_seed is None else cfg.heads_seed)
        heads = Heads(self.reader.config.hidden_size, **head_options(self.setting, floor), low=low, high=high).to(
            self.device
        )
        heads.whiten(*(x.to(self.device) for x in examples(self.feats, replay, tokens)))
        return Learner(self.setting.algo, heads, cfg.optim, self.run, rate=target_rate(replay, cfg.optim.steps))
