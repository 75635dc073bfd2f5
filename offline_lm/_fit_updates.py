"""The updates of an actor: which responses it is trained on, batches of them, and steps down the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import duckdb
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from offline_lm import cli
from offline_lm._fit_logged import judged_rows, logged_logprobs
from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.sampling import Sampler
from offline_lm.batches.tokens import Tokens
from offline_lm.errors import UserError
from offline_lm.losses.clipping import update_health
from offline_lm.losses.policy import token_weights
from offline_lm.models import acting, features
from offline_lm.models.acting import Chosen
from offline_lm.models.descent import rate_share
from offline_lm.models.devices import row_tokens
from offline_lm.ope.updates import by_outcome
from offline_lm.run import Run
from offline_lm.store import Store
from offline_lm.types import Logged, Responses

Array = np.ndarray


class Drawn:
    """What an actor is trained on: responses of the training side with an advantage, and batches of them.

    Args:
        advantages: float64, of the logged response to each step, [N], or of every known response, [A], as
            `candidates` (`Actor.candidates`) says.
        proposal: float64 [A], `Responses.proposal` of every known response; None: they are all.
        start: episode batches that were drawn before, by another; the next one is drawn here.

    Attributes:
        taken: episode batches that were drawn, those before `start` among them.
    """

    def __init__(
        self, cfg: DictConfig, replay: Replay, tokens: Tokens, advantages: Array, logged: Logged, draws: Sampler, *,
        candidates: bool = False, proposal: Array | None = None, start: int = 0,
    ) -> None:  # fmt: skip
        self.cfg, self.replay, self.tokens, self.logged, self.draws = cfg, replay, tokens, logged, draws
        self.proposal, self.taken = proposal, start
        of_episode = draws.weights(len(replay.episode_ids))
        self.importance = np.repeat(of_episode[replay.episode_of], np.diff(tokens.branch_ptr))
        rows = np.flatnonzero(logged.acted.numpy())
        self.advantages = advantages
        if not candidates:
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
        for rows in replays.episode_batches(self.replay, size, seed, draws=self.draws, start=self.taken):
            self.taken += 1
            spans = zip(self.of_state[rows].tolist(), self.of_state[rows + 1].tolist(), strict=True)
            drawn += [self.counted[a:b] for a, b in spans if b > a]
            if sum(map(len, drawn)) >= size:
                yield np.unique(np.concatenate(drawn), return_counts=True)
                drawn = []


class _Counting(Protocol):
    cfg: DictConfig
    run: Run
    step: int


def updated(learner: _Counting, name: str, update: Callable[[], dict[str, float]], until: int) -> bool:
    """Updates up to number `until` of `actor.steps`, shown and logged; whether Ctrl-C did not end them.

    Args:
        update: does one, counts it in `learner.step`, and gives what is logged of it.
    """
    settings = learner.cfg.actor
    try:
        with tqdm(total=until, initial=learner.step, desc=name, unit="update") as bar:
            while learner.step < until:
                logged = update()
                bar.update()
                if learner.step % settings.log_every == 0 or learner.step == settings.steps:
                    learner.run.log(learner.step, logged)
                    bar.set_postfix({k.removeprefix("loss/"): f"{v:.4f}" for k, v in logged.items()})
    except KeyboardInterrupt:
        print(f"interrupted after {learner.step} of {settings.steps} updates: keeping what was learnt")
        return False
    return True


class ActorLearner:
    """An actor under training. Its gradient is clipped by itself (trap 9)."""

    def __init__(
        self, cfg: DictConfig, algo: Any, model: Any, drawn: Drawn, run: Run, store: Store, device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.cfg, self.model, self.run, self.store = cfg, model, run, store
        self.device, self.autocast, self.budget = device, autocast, cfg.actor.row_tokens or row_tokens(device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=cfg.actor.lr, weight_decay=cfg.actor.weight_decay, fused=True
        )
        self.step = 0
        self.last: dict[str, float] = {}
        self.turn_to(algo, drawn)

    def turn_to(self, algo: Any, drawn: Drawn) -> None:
        """Go on with this loss on these responses; ratios are to the policy as it then is."""
        self.algo, self.drawn, self.batches = algo, drawn, drawn.batches()
        self.old: Array | None = None
        self.reference: Array | None = None

    def train(self, db: duckdb.DuckDBPyConnection, until: int) -> bool:
        """The updates up to number `until`; whether Ctrl-C did not end them."""
        settings, algo = self.cfg.actor, self.algo
        cloned = round(settings.clone_first * settings.steps) if algo.ratios != "none" else 0

        def update() -> dict[str, float]:
            if algo.ratios != "none" and self.step >= cloned and self.old is None:
                self._compare_with(db)
            branches, times = next(self.batches)
            self.step += 1
            return self._update(branches, times, clone=self.step <= cloned)

        return updated(self, "actor", update, until)

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
        share = rate_share(self.step, settings.steps, settings.warmup)
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
        advantages, proposal = (
            None if x is None else torch.from_numpy(x[branches]).to(self.device, torch.float32)
            for x in (self.drawn.advantages, self.drawn.proposal)
        )
        assert advantages is not None
        return Responses(
            logprobs=logprobs, weight=weight.to(self.device, torch.float32), old=old, reference=reference,
            owner=torch.from_numpy(owner).to(self.device), state=torch.from_numpy(state).to(self.device),
            advantages=advantages, proposal=proposal,
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
        rows = judged_rows(replay, self.drawn.logged.acted.numpy(), self.cfg.actor.judged)
        if not len(rows):
            return {}
        branches = tokens.branch_ptr[rows]
        found = acting.all_logprobs(self.model, tokens, branches, budget=self.budget, autocast=self.autocast)
        return by_outcome(acting.of_responses(tokens, branches, found), replay.success[replay.episode_of[rows]])
