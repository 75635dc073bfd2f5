"""What a critic is worth: the diagnostics of DESIGN section 6, and the baselines beside it; pure functions of arrays.

`judge` measures, `by_part` does so by turn and site, `intervals` gives what is compared an interval. What they mean in
words stands in `alarms`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.losses.returns import td_residuals
from offline_lm.ope import clustered
from offline_lm.ope.clustered import Measured

Array = np.ndarray
NAN = float("nan")


def auc(score: Array, positive: Array) -> float:
    """Area under the ROC curve of `score` [n] for `positive` bool [n]: ties count half. NaN with one class only."""
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return NAN
    return float((rankdata(score)[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def brier(probability: Array, outcome: Array) -> float:
    """Mean squared difference of `probability` [n] and `outcome` [n] in 0..1."""
    return float(np.mean((probability - outcome) ** 2)) if len(outcome) else NAN


def calibration_error(probability: Array, outcome: Array, bins: int = 10) -> float:
    """Expected calibration error over equal-width bins (Guo et al. 2017, eq. 3)."""
    if not len(outcome):
        return NAN
    bin_of = np.clip((probability * bins).astype(int), 0, bins - 1)
    gaps = [
        abs(probability[bin_of == b].mean() - outcome[bin_of == b].mean()) * np.mean(bin_of == b)
        for b in np.unique(bin_of)
    ]
    return float(np.sum(gaps))


def explained_variance(prediction: Array, target: Array) -> float:
    """1 - Var(target - prediction) / Var(target); 0 for a constant, negative where it is worse than one."""
    variance = target.var() if len(target) else 0.0
    return float(1 - (target - prediction).var() / variance) if variance > 0 else NAN


def kendall(truth: Array, estimate: Array, *, tolerance: float = 1e-9) -> float:
    """Kendall's tau over the pairs that the truth orders: (concordant - discordant) / their number.

    Pairs whose true values are equal (within `tolerance`) are left out, since no order of them is wrong; a pair that
    the estimate ties counts as neither. NaN where the truth orders no pair.
    """
    i, j = np.triu_indices(len(truth), 1)
    difference = truth[i] - truth[j]
    ordered = np.abs(difference) > tolerance
    if not ordered.any():
        return NAN
    return float(np.mean(np.sign(difference[ordered]) * np.sign(estimate[i][ordered] - estimate[j][ordered])))


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation of `a` [n] and `b` [n]; NaN where either is constant, or of fewer than two."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return NAN
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def position_only(replay: Replay) -> Array:
    """float64 [N]: the mean return of the training steps at the same position (and beyond, for rare ones).

    A critic that does not beat this has learnt how far an episode has come, not how well it is going.
    """
    position = np.minimum(np.arange(len(replay)) - replay.offsets[:-1][replay.episode_of], 63)
    train = ~replay.held_out_rows & ~np.isnan(replay.returns)
    mean = replay.returns[train].mean() if train.any() else 0.0
    total = np.bincount(position[train], replay.returns[train], minlength=64)
    count = np.bincount(position[train], minlength=64)
    return ((total + 5 * mean) / (count + 5))[position]  # five pseudo-steps hold rare positions to the mean


def effective_rank(features: Array) -> float:
    """exp of the entropy of the singular values of the centred `features` [n, d] (Roy & Vetterli 2007, def. 1).

    1 where all lie on a line; 0 where all are equal.
    """
    x = features - features.mean(axis=0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    singular = np.sqrt(np.linalg.eigvalsh(gram.astype(np.float64)).clip(0))
    if singular.max(initial=0.0) <= 1e-9 * max(1.0, float(np.abs(features).max(initial=0.0))):
        return 0.0
    p = singular / singular.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def reachable(replay: Replay) -> tuple[float, float]:
    """Least and greatest return of the training side, 0 among them; (0, 0) where none is known."""
    known = replay.returns[~np.isnan(replay.returns) & ~replay.held_out_rows]
    return float(min(known.min(initial=0.0), 0.0)), float(max(known.max(initial=0.0), 0.0))


def td_errors(v: Array, replay: Replay, gamma: float) -> Array:
    """float64 [N]: r + gamma * continue * V(s') - V(s), NaN where there is no one-step target."""
    following = np.where(replay.steps_to_end > 0, np.roll(v, -1), np.nan)
    reward, continues = torch.from_numpy(replay.reward), torch.from_numpy((~replay.terminated).astype(np.float64))
    td = td_residuals(reward, continues, torch.from_numpy(v), torch.from_numpy(following), gamma=gamma).numpy()
    return np.where(replay.acted & replay.bootstraps, td, np.nan)


def target_gap(online: Array, target: Array, replay: Replay) -> float:
    """Mean difference without sign of values [n] by the online and by the target heads, over the range of returns."""
    low, high = reachable(replay)
    return _ratio(_mean(np.abs(online - target)), high - low)


@dataclass(frozen=True)
class Estimates:
    """What a critic says: v [N] of every row, q [A] of every response of `Tokens`, and the ensemble [k, A] behind q."""

    v: Array
    q: Array | None
    ensemble: Array | None = None


@dataclass(frozen=True)
class _Rows:
    """Numbers of the rows that a critic is judged by."""

    known: Array
    """With an action, a known return and a finite V."""
    episodes: Array
    """Episodes whose outcome is known and that are judged at their first and middle decision."""
    middle: Array
    logged: Array
    """Of `known` those with a finite Q, and with `several` responses."""
    several: Array


def _rows(estimates: Estimates, replay: Replay, tokens: Tokens, rows: Array) -> _Rows:
    finite = rows & np.isfinite(estimates.v)
    known = finite & replay.acted & ~np.isnan(replay.returns)
    acted = np.diff(np.r_[0, np.cumsum(replay.acted)][replay.offsets])
    first = replay.offsets[:-1]
    episodes = np.flatnonzero(finite[first] & ~np.isnan(replay.success) & (acted > 0))
    episodes = episodes[finite[replay.offsets[episodes] + acted[episodes] // 2]]
    middle = replay.offsets[episodes] + acted[episodes] // 2
    logged = several = np.zeros(0, int)
    if estimates.q is not None:
        bad = np.r_[0, np.cumsum(~np.isfinite(estimates.q))][tokens.branch_ptr]
        here = rows & tokens.acted & (np.diff(bad) == 0)
        logged = np.flatnonzero(known & here)
        several = np.flatnonzero(here & (np.diff(tokens.branch_ptr) > 1))
    return _Rows(np.flatnonzero(known), episodes, middle, logged, several)


def judge(estimates: Estimates, replay: Replay, tokens: Tokens, rows: Array, *, gamma: float) -> dict[str, float]:
    """Diagnostics over the rows bool [N]; names are those of the table `diagnostics`.

    Values that are not finite are counted, and left out of the rest. What logs cannot answer is NaN or absent.

    - v_rmse, v_explained, v_bias: V against the logged return (an expectile above 0.5 is above it on purpose);
    - auc_mid: V at half of each episode, for success; auc_first: at its first step;
    - brier, ece: V at half of each episode, clipped to 0..1, against success;
    - nonfinite: share of values that are not finite; outside: share of those further beyond the reachable returns than
      half of their range; largest: the greatest of them over the greatest return, both without sign;
    - v_spread, spread: std of V and of Q over std of the return: near 0, the head is dead;
    - td_rms: root of the mean squared TD error of V;
    - turn_r2: share of V's variance that its means at each turn explain; turn_corr, length_corr (and, of Q, q_...):
      rank correlation with the turn and with the tokens of the prompt (of prompt and response);
    - q_rmse, q_bias: Q of the logged action against the return; q_bias is the overestimation;
    - q_above_v: variance of the return that Q explains beyond V, its state-only ablation (of Monte Carlo critics);
    - disagreement: std of the ensemble's members about their mean, over the std of that mean;
    - sensitivity: mean variance of Q over the actions of a state, over the variance of its mean over states;
    - swapped: mean difference without sign of Q of the logged action and another of its page, over std of the return;
    - margin: mean Q of the logged action less that of the others at the same state, in episodes that succeeded.
    """
    rows = rows & tokens.usable  # a critic says nothing of a step that it cannot read
    at = _rows(estimates, replay, tokens, rows)
    g, v = replay.returns[at.known], estimates.v[at.known]
    out = {"v_rmse": _rmse(v, g), "v_explained": explained_variance(v, g), "v_bias": _mean(v - g)}
    success, at_middle = replay.success[at.episodes] >= 1, estimates.v[at.middle]
    out |= {
        "auc_mid": auc(at_middle, success),
        "auc_first": auc(estimates.v[replay.offsets[at.episodes]], success),
        "brier": brier(np.clip(at_middle, 0, 1), success),
        "ece": calibration_error(np.clip(at_middle, 0, 1), success),
    }
    out |= _bounds(estimates, replay, tokens, rows)
    td = td_errors(np.where(tokens.usable, estimates.v, np.nan), replay, gamma)[rows]
    turn = _turn(replay)[at.known]
    prompt = np.diff(tokens.prompt_ptr)[at.known]
    out |= {
        "v_spread": _ratio(v.std(), g.std()) if len(g) else NAN,
        "td_rms": float(np.sqrt(_mean(td[np.isfinite(td)] ** 2))),
        "turn_r2": explained_variance(_means(v, turn), v) if v.std() > 1e-9 else NAN,
        "turn_corr": spearman(v, turn),
        "length_corr": spearman(v, prompt),
    }
    return out if estimates.q is None else out | _judge_q(estimates, estimates.q, replay, tokens, at)


def _judge_q(estimates: Estimates, q: Array, replay: Replay, tokens: Tokens, at: _Rows) -> dict[str, float]:
    g, branch = replay.returns[at.logged], tokens.branch_ptr[at.logged]
    said, std = q[branch], g.std() if len(g) else 0.0
    length = np.diff(tokens.prompt_ptr)[at.logged] + np.diff(tokens.response_ptr)[branch]
    out = {
        "q_rmse": _rmse(said, g),
        "q_bias": _mean(said - g),
        "spread": _ratio(said.std(), std) if len(g) else NAN,
        "q_above_v": explained_variance(said, g) - explained_variance(estimates.v[at.logged], g),
        "q_turn_corr": spearman(said, _turn(replay)[at.logged]),
        "q_length_corr": spearman(said, length),
    }
    if estimates.ensemble is not None and len(estimates.ensemble) > 1 and len(g):
        members = estimates.ensemble[:, branch]
        members = members[:, np.isfinite(members).all(axis=0)]
        out["disagreement"] = _ratio(math.sqrt(_mean(members.var(axis=0, ddof=1))), members.mean(axis=0).std())
    if len(at.several):
        means, variances, differences, margins = _candidates(q, tokens, at.several)
        won = replay.success[replay.episode_of[at.several]] >= 1
        between = float(np.var(means))
        out["sensitivity"] = float(np.mean(variances)) / between if between > 0 else math.inf
        out["swapped"] = _ratio(_mean(differences), std)
        out["margin"] = float(np.mean(margins[won])) if won.any() else NAN
    return out


def _candidates(q: Array, tokens: Tokens, several: Array) -> Array:
    """[4, n]: of Q over the responses at each row mean and variance; of the first, what it differs from the others by
    without sign, in the mean, and what it lies above them."""
    out = np.empty((4, len(several)))
    for i, n in enumerate(several):
        at = q[tokens.branch_ptr[n] : tokens.branch_ptr[n + 1]]
        out[:, i] = at.mean(), at.var(), np.abs(at[0] - at[1:]).mean(), at[0] - at[1:].mean()
    return out


def _bounds(estimates: Estimates, replay: Replay, tokens: Tokens, rows: Array) -> dict[str, float]:
    said = estimates.v[rows]
    if estimates.q is not None:
        members = estimates.q[None] if estimates.ensemble is None else estimates.ensemble
        said = np.r_[said, members[:, np.repeat(rows, np.diff(tokens.branch_ptr))].ravel()]
    low, high = reachable(replay)
    finite = said[np.isfinite(said)]
    half = (high - low) / 2
    return {
        "nonfinite": 1 - len(finite) / len(said) if len(said) else NAN,
        "outside": _mean((finite < low - half) | (finite > high + half)) if half > 0 else NAN,
        "largest": _ratio(np.abs(finite).max(initial=0.0), max(-low, high)),
    }


PARTS = ("0", "1", "2-3", "4-7", "8-15", "16-")
"""Turns, and steps to the end, that are judged together."""
_EDGES = (1, 2, 4, 8, 16)


def by_part(
    estimates: Estimates, replay: Replay, tokens: Tokens, rows: Array, *, gamma: float, site: Array | None = None
) -> Iterator[tuple[str, float, int, dict[str, Any]]]:
    """(name, value, n, part): v_bias, brier and ece by turn and by site, td_rms by steps to the end.

    Args:
        site: [E] names, None where not logged.
    """
    rows = rows & tokens.usable & np.isfinite(estimates.v) & replay.acted
    known, success = ~np.isnan(replay.returns), replay.success[replay.episode_of]
    parts: list[tuple[str, str, Array]] = []
    parts += [("turn", name, np.digitize(_turn(replay), _EDGES) == i) for i, name in enumerate(PARTS)]
    sites = np.full(len(replay.episode_ids), None) if site is None else site
    for name in sorted({s for s in sites if s is not None}):
        parts.append(("site", name, np.equal(sites, name)[replay.episode_of]))
    for dimension, name, part in parts:
        here, told = rows & part & known, rows & part & ~np.isnan(success)
        v = np.clip(estimates.v[told], 0, 1)
        yield "v_bias", _mean((estimates.v - replay.returns)[here]), int(here.sum()), {dimension: name}
        yield "brier", brier(v, success[told] >= 1), int(told.sum()), {dimension: name}
        yield "ece", calibration_error(v, success[told] >= 1), int(told.sum()), {dimension: name}
    td, left = td_errors(np.where(tokens.usable, estimates.v, np.nan), replay, gamma), _left(replay)
    for i, name in enumerate(PARTS):
        here = rows & (np.digitize(left, _EDGES) == i) & np.isfinite(td)
        yield "td_rms", float(np.sqrt(_mean(td[here] ** 2))), int(here.sum()), {"steps_to_end": name}


EACH = 10
"""Episodes whose mean return is above that of all, and others, that there must be before anything is compared: of
fewer, an interval from influences is too narrow."""


def intervals(
    estimates: Estimates, replay: Replay, tokens: Tokens, rows: Array, baselines: Mapping[str, Estimates]
) -> dict[str, Measured]:
    """What is compared, with intervals over tasks (`clustered`); empty where `EACH` is not met.

    - v_slope: of the return on V. 1 where V is calibrated; below 0.5, V is a worse guess than a constant, since
      Var(G - V) < Var(G) just where Cov(G, V) > Var(V) / 2; end_slope: the same at last decisions that terminated;
    - v_bias (at those: end_bias), q_bias: mean of V, and of Q of the logged action, less the return, over the range of
      returns;
    - calibration: `clustered.calibration` of V at half of each episode against the return, over that range;
    - auc_mid; auc_mid_above_NAME: how far it lies above that of each of the baselines;
    - first_within_task: AUC of V at the first decision within each task that has both outcomes, in the mean;
    - action_slope: of the return on Q of the logged action, both less the mean of Q over the candidates. 1 where Q of
      the behaviour is right, 0 where its order of actions says nothing, negative where it is upside down.
    """
    rows = rows & tokens.usable
    at = _rows(estimates, replay, tokens, rows)
    episode_of, g = replay.episode_of, replay.returns
    task = np.unique(np.array(replay.tasks), return_inverse=True)[1]
    found, of = np.unique(episode_of[at.known], return_inverse=True)
    each = np.bincount(of, g[at.known]) / np.bincount(of) if len(found) else np.zeros(0)
    if not len(each) or min((each > each.mean()).sum(), (each <= each.mean()).sum()) < EACH:
        return {}

    def ids(n: Array) -> Array:
        return clustered.clusters(task[episode_of[n]], episode_of[n])

    low, top = reachable(replay)
    v, span = estimates.v, (top - low) or NAN
    last = at.known[(_left(replay)[at.known] == 0) & replay.terminated[at.known]]
    middle = at.middle[~np.isnan(g[at.middle])]
    out = {
        "v_slope": clustered.slope(v[at.known], g[at.known], ids(at.known)),
        "end_slope": clustered.slope(v[last], g[last], ids(last)),
        "end_bias": clustered.mean((v - g)[last] / span, ids(last)),
        "v_bias": clustered.mean((v - g)[at.known] / span, ids(at.known)),
        "calibration": clustered.calibration(v[middle] / span, g[middle] / span, ids(middle)),
    }
    won = replay.success[at.episodes] >= 1
    if min(won.sum(), (~won).sum()) >= EACH:
        out["auc_mid"] = clustered.auc(v[at.middle], won, ids(at.middle))
        for name, other in baselines.items():
            above = clustered.auc(v[at.middle], won, ids(at.middle), less=other.v[at.middle])
            out[f"auc_mid_above_{name}"] = above
        first = v[replay.offsets[at.episodes]]
        of = task[at.episodes]
        mixed = [t for t in np.unique(of) if won[of == t].any() and not won[of == t].all()]
        within = np.array([auc(first[of == t], won[of == t]) for t in mixed])
        if len(mixed) >= clustered.TASKS:
            out["first_within_task"] = clustered.mean(within, np.arange(len(mixed)))
    if estimates.q is not None:
        said = estimates.q[tokens.branch_ptr[at.logged]]
        out["q_bias"] = clustered.mean((said - g[at.logged]) / span, ids(at.logged))
        chosen = np.intersect1d(at.several, at.logged)
        mean = _candidates(estimates.q, tokens, chosen)[0]
        logged = estimates.q[tokens.branch_ptr[chosen]]
        out["action_slope"] = clustered.slope(logged - mean, g[chosen] - mean, ids(chosen))
    return out


def _turn(replay: Replay) -> Array:
    """int64 [N]: decisions of the same episode before this row."""
    return np.arange(len(replay)) - replay.offsets[:-1][replay.episode_of]


def _left(replay: Replay) -> Array:
    """int64 [N]: decisions of the same episode behind this row."""
    done = np.cumsum(replay.acted)
    return done[replay.offsets[1:] - 1][replay.episode_of] - done


def _means(x: Array, group: Array) -> Array:
    """float64 [n]: the mean of x [n] over the rows of the same group."""
    ids = np.unique(group, return_inverse=True)[1]
    return (np.bincount(ids, x) / np.bincount(ids))[ids]


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 0 else NAN


def _mean(x: Array) -> float:
    return float(x.mean()) if len(x) else NAN


def _rmse(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2))) if len(a) else NAN
