"""Alarms: each at its threshold and beyond; planted faults raise theirs, and sound critics none."""

import math
from pathlib import Path

import numpy as np
import pytest

from offline_lm.envs.shop import Site, Task
from offline_lm.ope import alarms
from offline_lm.ope.alarms import comparisons, of_critic, of_logs
from offline_lm.ope.clustered import Measured
from offline_lm.ope.leaks import Told
from offline_lm.types import Estimand

BENCHMARKS = Path(__file__).parents[2] / "analysis" / "benchmarks"


def names(judged=None, compared=None, *, estimand: Estimand = "behaviour"):
    return [alarm.name for alarm in of_critic("c", judged or {}, compared or {}, estimand=estimand)]


@pytest.mark.parametrize(
    ("number", "fine", "wrong", "alarm"),
    [
        ("nonfinite", 0.0, 1e-6, "diverged"),
        ("largest", 10.0, 10.1, "diverged"),
        ("outside", 0.01, 0.011, "out_of_bounds"),
        ("spread", 0.05, 0.049, "dead_head"),
        ("v_spread", 0.05, 0.049, "dead_head"),
        ("rank_v", 3.0, 2.9, "collapsed_features"),
        ("rank_q", 3.0, 2.9, "collapsed_features"),
        ("sensitivity", 0.01, 0.0099, "action_insensitive"),
        ("turn_r2", 0.9, 0.91, "tracks_turn"),
        ("length_corr", -0.95, -0.96, "tracks_length"),
        ("q_length_corr", 0.95, 0.96, "tracks_length"),
        ("disagreement", 1.0, 1.1, "ensemble_disagrees"),
        ("disagreement", 1e-6, 0.0, "ensemble_identical"),
        ("target_gap", 0.25, 0.26, "target_lags"),
    ],
)
def test_a_number_beyond_its_threshold(number, fine, wrong, alarm):
    assert names({number: fine}) == []
    assert names({number: math.nan}) == []
    (raised,) = of_critic("c", {number: wrong}, {}, estimand="optimum")
    assert (raised.name, raised.value) == (alarm, wrong)


@pytest.mark.parametrize(
    ("number", "unsure", "wrong", "alarm"),
    [
        ("auc_mid_above_position_only", (-0.2, -0.4, -0.02), (-0.2, -0.3, -0.03), "worse_than_position_only"),
        ("action_slope", (-1, -2, 0), (-1, -2, -0.1), "actions_misordered"),
        ("first_within_task", (0.9, 0.75, 1), (0.9, 0.76, 1), "leak_first_page"),
    ],
)
def test_a_whole_interval_beyond_its_threshold(number, unsure, wrong, alarm):
    assert names(compared={number: Measured(*unsure)}) == []
    assert names(compared={number: Measured(wrong[0])}) == []  # a value without an interval says nothing
    assert names(compared={number: Measured(*wrong)}, estimand="optimum") == [alarm]


@pytest.mark.parametrize(
    ("number", "unsure", "wrong", "alarm"),
    [
        ("v_slope", (0.3, 0.1, 0.5), (0.3, 0.2, 0.49), "worse_than_constant"),
        ("auc_mid_above_q_mc", (-0.2, -0.4, -0.02), (-0.2, -0.3, -0.03), "worse_than_q_mc"),
        ("v_bias", (0.2, 0.1, 0.3), (0.2, 0.11, 0.3), "overestimates"),
        ("q_bias", (-0.2, -0.3, -0.1), (-0.2, -0.3, -0.11), "underestimates"),
        ("calibration", (0.1, 0.05, 0.15), (0.1, 0.06, 0.14), "uncalibrated"),
        ("end_slope", (0.3, 0, 0.5), (0.3, 0, 0.49), "blind_at_the_end"),
        ("end_bias", (-0.4, -0.5, -0.25), (-0.4, -0.5, -0.26), "blind_at_the_end"),
    ],
)
def test_the_level_of_values_is_that_of_the_behaviour_for_some(number, unsure, wrong, alarm):
    assert names(compared={number: Measured(*unsure)}) == []
    assert names(compared={number: Measured(*wrong)}) == [alarm]
    assert names(compared={number: Measured(*wrong)}, estimand="optimum") == []  # an expectile is above it on purpose


