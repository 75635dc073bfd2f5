"""What a critic is worth: ranking, calibration, action sensitivity, and the baselines beside it (DESIGN section 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens

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


@dataclass(frozen=True)
class Estimates:
    """What a critic says: v [N] of every row, q [A] of every response of `Tokens`, and the ensemble [k, A] behind q."""

    v: Array
    q: Array | None
    ensemble: Array | None = None


def judge(estimates: Estimates, replay: Replay, tokens: Tokens, rows: Array) -> dict[str, float]:
    """Diagnostics over the rows bool [N]; names are those of the table `diagnostics`.

    - v_rmse, v_explained: V against the logged return (an expectile above 0.5 is above it on purpose);
    - auc_mid: V at half of each episode, for success; auc_first: at its first step;
    - brier, ece: V at half of each episode, clipped to 0..1, against success;
    - q_rmse: Q of the logged action against the return;
    - sensitivity: mean variance of Q over the actions of a state, over the variance of its mean over states;
    - margin: mean Q of the logged action less that of the others at the same state, in episodes that succeeded;
    - spread: std(Q) / std(return): near 0, the head is dead.
    """
    rows = rows & tokens.usable  # a critic says nothing of a step that it cannot read
    known = rows & replay.acted & ~np.isnan(replay.returns)
    g, v = replay.returns[known], estimates.v[known]
    out = {"v_rmse": _rmse(v, g), "v_explained": explained_variance(v, g)}

    acted = np.diff(np.r_[0, np.cumsum(replay.acted)][replay.offsets])
    episodes = np.flatnonzero(rows[replay.offsets[:-1]] & ~np.isnan(replay.success) & (acted > 0))
    episodes = episodes[rows[replay.offsets[episodes] + acted[episodes] // 2]]
    middle = replay.offsets[episodes] + acted[episodes] // 2
    success = replay.success[episodes] >= 1
    at_middle = np.clip(estimates.v[middle], 0, 1)
    out |= {
        "auc_mid": auc(estimates.v[middle], success),
        "auc_first": auc(estimates.v[replay.offsets[episodes]], success),
        "brier": brier(at_middle, success),
        "ece": calibration_error(at_middle, success),
    }
    if estimates.q is None:
        return out
    q = estimates.q
    logged = np.flatnonzero(known & tokens.acted)
    q_logged = q[tokens.branch_ptr[logged]]
    out["q_rmse"] = _rmse(q_logged, replay.returns[logged])
    std = replay.returns[logged].std() if len(logged) else 0.0
    out["spread"] = float(q_logged.std() / std) if std > 0 else NAN

    first, stop = tokens.branch_ptr[:-1], tokens.branch_ptr[1:]
    several = np.flatnonzero(rows & tokens.acted & (stop - first > 1))
    if len(several):
        means, variances, margins = [], [], []
        for n in several:
            at = q[first[n] : stop[n]]
            means.append(at.mean())
            variances.append(at.var())
            margins.append(at[0] - at[1:].mean())
        won = replay.success[replay.episode_of[several]] >= 1
        between = float(np.var(means))
        out["sensitivity"] = float(np.mean(variances)) / between if between > 0 else math.inf
        out["margin"] = float(np.mean(np.asarray(margins)[won])) if won.any() else NAN
    return out


def _rmse(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2))) if len(a) else NAN


def verdict(name: str, table: dict[str, dict[str, float]]) -> list[str]:
    """In words, what `table` (critic -> diagnostics) says of critic `name` against its baselines."""
    own, words = table[name], []
    for baseline in ("q_mc", "position_only"):
        if baseline in table and baseline != name and not math.isnan(own["auc_mid"]):
            mine, theirs = own["auc_mid"], table[baseline]["auc_mid"]
            relation = "beats" if mine > theirs else "does NOT beat"
            measured = f"AUC {mine:.3f} against {theirs:.3f}"
            words.append(f"{name} {relation} {baseline} at telling success from V at mid-episode: {measured}")
    if own.get("spread", 1.0) < 0.05:
        words.append(f"{name}: its Q hardly varies (std {own['spread']:.3f} of the returns'): a dead head")
    if own.get("sensitivity", 1.0) < 0.01:
        words.append(f"{name}: its Q hardly depends on the action (Var_a/Var_s {own['sensitivity']:.4f})")
    return words
