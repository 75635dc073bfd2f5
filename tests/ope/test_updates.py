"""Each fault of an actor's updates raises its own alarm, and a sound update none."""

import pytest

from offline_lm.ope.updates import alarms

SOUND = {"clip_fraction": 0.1, "ess": 0.8, "approx_kl": 0.02, "entropy": 1.0}
BEFORE, AFTER = {"logprob_success": -12.0}, {"logprob_success": -9.0}


def test_a_sound_update_raises_none():
    assert alarms(BEFORE, AFTER, SOUND, 0.4) == []
    assert alarms(BEFORE, AFTER, {"entropy": 1.0}, 0.0) == []  # cloning compares with no policy


@pytest.mark.parametrize(
    ("name", "after", "last", "silent"),
    [
        ("silent_groups", AFTER, SOUND, 0.99),
        ("clipped", AFTER, {**SOUND, "clip_fraction": 0.7}, 0.0),
        ("few_effective_samples", AFTER, {**SOUND, "ess": 0.01}, 0.0),
        ("far_from_behaviour", AFTER, {**SOUND, "approx_kl": 3.0}, 0.0),
        ("forgot_successes", {"logprob_success": -40.0}, SOUND, 0.0),
    ],
)
def test_each_fault_raises_its_own(name, after, last, silent):
    (alarm,) = alarms(BEFORE, after, last, silent)
    assert alarm.name == name
    assert len(alarm.sentence.split()) > 8


def test_what_is_not_known_is_no_alarm():
    nan = float("nan")
    assert alarms({"logprob_success": nan}, {"logprob_success": nan}, SOUND, 0.0) == []