def test_the_true_optimum_of_random_logs_raises_nothing():
    """V* is right, and yet returns hardly rise with it; of a critic of the behaviour that slope would be a fault."""
    task = Task(Site.draw(0), 0).mdp
    (v, _), uniform = task.optimal(0.95), task.valid / task.valid.sum(axis=1, keepdims=True)
    returns, _ = task.evaluate(uniform, 0.95)
    cov = np.cov(v, returns, aweights=task.visitation(uniform))
    slope = cov[0, 1] / cov[0, 0]
    assert 0 < slope < 0.1
    found = {"v_slope": Measured(slope, 0.5 * slope, 1.5 * slope)}
    assert names(compared=found, estimand="optimum") == []
    assert names(compared=found, estimand="returns") == ["worse_than_constant"]
    (upside_down,) = of_critic("c", {}, {"v_slope": Measured(-0.3, -0.5, -0.1)}, estimand="optimum")
    assert (upside_down.name, upside_down.threshold) == ("worse_than_constant", 0.0)


def test_what_the_logs_give_away():
    told = Told("reward: 1", 30, Measured(0.5, 0.3, 0.7))
    (raised,) = of_logs(told, 0.0, [])
    assert raised.name == "leak_reward_words"
    assert "30 episodes say 'reward: 1'" in raised.sentence
    assert "0.50 [0.30, 0.70]" in raised.sentence
    assert of_logs(told._replace(above=Measured(0.5, 0.1, 0.9)), 0.05, []) == []
    assert of_logs(told._replace(above=Measured(-0.5, -0.7, -0.3)), math.nan, []) != []
    assert of_logs(None, math.nan, []) == []
    assert [alarm.value for alarm in of_logs(None, 0.06, [])] == [0.06]
    (both,) = of_logs(None, 1.0, ["buy", "find"])
    assert "'buy'" in both.sentence
    assert both.value == 2


def test_comparisons_are_sure_or_say_so():
    table = {"iql_lm": {"auc_mid": 0.6}, "q_mc": {"auc_mid": 0.55}, "position_only": {"auc_mid": 0.5}}
    above = {
        "auc_mid_above_q_mc": Measured(0.05, -0.01, 0.11),
        "auc_mid_above_position_only": Measured(0.1, 0.02, 0.18),
    }
    against_q_mc, against_position = comparisons("iql_lm", table, above)
    assert against_q_mc.startswith("iql_lm does NOT beat q_mc")
    assert "0.05 [-0.01, 0.11]" in against_q_mc
    assert against_position.startswith("iql_lm beats position_only")
    assert [line.count("too few episodes") for line in comparisons("iql_lm", table, {})] == [1, 1]
    assert comparisons("q_mc", {"q_mc": {"auc_mid": 0.5}}, {}) == []
    assert comparisons("iql_lm", {"iql_lm": {"auc_mid": math.nan}, "q_mc": {"auc_mid": 0.5}}, {}) == []


@pytest.fixture(scope="module")
def planting():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.delitem(__import__("sys").modules, "alarms", raising=False)
        import alarms as planting  # pyright: ignore[reportMissingImports]

        patch.setattr(planting, "_expectile", lambda mdp, mixture: mdp.evaluate(mixture, planting.GAMMA))  # it is slow
        yield planting, planting.pool(60)


def test_planted_faults_are_flagged(planting):
    module, truths = planting
    assert len(module.FAULTS) >= 20
    run = module.sound(truths, 0, 30, algo="sarsa", candidates=True)
    missed = {
        fault.__name__: wanted
        for fault, wanted in module.FAULTS.items()
        if wanted not in {alarm.name for alarm in module.judged(fault(run))}
    }
    assert missed == {}


def test_sound_critics_raise_none(planting):
    module, truths = planting
    raised = [alarm for seed in range(6) for alarm in module.judged(module.sound(truths, seed, 30))]
    assert raised == []


def test_every_alarm_has_a_fault_that_is_planted(planting):
    module, _ = planting
    said = {name for name in Path(alarms.__file__).read_text().split('Alarm("')[1:] for name in [name.split('"')[0]]}
    planted = set(module.FAULTS.values())
    assert said <= planted
    assert {"worse_than_q_mc", "worse_than_position_only"} <= planted
