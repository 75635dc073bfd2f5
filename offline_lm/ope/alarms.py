"""Alarms in words: what is wrong with a critic, or with the logs that it learnt from, as sentences with their numbers.

Nothing is measured here. `diagnostics.judge` and `diagnostics.intervals` measure the critic, `leaks` the logs; where a
number varies with the episodes drawn, its whole interval must lie beyond the threshold, so that a mediocre critic on
few tasks is no alarm. `analysis/benchmarks/alarms.py` counts what planted faults raise, and sound critics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from offline_lm.ope.clustered import Measured
from offline_lm.ope.leaks import Told
from offline_lm.types import Estimand

ON_POLICY = frozenset[Estimand]({"returns", "behaviour"})
"""Estimands that are the return of the logs' own policies. Others lie above it on purpose (an expectile, a maximum over
candidates): the level of their values is held against nothing but the bounds."""

LARGEST = 10.0
"""Greatest value over the greatest return. No bootstrapped value that is on its way to a fixed point passes it."""
OUTSIDE = 0.01
"""Share of values more than half the range beyond the reachable returns: regression overshoots by less, and rarely."""
SPREAD = 0.05
"""Std of V or Q over that of returns. Below, the head explains at most 0.25 % of their variance, whatever it says."""
RANK = 3.0
"""Effective rank of the features. Goal, page and action do not fit into three numbers."""
SENSITIVITY = 0.01
"""Var_a Q / Var_s Q. Below, a tenth of the spread over states is all that an action changes: noise of training."""
ACTION_SLOPE = 0.0
"""Slope of returns on Q's preference among candidates. Below, what Q prefers ends worse."""
SLOPE = 0.5
"""Slope of returns on V. Below, V is a worse guess than a constant, its mean put right (`diagnostics.intervals`)."""
SLOPE_OF_OTHERS = 0.0
"""The same where V is not the behaviour's: V* itself has a slope of 0.03 on random logs of the shop. Below, they fall
as V rises."""
AUC_BELOW = 0.02
"""What an AUC may lie below a baseline's: less changes nobody's choice between them."""
BIAS = 0.1
"""Mean of an estimate less the return, over the range of returns: ten points of success, where success is 1."""
END_BIAS = 0.25
"""The same at last actions. V does not know that the next action ends the episode: in the shop that is worth 0.15."""
CALIBRATION = 0.05
"""Calibration error over the range of returns, less what sampling adds: five points are seen in any plot."""
TURN_R2 = 0.9
"""Share of V's variance that the turn alone explains. Goal and page have less than a third of its std left."""
LENGTH_CORR = 0.95
"""Rank correlation of V with the prompt's length. No content that we know of is so nearly its length."""
DISAGREEMENT = 1.0
"""Std of the ensemble about its mean over the std of that mean: its members differ more than states and actions do."""
IDENTICAL = 1e-6
"""The same: members that were initialised apart never agree so well; one was copied, or one head is read twice."""
TARGET_GAP = 0.25
"""Mean gap of target and online values over the range of returns: bootstrapping from values a quarter off."""
FIRST_WITHIN_TASK = 0.75
"""AUC before any action among episodes of one task. They differ by luck and policy alone, which no page shows."""
TOLD = 0.2
"""By how much episodes whose pages state a reward succeed more or less than others: a fifth of all are given away."""
SHARED_STARTS = 0.05
"""Share of held-out episodes that begin as a training episode does: one in twenty may be a task logged twice."""


class Alarm(NamedTuple):
    """What is wrong: a name to filter by, a sentence, the number measured and the threshold that it passed."""

    name: str
    sentence: str
    value: float
    threshold: float


def of_critic(
    critic: str, judged: Mapping[str, float], compared: Mapping[str, Measured], *, estimand: Estimand
) -> list[Alarm]:
    """What is wrong with a critic's estimates, the gravest first.

    Args:
        critic: its name.
        judged: what `diagnostics.judge` measured; what is absent or NaN raises nothing.
        compared: what `diagnostics.intervals` measured.
        estimand: what its V and Q converge to.
    """
    on_policy = estimand in ON_POLICY
    found = [*_numbers(critic, judged), *_outcomes(critic, compared, SLOPE if on_policy else SLOPE_OF_OTHERS)]
    return found + (list(_level(critic, compared)) if on_policy else [])


