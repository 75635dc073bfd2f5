"""How `fit algo=ilql` trains: values of tokens and the behaviour policy in one language model, which then acts by both.

Its values of turns stand in the store as any critic's do: v at the end of the prompt, q of the last token of a response
(`offline_lm.losses.ilql`). The policy is read back by `offline_lm.policy`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from offline_lm import cli
from offline_lm._fit_checks import check_alone
from offline_lm._fit_logged import judged_rows
from offline_lm._fit_memory import Peaks
from offline_lm._fit_prepare import reading, selected, starting_policy
from offline_lm._fit_report import say_alarms, say_compared, say_next, say_selected, write_back
from offline_lm._fit_sweep import Setting
from offline_lm._fit_train import return_range, target_rate
from offline_lm._fit_updates import updated
from offline_lm.algos.ilql import ILQL, TokenBatch
from offline_lm.batches import replay as replays
from offline_lm.batches.replay import Replay
from offline_lm.batches.sampling_store import from_store
from offline_lm.batches.tokens import Tokens
from offline_lm.losses.ilql import token_targets
from offline_lm.losses.td import ensemble_min
from offline_lm.models import acting, token_heads
from offline_lm.models.acting import Chosen
from offline_lm.models.batching import Outcomes
from offline_lm.models.descent import rate_share
from offline_lm.models.devices import row_tokens
from offline_lm.models.encoding import training
from offline_lm.models.heads import polyak, target_of
from offline_lm.models.token_heads import TokenHeads
from offline_lm.ope.diagnostics import Estimates
from offline_lm.ope.updates import by_outcome
from offline_lm.policy import save_policy
from offline_lm.run import Run, failing
from offline_lm.store import Store
from offline_lm.store.connect import explained

Array = np.ndarray


def fit_ilql(cfg: DictConfig, algo: ILQL, name: str, device: torch.device) -> dict[str, Any]:
    """Train values and policy, score every step, write the values back.

    Raises:
        UserError: a setting that ILQL does not take, or no known return to learn from.
    """
    check_alone(cfg, "ilql", {"sweep": None, "model.heads.loss": "mse", "actor.critic": None})
    store = Store.open(cfg.data.store, cfg.data.version).frozen()
    peaks = Peaks(device)
    with store.connect() as db, explained(store):
        replay = selected(cfg, db, algo.gamma)
        say_selected(replay)
        return_range(replay)  # raises where no return is known
        draws = from_store(db, store, replay, seed=cfg.seed, **cli.plain(cfg.data.sampling))
        print(*draws.said, sep="\n", end="\n" * bool(draws.said))
        weights = draws.weights(len(replay.episode_ids))[replay.episode_of] if draws.beta else np.ones(len(replay))
        run = Run.start(store, cfg, name)
        with failing([run]):
            with peaks.stage("prepare"):
                model, tokenizer, tokens = starting_policy(cfg, store, db, replay, run, device)
            how = {"how": cfg.actor.train, "target": cfg.model.target, "adapters": cli.plain(cfg.model.lora)}
            checkpointing = cfg.model.gradient_checkpointing
            with peaks.stage("actor"), training(model, **how, gradient_checkpointing=checkpointing) as (slow, autocast):
                learner = _Learner(cfg, algo, (slow, model), replay, tokens, weights, run, autocast)
                drawn = replays.episode_batches(replay, cfg.actor.batch_size, cfg.seed, draws=draws)
                whole = learner.train(drawn)
                learner.settle()
            heads = learner.heads.eval()
            save_policy(run.folder, model, tokenizer, {**reading(cfg), "ilql": {"beta": algo.beta}})
            token_heads.save(heads, run.folder)
            with peaks.stage("values"):
                v, ensemble = token_heads.estimates(model, heads, tokens, budget=learner.budget)
                mine = Estimates(v, ensemble.min(axis=0), ensemble)
                setting = Setting(cfg, algo, name, {})
                table, compared, raised = write_back(
                    cfg, store, db, run, replay, tokens, mine, setting, learner.likelihood(model)
                )
            metrics = {**table[name], **peaks.metrics}
            run.finish("finished" if whole else "interrupted", learner.step, metrics)
    say_compared(setting, run, table, compared, replay)
    say_alarms([run], [raised])
    say_next(cfg, run)
    seconds = round(run.seconds, 1)
    print(f"{run.run_id}: {'finished' if whole else 'interrupted, but usable'} in {seconds} s, {peaks}")
    return {
        "run_id": run.run_id, "steps": learner.step, "seconds": seconds, "metrics": metrics, "baselines": table,
        "alarms": [alarm._asdict() for alarm in raised],
    }  # fmt: skip


class _Learner:
    """The updates of ILQL: a pass of the target for what is learnt from, then one with gradients.

    Both passes go over a batch of whole episodes part by part, so that V of the next turn is at hand however few tokens
    fit a pass, and the gradient is that of the whole batch.

    Args:
        backbones: the target, None where the backbone has none, and the online one.
        weights: float64 [N], of each row in the losses.
    """

    def __init__(
        self, cfg: DictConfig, algo: ILQL, backbones: tuple[Any | None, Any], replay: Replay, tokens: Tokens,
        weights: Array, run: Run, autocast: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.cfg, self.algo, self.replay, self.tokens, self.weights, self.run = cfg, algo, replay, tokens, weights, run
        (self.slow, self.model), self.autocast = backbones, autocast
        self.device = next(self.model.parameters()).device
        self.budget = cfg.actor.row_tokens or row_tokens(self.device)
        known = replay.returns[~np.isnan(replay.returns) & ~replay.held_out_rows]
        torch.manual_seed(cfg.seed if cfg.heads_seed is None else cfg.heads_seed)
        self.heads = TokenHeads(
            *token_heads.sizes(self.model), ensemble=cfg.model.heads.ensemble, hidden=cfg.model.heads.hidden,
            start=float(known.mean()), unit=float(known.std()) or 1.0,
        ).to(self.device)  # fmt: skip
        self.target = target_of(self.heads)
        self.rate = self._rate()
        self.outcomes = Outcomes(replay, tokens, self.device)
        self.parameters = [p for m in (self.model, self.heads) for p in m.parameters() if p.requires_grad]
        settings = cfg.actor
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.step = 0

    def _rate(self) -> float:
        """At which the target follows."""
        if self.algo.polyak is not None:
            return self.algo.polyak
        sizes = np.zeros(len(self.replay), np.int64)
        acted = np.asarray(self.tokens.acted)
        sizes[acted] = acting.lengths(self.tokens, self.tokens.branch_ptr[:-1][acted])
        return target_rate(self.replay, self.cfg.actor.steps, sizes, most=0.5)

    def train(self, batches: Any) -> bool:
        """All updates; whether Ctrl-C did not end them."""
        self.model.train()

        def update() -> dict[str, float]:
            acted, rows = np.asarray(self.tokens.acted) & self.replay.acted, np.empty(0, np.int64)
            while not acted[rows].any():
                rows = np.unique(next(batches))  # an episode may be drawn twice
            self.step += 1
            return self._update(rows)

        return updated(self, "ilql", update, self.cfg.actor.steps)

    def settle(self) -> None:
        """Take the target's weights: what is kept is an average over the last updates, of V, Q and policy alike."""
        if self.slow is not None:
            polyak(self.model, self.slow, 1.0)
        polyak(self.heads, self.target, 1.0)

    def _update(self, rows: Array) -> dict[str, float]:
        columns = self.outcomes.of(rows, self.device)
        acted = columns["acted"].cpu().numpy()
        first = self.tokens.branch_ptr[rows]
        chosen = Chosen(rows, [[a] if has else [] for a, has in zip(first.tolist(), acted.tolist(), strict=True)])
        sizes = np.zeros(len(rows), np.int64)
        sizes[acted] = acting.lengths(self.tokens, first[acted])
        lengths = torch.from_numpy(sizes).to(self.device)
        q_bar, y = self._targets(chosen, lengths, columns)
        weight = torch.from_numpy(self.weights[rows]).to(self.device, torch.float32).repeat_interleave(lengths)
        value_weight = weight.where(columns["bootstrap_mask"].repeat_interleave(lengths), 0.0)
        weight, value_weight = weight / weight.sum(), value_weight / value_weight.sum().clamp(min=1e-9)
        self.optimizer.zero_grad()
        done, sums = 0, dict[str, float]()
        for part in chosen.rows(self.tokens, self.budget):
            if not len(part):  # final observations alone
                continue
            found = token_heads.read(self.model, self.tokens, part, logits=True, autocast=self.autocast)
            assert found.logits is not None
            own = slice(done, done := done + len(found.taken))
            losses = self.algo.loss(TokenBatch(
                v=self.heads.values(found.tokens), q=self.heads.q(found.tokens), logits=found.logits, taken=found.taken,
                q_bar=q_bar[own], target=y[own], weight=weight[own], value_weight=value_weight[own],
                unit=self.heads.unit,
            ))  # fmt: skip
            torch.stack([*losses.values()]).sum().backward()
            for key, value in losses.items():
                sums[f"loss/{key}"] = sums.get(f"loss/{key}", 0.0) + value.item()
        # backbone and heads are one network under one loss: trap 9 is about networks of their own
        norm = nn.utils.clip_grad_norm_(self.parameters, self.cfg.actor.clip).item()
        if not np.isfinite([norm, *sums.values()]).all():
            raise FloatingPointError(f"update {self.step}: losses {sums}, gradient norm {norm}; lower actor.lr")
        share = rate_share(self.step, self.cfg.actor.steps, self.cfg.actor.warmup)
        self.optimizer.param_groups[0]["lr"] = self.cfg.actor.lr * share
        self.optimizer.step()
        if self.slow is not None:
            polyak(self.slow, self.model, self.rate)
        polyak(self.target, self.heads, self.rate)
        return sums | {"grad_norm": norm}

    @torch.no_grad()
    def _targets(self, chosen: Chosen, lengths: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """min Q̄ of every token that was taken, and what Q of it follows, both [t]."""
        model = self.model if self.slow is None else self.slow
        q_bar, of_tokens, of_states = [], [], []
        for part in chosen.rows(self.tokens, self.budget):
            found = token_heads.read(model, self.tokens, part, logits=False, autocast=self.autocast)
            q_bar.append(ensemble_min(self.target.q_of(found.tokens, found.taken)))
            of_tokens.append(self.target.values(found.tokens))
            of_states.append(self.target.values(found.states))
        y = token_targets(
            torch.cat(of_tokens), torch.cat(of_states), lengths, columns["reward"], columns["continues"],
            columns["offsets"], gamma=self.algo.gamma,
        )  # fmt: skip
        return torch.cat(q_bar), y

    @torch.no_grad()
    def likelihood(self, model: Any) -> dict[str, float]:
        """Mean log-probability of logged responses on the held-out side (or the only one), by what became of them.

        Under the policy that acts, and, as `behaviour_logprob`, under the one that imitates.
        """
        tokens, replay = self.tokens, self.replay
        rows = judged_rows(replay, replay.acted & np.asarray(tokens.acted), self.cfg.actor.judged)
        branches = tokens.branch_ptr[rows]
        policy, behaviour = (
            acting.of_responses(tokens, branches, torch.cat([
                token_heads.response_logprobs(model, self.heads, tokens, part, beta=beta)
                for part in Chosen.of(tokens, branches).rows(tokens, self.budget)
            ]))
            for beta in (self.algo.beta, 0.0)
        )  # fmt: skip
        return {"behaviour_logprob": float(behaviour.mean())} | by_outcome(
            policy, replay.success[replay.episode_of[rows]]
        )
