"""How `fit` trains an actor: a critic's values out of the store, advantages, and updates of a language model.

The critic comes first, as a run of its own whose values stand in the store (`actor.critic` names one that is there).
What the actor learns from is read back from there, so that it is what a query shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from offline_lm import cli
from offline_lm._fit_logged import fitting_run, logged_logprobs, read_logged, training_side
from offline_lm._fit_memory import Peaks
from offline_lm._fit_prepare import prepare, selected, tokenized
from offline_lm._fit_report import say_alarms, say_selected
from offline_lm.algos.actor import Actor
from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.sampling import Sampler
from offline_lm.batches.sampling_store import from_store
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.losses.clipping import update_health
from offline_lm.losses.policy import token_weights
from offline_lm.models import acting, backbone, features
from offline_lm.models.acting import Chosen
from offline_lm.models.devices import row_tokens
from offline_lm.models.encoding import training
from offline_lm.ope import updates
from offline_lm.policy import save_policy, start_of
from offline_lm.run import Run, failing
from offline_lm.store import Store
from offline_lm.store.connect import explained
from offline_lm.types import Logged, Responses
from offline_lm.values import alarm_rows

Array = np.ndarray


def fit_actor(
    cfg: DictConfig, algo: Actor, name: str, device: torch.device, train_critic: Callable[[DictConfig], dict[str, Any]]
) -> dict[str, Any]:
    """Train an actor; its critic first, with `train_critic`, where it needs one and `actor.critic` names none.

    Raises:
        UserError: a sweep, or what `read_logged` and `logged_logprobs` refuse.
    """
    if cfg.sweep is not None:
        raise UserError(f"sweep: algo={name} trains one actor; --multirun runs each setting by itself")
    critic_run = _critic_run(cfg, algo, train_critic)
    store = Store.open(cfg.data.store, cfg.data.version).frozen()
    peaks = Peaks(device)
    with store.connect() as db, explained(store):
        replay = selected(cfg, db, algo.gamma)
        say_selected(replay)
        run = Run.start(store, cfg, name)
        with failing([run]):
            with peaks.stage("prepare"):
                model, tokenizer, tokens = _start(cfg, store, db, replay, run, device)
            torch.manual_seed(cfg.seed)  # adapters begin at random
            how = {"how": cfg.actor.train, "target": "heads", "adapters": cli.plain(cfg.model.lora)}
            checkpointing = cfg.model.gradient_checkpointing
            with peaks.stage("actor"), training(model, **how, gradient_checkpointing=checkpointing) as (_, autocast):
                logged = read_logged(db, replay, tokens, critic_run, algo.needs)
                advantages, counted = algo.advantages(training_side(logged, replay))
                draws = from_store(db, store, replay, seed=cfg.seed, **cli.plain(cfg.data.sampling))
                print(*draws.said, sep="\n", end="\n" * bool(draws.said))
                drawn = _Drawn(cfg, algo, replay, tokens, advantages.numpy(), logged, draws)
                print(f"{name}: {drawn.told()}" + "".join(f", {k} {v:.3f}" for k, v in counted.items()))
                learner = _Learner(cfg, algo, model, drawn, run, store, device, autocast)
                before = learner.health()
                whole = learner.train(db)
                after = learner.health()
            save_policy(run.folder, model, tokenizer, {**_described(cfg), "critic_run": critic_run})
            raised = updates.alarms(before, after, learner.last, drawn.silent)
            metrics = {**{f"start_{k}": v for k, v in before.items()}, **after, **learner.last, **counted}
            rows = [
                {"run_id": run.run_id, "suite": "actor", "group": name, "name": k, "value": v}
                for k, v in metrics.items()
                if np.isfinite(v)
            ]
            store.append("diagnostics", rows + alarm_rows({"run_id": run.run_id, "group": name}, raised))
            run.finish("finished" if whole else "interrupted", learner.step, {**metrics, **peaks.metrics})
    print(
        f"log-likelihood of a logged response, {'held-out' if replay.held_out.any() else 'training'} tasks: "
        + ", ".join(f"{k.removeprefix('logprob_')} {before[k]:.3f} to {after[k]:.3f}" for k in before if "prob" in k)
    )
    say_alarms([run], [raised])
    seconds = round(run.seconds, 1)
    print(f"{run.run_id}: {'finished' if whole else 'interrupted, but usable'} in {seconds} s, {peaks}")
    return {
        "run_id": run.run_id, "steps": learner.step, "seconds": seconds, "critic_run": critic_run, "metrics": metrics,
        "alarms": [a._asdict() for a in raised],
    }  # fmt: skip


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


def _start(
    cfg: DictConfig, store: Store, db: duckdb.DuckDBPyConnection, replay: Replay, run: Run, device: torch.device
) -> tuple[Any, Any, Tokens]:
    """The policy that training begins with, and the logs in its tokens."""
    if cfg.actor.path is None:
        return prepare(cfg, store, db, replay, run, device)
    model, tokenizer = backbone.load(start_of(cfg.actor.path, cfg.data.store), cfg.model.dtype)
    return model.to(device), tokenizer, tokenized(cfg, store, db, replay, tokenizer)


def _described(cfg: DictConfig) -> dict[str, Any]:
    """What a saved policy must know to read pages as it did in training."""
    shown = {key: cfg.data[key] for key in ("max_tokens", "history", "context")}
    return {**shown, "dtype": cfg.model.dtype}


class _Drawn:
    """What an actor is trained on: responses of the training side with an advantage, and batches of them."""

    def __init__(
        self, cfg: DictConfig, algo: Actor, replay: Replay, tokens: Tokens, advantages: Array, logged: Logged,
        draws: Sampler,
    ) -> None:  # fmt: skip
        self.cfg, self.replay, self.tokens, self.logged, self.draws = cfg, replay, tokens, logged, draws
        of_episode = draws.weights(len(replay.episode_ids))
        self.importance = np.repeat(of_episode[replay.episode_of], np.diff(tokens.branch_ptr))
        rows = np.flatnonzero(logged.acted.numpy())
        self.advantages = advantages
        if not algo.candidates:
            self.advantages = np.full(len(tokens.response_ptr) - 1, np.nan)
            self.advantages[tokens.branch_ptr[rows]] = advantages[rows]
        acted = np.repeat(logged.acted.numpy(), np.diff(tokens.branch_ptr))
        train = np.repeat(~replay.held_out_rows, np.diff(tokens.branch_ptr))
        self.counted = np.flatnonzero(acted & train & ~np.isnan(self.advantages))
        self.of_state = np.searchsorted(self.counted, tokens.branch_ptr)
        eligible = np.concatenate([stratum.episodes for stratum in draws.strata])
        episode = np.repeat(replay.episode_of, np.diff(tokens.branch_ptr))
        if not np.isin(episode[self.counted], eligible).any():
            raise UserError(
                "no response that may be drawn has an advantage: nothing to train an actor on"
                " (data.where, data.sampling, and what the algorithm leaves out)"
            )
        self.longest = int(acting.lengths(tokens, self.counted).max())
        self.silent = float((self.advantages[self.counted] == 0).mean())

    def told(self) -> str:
        known = self.advantages[self.counted]
        return f"{len(known)} responses, advantage {known.mean():.3f} ± {known.std():.3f}, {self.silent:.1%} of them 0"

    def batches(self) -> Iterator[tuple[Array, Array]]:
        """Endless batches of at least `actor.batch_size` responses that count, ascending, and how often each was drawn.

        Episodes that hold none of them take no place in a batch.
        """
        size, seed = self.cfg.actor.batch_size, self.cfg.seed
        drawn: list[Array] = []
        for rows in replays.episode_batches(self.replay, size, seed, draws=self.draws):
            spans = zip(self.of_state[rows].tolist(), self.of_state[rows + 1].tolist(), strict=True)
            drawn += [self.counted[a:b] for a, b in spans if b > a]
            if sum(map(len, drawn)) >= size:
                yield np.unique(np.concatenate(drawn), return_counts=True)
                drawn = []


class _Learner:
    """The updates of an actor. Its gradient is clipped by itself (trap 9)."""

    def __init__(
        self, cfg: DictConfig, algo: Any, model: Any, drawn: _Drawn, run: Run, store: Store, device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.cfg, self.algo, self.model, self.drawn, self.run, self.store = cfg, algo, model, drawn, run, store
        self.device, self.autocast, self.budget = device, autocast, cfg.actor.row_tokens or row_tokens(device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=cfg.actor.lr, weight_decay=cfg.actor.weight_decay, fused=True
        )
        self.step = 0
        self.last: dict[str, float] = {}
        self.old: Array | None = None
        self.reference: Array | None = None

    def train(self, db: duckdb.DuckDBPyConnection) -> bool:
        """All updates; whether Ctrl-C did not end them."""
        settings, algo = self.cfg.actor, self.algo
        cloned = round(settings.clone_first * settings.steps) if algo.ratios != "none" else 0
        batches = self.drawn.batches()
        try:
            with tqdm(total=settings.steps, desc="actor", unit="update") as bar:
                while self.step < settings.steps:
                    if algo.ratios != "none" and self.step == cloned:
                        self._compare_with(db)
                    branches, times = next(batches)
                    self.step += 1
                    logged = self._update(branches, times, clone=self.step <= cloned)
                    bar.update()
                    if self.step % settings.log_every == 0 or self.step == settings.steps:
                        self.run.log(self.step, logged)
                        bar.set_postfix({k.removeprefix("loss/"): f"{v:.4f}" for k, v in logged.items()})
        except KeyboardInterrupt:
            print(f"interrupted after {self.step} of {settings.steps} updates: keeping what was learnt")
            return False
        return True

    def _update(self, branches: Array, times: Array, *, clone: bool) -> dict[str, float]:
        """One step down the gradient over these responses, which is summed over parts that fit a forward pass."""
        settings, tokens = self.cfg.actor, self.drawn.tokens
        sizes = acting.lengths(tokens, branches)
        aggregate = "sum" if clone else self.algo.aggregate
        weight = token_weights(
            torch.from_numpy(sizes), aggregate, constant=self.drawn.longest if aggregate == "constant" else None
        )
        weight *= torch.from_numpy(np.repeat(self.drawn.importance[branches] * times, sizes))
        ends = np.cumsum(sizes)
        done, losses, seen, entropies = 0, [], [], []
        self.model.eval()  # without dropout, so that ratios begin at 1
        self.optimizer.zero_grad()
        for part in Chosen.of(tokens, branches).rows(tokens, self.budget):
            own = slice(done, done + len(part))
            span = slice(int(ends[done] - sizes[done]), int(ends[own.stop - 1]))
            batch, entropy = self._responses(part, weight[span], clone)
            found = {"clone": -(batch.weight * batch.logprobs).sum()} if clone else self.algo.loss(batch)
            total = torch.stack(list(found.values())).sum()
            if not total.isfinite():
                raise FloatingPointError(f"update {self.step}: the loss is {total.item()}; lower actor.lr")
            total.backward()
            losses.append({f"loss/{name}": value.item() for name, value in found.items()})
            seen.append((batch.logprobs.detach(), batch.old))
            entropies.append(entropy)
            done = own.stop
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        if not norm.isfinite():
            raise FloatingPointError(f"update {self.step}: the norm of the gradient is {norm.item()}; lower actor.lr")
        share = min(1.0, self.step / max(settings.warmup, 1), 1.05 - self.step / settings.steps)
        self.optimizer.param_groups[0]["lr"] = settings.lr * share
        self.optimizer.step()
        self.last = {"entropy": torch.cat(entropies).mean().item()}
        if self.algo.ratios != "none" and not clone:
            logprobs, old = (torch.cat(x) for x in zip(*seen, strict=True))
            self.last |= update_health(
                logprobs, old, torch.from_numpy(acting.owners(sizes)).to(self.device), len(branches),
                low=self.algo.clip_low, high=self.algo.clip_high, sequence_level=self.algo.ratios == "response",
                advantages=torch.from_numpy(self.drawn.advantages[branches]).to(self.device, torch.float32),
            )  # fmt: skip
        summed = {name: sum(part[name] for part in losses) for name in losses[0]}
        return summed | {"actor_grad_norm": norm.item()} | self.last

    def _responses(self, part: Chosen, weight: Tensor, clone: bool) -> tuple[Responses, Tensor]:
        tokens, branches = self.drawn.tokens, part.branches
        logprobs, entropy = acting.response_logprobs(self.model, tokens, part, autocast=self.autocast, entropy=True)
        old = reference = logprobs.detach()
        if self.algo.ratios != "none" and not clone:
            at = acting.spans(tokens, branches, self.drawn.counted)
            assert self.old is not None
            assert self.reference is not None
            old, reference = (torch.from_numpy(x[at]).to(self.device) for x in (self.old, self.reference))
        owner = acting.owners(acting.lengths(tokens, branches))
        state = acting.owners([len(own) for own in part.responses])
        return Responses(
            logprobs=logprobs, weight=weight.to(self.device, torch.float32), old=old, reference=reference,
            owner=torch.from_numpy(owner).to(self.device), state=torch.from_numpy(state).to(self.device),
            advantages=torch.from_numpy(self.drawn.advantages[branches]).to(self.device, torch.float32),
        ), entropy  # fmt: skip

    def _compare_with(self, db: duckdb.DuckDBPyConnection) -> None:
        """Log-probabilities of the policy that ratios are taken to, and of the one that training goes on from here."""
        counted, tokens = self.drawn.counted, self.drawn.tokens
        self.reference = self._cached(counted)
        if self.cfg.actor.behaviour == "logged":
            self.old = logged_logprobs(db, self.drawn.replay, tokens, counted)
            print("ratios are to the log-probabilities that the agent logged (actor.behaviour=logged)")
        else:
            self.old = self.reference
            print("ratios are to the policy as it is now, whose log-probabilities stand in the store's cache")

    def _cached(self, branches: Array) -> Array:
        """Of the policy as it is now; computed once for these weights and responses, and kept in the store's cache."""
        tokens, folder = self.drawn.tokens, self.store.cache_dir / "logprobs"
        name = features.key(
            features.fingerprint(self.model), str(self.autocast), tokens.fingerprint(), branches.tolist()
        )
        file = folder / f"{name}.npy"
        if file.exists():
            return np.load(file)
        found = acting.all_logprobs(self.model, tokens, branches, budget=self.budget, autocast=self.autocast)
        folder.mkdir(parents=True, exist_ok=True)
        with cli.replacing(file) as beside, beside.open("wb") as out:
            np.save(out, found)
        return found

    def health(self) -> dict[str, float]:
        """Mean log-probability of logged responses on the held-out side (or the only one), by what became of them."""
        tokens, replay = self.drawn.tokens, self.drawn.replay
        side = replay.held_out_rows if replay.held_out.any() else np.ones(len(replay), bool)
        rows = np.flatnonzero(self.drawn.logged.acted.numpy() & side)[: self.cfg.actor.judged]
        branches = tokens.branch_ptr[rows]
        with torch.no_grad():
            found = acting.all_logprobs(self.model, tokens, branches, budget=self.budget, autocast=self.autocast)
        if not len(rows):
            return {}
        sums = np.add.reduceat(found, np.r_[0, np.cumsum(acting.lengths(tokens, branches))[:-1]].astype(np.int64))
        good = replay.success[replay.episode_of[rows]]
        said = {"logprob_all": sums, "logprob_success": sums[good == 1], "logprob_failure": sums[good == 0]}
        return {name: float(x.mean()) if len(x) else float("nan") for name, x in said.items()}