def _numbers(critic: str, judged: Mapping[str, float]) -> Iterator[Alarm]:
    """Alarms about the values themselves, which the drawing of episodes hardly moves."""

    def value(name: str) -> float:
        return judged.get(name, math.nan)

    if (x := value("nonfinite")) > 0:
        said = f"{critic} diverged: {x:.1%} of its values are not finite"
        yield Alarm("diverged", said, x, 0.0)
    if (x := value("largest")) > LARGEST:
        said = f"{critic} diverged: its greatest value is {x:,.0f} times the greatest return"
        yield Alarm("diverged", said, x, LARGEST)
    if (x := value("outside")) > OUTSIDE:
        said = (
            f"{critic}: {x:.1%} of its values lie beyond the returns that can be reached, by half their range or more"
        )
        yield Alarm("out_of_bounds", said, x, OUTSIDE)
    for name, head in (("v_spread", "V"), ("spread", "Q")):
        if (x := value(name)) < SPREAD:
            said = f"{critic}: its {head} hardly varies (std {x:.3f} of the returns'): a dead head"
            yield Alarm("dead_head", said, x, SPREAD)
    for name, read in (("rank_v", "states"), ("rank_q", "actions")):
        if (x := value(name)) < RANK:
            said = f"{critic}: the features of {read} have collapsed (effective rank {x:.1f})"
            yield Alarm("collapsed_features", said, x, RANK)
    if (x := value("sensitivity")) < SENSITIVITY:
        said = f"{critic}: its Q hardly depends on the action (Var_a/Var_s {x:.4f})"
        yield Alarm("action_insensitive", said, x, SENSITIVITY)
    if (x := value("turn_r2")) > TURN_R2:
        said = f"{critic}: its V tells the turn and little else: turns alone explain {x:.0%} of its variance"
        yield Alarm("tracks_turn", said, x, TURN_R2)
    for name, head in (("length_corr", "V"), ("q_length_corr", "Q")):
        if abs(x := value(name)) > LENGTH_CORR:
            said = f"{critic}: its {head} tells how long the text is and little else (rank correlation {x:.2f})"
            yield Alarm("tracks_length", said, x, LENGTH_CORR)
    if (x := value("disagreement")) > DISAGREEMENT:
        said = f"{critic}: the members of its ensemble differ more (std {x:.2f} of Q's) than states and actions do"
        yield Alarm("ensemble_disagrees", said, x, DISAGREEMENT)
    if (x := value("disagreement")) < IDENTICAL:
        said = f"{critic}: the members of its ensemble are one and the same: their minimum is no caution"
        yield Alarm("ensemble_identical", said, x, IDENTICAL)
    if (x := value("target_gap")) > TARGET_GAP:
        said = f"{critic}: its target lies {x:.2f} of the range of returns from what follows it; raise algo.polyak"
        yield Alarm("target_lags", said, x, TARGET_GAP)


def _outcomes(critic: str, compared: Mapping[str, Measured], least: float) -> Iterator[Alarm]:
    """Alarms about how values go with outcomes; `least`: the slope of returns on V that is wanted."""
    nothing = Measured(math.nan)
    if (m := compared.get("v_slope", nothing)).high < least:
        said = (
            f"{critic}: V explains less of the returns than a constant would: they rise by {_shown(m)} as V rises by 1"
        )
        yield Alarm("worse_than_constant", said, m.value, least)
    yield from _worse(critic, "position_only", compared)
    if (m := compared.get("action_slope", nothing)).high < ACTION_SLOPE:
        said = (
            f"{critic}: actions that its Q prefers end worse: returns rise by {_shown(m)} as its preference rises by 1"
        )
        yield Alarm("actions_misordered", said, m.value, ACTION_SLOPE)
    if (m := compared.get("first_within_task", nothing)).low > FIRST_WITHIN_TASK:
        said = (
            f"{critic} leaks: before any action is taken, V tells which episodes of a task succeed (AUC {_shown(m)}):"
            " the first page says it, or who acts"
        )
        yield Alarm("leak_first_page", said, m.value, FIRST_WITHIN_TASK)


