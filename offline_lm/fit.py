"""``python -m offline_lm.fit``: train critics from replay, score every step, write the values back.

The order of work is the order of `fit`: select, prepare, features, heads, values. What is checked before stands in
`_fit_checks`, the settings of a sweep in `_fit_sweep`; backbone, tokens and features are made in `_fit_prepare`, the
training loop is in `_fit_train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from offline_lm import cli
from offline_lm._fit_actor import fit_actor
from offline_lm._fit_archer import fit_archer
from offline_lm._fit_checks import checked
from offline_lm._fit_ilql import fit_ilql
from offline_lm._fit_memory import Peaks
from offline_lm._fit_prepare import compute_features, described, keep_backbone, kept_outside, prepare, selected
from offline_lm._fit_report import ranks, say_alarms, say_compared, say_next, say_selected, sites, target_gaps
from offline_lm._fit_sweep import Setting, settings_of
from offline_lm._fit_train import (
    Learner,
    estimate,
    examples,
    head_options,
    return_range,
    target_rate,
    train,
    whitening_floor,
    without_features,
)
from offline_lm.algos.actor import Actor
from offline_lm.algos.archer import Archer
from offline_lm.algos.d3rlpy import D3rlpy
from offline_lm.algos.ilql import ILQL
from offline_lm.algos.q_mc import QMC
from offline_lm.batches import replay as replays
from offline_lm.batches.sampling_store import from_store
from offline_lm.models.batching import CachedBatches, Outcomes
from offline_lm.models.critic import save_heads
from offline_lm.models.encoding import EncodedBatches, training
from offline_lm.models.heads import Heads
from offline_lm.run import Run, failing
from offline_lm.store import Store
from offline_lm.store.connect import explained
from offline_lm.values import candidate_values, compare, critic_alarms, log_alarms, values


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("fit", fit, argv)


def fit(cfg: DictConfig) -> dict[str, Any]:
    settings = settings_of(cfg)
    device, *_ = [checked(setting.cfg) for setting in settings]
    if isinstance(settings[0].algo, Archer):
        return fit_archer(cfg, settings[0].algo, settings[0].name, device)
    if isinstance(settings[0].algo, Actor):
        return fit_actor(cfg, settings[0].algo, settings[0].name, device, fit)
    if isinstance(settings[0].algo, ILQL):
        return fit_ilql(cfg, settings[0].algo, settings[0].name, device)
    store = Store.open(cfg.data.store, cfg.data.version).frozen()
    peaks = Peaks(device)
    with store.connect() as db, explained(store):
        replay_of = {gamma: selected(cfg, db, gamma) for gamma in dict.fromkeys(s.algo.gamma for s in settings)}
        replay = replay_of[settings[0].algo.gamma]
        ranges = {gamma: return_range(each) for gamma, each in replay_of.items()}
        say_selected(replay)
        draws = from_store(db, store, replay, seed=cfg.seed, **cli.plain(cfg.data.sampling))
        print(*draws.said, sep="\n", end="\n" * bool(draws.said))
        rate = target_rate(replay, cfg.optim.steps)
        weights = draws.weights(len(replay.episode_ids))[replay.episode_of] if draws.beta else None
        runs = [Run.start(store, setting.cfg, setting.name) for setting in settings]
        with failing(runs):
            with peaks.stage("prepare"):
                model, tokenizer, tokens = prepare(cfg, store, db, replay, runs[0], device)
                width = model.config.hidden_size

            def learner(setting: Setting, run: Run, **options: Any) -> Any:
                gamma = setting.algo.gamma
                low, high = ranges[gamma]
                torch.manual_seed(cfg.seed if setting.cfg.heads_seed is None else setting.cfg.heads_seed)
                heads = Heads(width, **head_options(setting, floor), low=low, high=high).to(device)
                if cfg.model.train == "heads":
                    heads.whiten(*(x.to(device) for x in examples(feats, replay, tokens)))
                own = None if replay_of[gamma] is replay else Outcomes(replay_of[gamma], tokens, device)
                if isinstance(setting.algo, D3rlpy):
                    from offline_lm._fit_d3rlpy import D3rlpyLearner  # d3rlpy takes ten seconds to import

                    return D3rlpyLearner(setting.algo, heads, setting.cfg.optim, run, outcomes=own)
                of_rows = None if weights is None else torch.from_numpy(weights).float().to(device)
                return Learner(
                    setting.algo, heads, setting.cfg.optim, run, outcomes=own, weights=of_rows, rate=rate, **options
                )

            def returns_alone() -> dict[float, Learner]:
                wanted = [(s.algo.gamma, run) for s, run in zip(settings, runs, strict=True) if s.name != "q_mc"]
                first = dict(reversed(wanted)) if cfg.baselines else {}  # one for all settings of a discount
                return {
                    gamma: learner(Setting(cfg, QMC(gamma, 0.01), "q_mc", {}), run, prefix="q_mc/")
                    for gamma, run in first.items()
                }

            floor: float | None = None
            candidates = any(setting.algo.needs_candidates for setting in settings)
            if cfg.model.train == "heads":
                with peaks.stage("features"):
                    feats = compute_features(cfg, store, model, tokens)
                    for run in runs:
                        keep_backbone(cfg, model, tokenizer, run.folder)
                del model  # heads train within the memory of features and heads
                with peaks.stage("heads"):
                    if any(c.model.heads.whitening == "auto" for c in (cfg, *(s.cfg for s in settings))):
                        floor = whitening_floor(feats, replay, tokens)
                    baselines = returns_alone()
                    learners = [learner(setting, run) for setting, run in zip(settings, runs, strict=True)]
                    batches = CachedBatches(
                        feats, replay, tokens, device, candidates=candidates, resident=cfg.data.resident
                    )
                    drawn = replays.episode_batches(replay, cfg.optim.batch_size, cfg.seed, draws=draws)
                    steps, whole = train([*learners, *baselines.values()], batches, replay, cfg.optim, cfg.seed, drawn)
                    del batches
            else:  # training through the backbone: it leaves no features to share, so the baseline follows by itself
                how = {key: cfg.model[key] for key in ("target", "gradient_checkpointing")}
                adapters = cli.plain(cfg.model.lora)
                with (
                    peaks.stage("backbone"),
                    training(model, how=cfg.model.train, adapters=adapters, **how) as (target_model, autocast),
                ):
                    learners = [learner(settings[0], runs[0], backbone=(target_model, model))]
                    make = EncodedBatches(model, target_model, replay, tokens, device, autocast, candidates=candidates)
                    budget = cfg.optim.batch_tokens
                    drawn = replays.token_batches(replay, tokens, budget, cfg.seed, candidates=candidates, draws=draws)
                    steps, whole = train(learners, make, replay, cfg.optim, cfg.seed, make.ahead(drawn))
                with peaks.stage("features"):
                    feats = compute_features(cfg, store, model, tokens)
                    keep_backbone(cfg, model, tokenizer, runs[0].folder)
                baselines = returns_alone()
                if baselines:
                    with peaks.stage("heads"):
                        batches = CachedBatches(feats, replay, tokens, device, resident=cfg.data.resident)
                        drawn = replays.episode_batches(replay, cfg.optim.batch_size, cfg.seed, draws=draws)
                        train([*baselines.values()], batches, replay, cfg.optim, cfg.seed, drawn)

            tables, verdicts = [], []
            with peaks.stage("values"):
                of_logs, rank, site = log_alarms(db, replay, tokens), ranks(feats), sites(db, replay)
                for setting, run, trained in zip(settings, runs, learners, strict=True):
                    save_heads(run.folder, trained.heads, described(setting), kept_outside(cfg))
                estimates = estimate([*learners, *baselines.values()], feats, device)
                q_mc = dict(zip(baselines, estimates[len(learners) :], strict=True))
                for setting, run, mine, trained in zip(settings, runs, estimates, learners, strict=False):
                    own = replay_of[setting.algo.gamma]
                    against = without_features(own) if cfg.baselines else {}
                    if cfg.baselines and setting.name != "q_mc":
                        against = {"q_mc": q_mc[setting.algo.gamma], **against}
                    store.append("values", values(run.run_id, own, tokens, mine, setting.algo.gamma))
                    store.append("candidate_values", candidate_values(db, run.run_id, own, tokens, mine))
                    said = {setting.name: mine, **against}
                    extra = rank | target_gaps(setting.name, trained, mine, feats, own, device)
                    gamma = setting.algo.gamma
                    tables.append(compare(store, run.run_id, own, tokens, said, gamma=gamma, extra=extra, site=site))
                    estimand = setting.algo.estimand
                    verdicts.append(
                        critic_alarms(store, run.run_id, own, tokens, said, tables[-1], of_logs, estimand=estimand)
                    )
            metrics = [{**table[s.name], **peaks.metrics} for s, table in zip(settings, tables, strict=True)]
            for run, measured in zip(runs, metrics, strict=True):
                run.finish("finished" if whole else "interrupted", steps, measured)

    for setting, run, table, (compared, _) in zip(settings, runs, tables, verdicts, strict=True):
        say_compared(setting, run, table, compared, replay)
    say_alarms(runs, [raised for _, raised in verdicts])
    say_next(cfg, runs[0])
    seconds = round(runs[0].seconds, 1)
    ended = "finished" if whole else "interrupted, but usable"
    print(f"{', '.join(r.run_id for r in runs)}: {ended} in {seconds} s, {peaks}")
    results = [
        {
            "run_id": run.run_id, "steps": steps, "seconds": seconds, "metrics": measured, "baselines": table,
            "alarms": [alarm._asdict() for alarm in raised],
        }
        for run, measured, table, (_, raised) in zip(runs, metrics, tables, verdicts, strict=True)
    ]  # fmt: skip
    listed = [{"swept": s.swept, **result} for s, result in zip(settings, results, strict=True)]
    return results[0] if cfg.sweep is None else {**results[0], "sweep": listed}


if __name__ == "__main__":
    raise SystemExit(main())