def _worse(critic: str, baseline: str, compared: Mapping[str, Measured]) -> Iterator[Alarm]:
    if (m := compared.get(f"auc_mid_above_{baseline}", Measured(math.nan))).high < -AUC_BELOW:
        said = f"{critic} is worse than {baseline} at telling success from V at mid-episode: AUC {_shown(m)} above it"
        yield Alarm(f"worse_than_{baseline}", said, m.value, -AUC_BELOW)


def _level(critic: str, compared: Mapping[str, Measured]) -> Iterator[Alarm]:
    """Alarms about estimates of the behaviour's return, which `q_mc` estimates too."""
    nothing = Measured(math.nan)
    yield from _worse(critic, "q_mc", compared)
    for name, head in (("v_bias", "V"), ("q_bias", "Q")):
        m = compared.get(name, nothing)
        if m.low > BIAS:
            said = f"{critic} overestimates: {head} lies {_shown(m)} of the range of returns above them"
            yield Alarm("overestimates", said, m.value, BIAS)
        if m.high < -BIAS:
            said = f"{critic} underestimates: {head} lies {_shown(m)} of the range of returns above them"
            yield Alarm("underestimates", said, m.value, -BIAS)
    if (m := compared.get("calibration", nothing)).low > CALIBRATION:
        said = f"{critic} is uncalibrated at mid-episode: V is off by {_shown(m)} of the range of returns"
        yield Alarm("uncalibrated", said, m.value, CALIBRATION)
    slope, m = compared.get("end_slope", nothing), compared.get("end_bias", nothing)
    if slope.high < SLOPE:
        said = (
            f"{critic}: at last actions V does not see how episodes end: they rise by {_shown(slope)} as V rises by 1"
        )
        yield Alarm("blind_at_the_end", said, slope.value, SLOPE)
    if m.low > END_BIAS or m.high < -END_BIAS:
        said = (
            f"{critic}: at last actions V lies {_shown(m)} of the range of returns above them; are rewards a step off?"
        )
        yield Alarm("blind_at_the_end", said, m.value, math.copysign(END_BIAS, m.value))


def of_logs(told: Told | None, starts: float, both: Sequence[str]) -> list[Alarm]:
    """What the logs give away, whatever the critic.

    Args:
        told: `leaks.telling`.
        starts: `leaks.shared_starts`.
        both: `leaks.both_sides`.
    """
    found = []
    if told is not None and max(told.above.low, -told.above.high) > TOLD:
        said = (
            f"the pages leak: {told.episodes} episodes say {told.phrase!r} before they end, and the share of them that"
            f" succeeds is {_shown(told.above)} above that of the others"
        )
        found.append(Alarm("leak_reward_words", said, told.above.value, TOLD))
    if both:
        said = f"the split leaks: {len(both)} tasks stand on both sides of it, {both[0]!r} for one"
        found.append(Alarm("leak_split", said, float(len(both)), 0.0))
    elif starts > SHARED_STARTS:
        said = (
            f"the split leaks: {starts:.0%} of the held-out episodes begin with goal and page of a training episode;"
            " their task_id tells tasks apart that are one"
        )
        found.append(Alarm("leak_split", said, starts, SHARED_STARTS))
    return found


def comparisons(critic: str, judged: Mapping[str, Mapping[str, float]], compared: Mapping[str, Measured]) -> list[str]:
    """In words, whether `critic` beats its baselines: only where the whole interval of the difference lies above 0.

    Args:
        judged: what `diagnostics.judge` measured, by critic.
        compared: what `diagnostics.intervals` measured of `critic`.
    """
    said = []
    for baseline in (name for name in ("q_mc", "position_only") if name in judged and name != critic):
        mine, theirs = judged[critic]["auc_mid"], judged[baseline]["auc_mid"]
        if math.isnan(mine) or math.isnan(theirs):
            continue
        m = compared.get(f"auc_mid_above_{baseline}", Measured(math.nan))
        relation = "beats" if m.low > 0 else "does NOT beat"
        unsure = " (too few episodes to say more)" if math.isnan(m.low) else f", {_shown(m)} above it"
        told = f"AUC {mine:.3f} against {theirs:.3f}{unsure}"
        said.append(f"{critic} {relation} {baseline} at telling success from V at mid-episode: {told}")
    return said


def _shown(m: Measured) -> str:
    return f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}]"
