"""What logs give away: pages that state the reward, and tasks on both sides of the split."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.ope import leaks

PATTERN = re.compile(leaks.REWARD_WORDS)


@pytest.mark.parametrize(
    "said",
    [
        *("reward: 1.0", "Reward = -1", '"success": true', r"\"success\": false"),
        *("Your score (min 0.0, max 1.0): 0.67", "outcome: failure"),
    ],
)
def test_a_stated_reward_is_found(said):
    assert PATTERN.search(f"Thank you.\n{said}\n")


@pytest.mark.parametrize(
    "said", ["free returns: 30 days", "reward points", "success story", "highscore: 12", "scored: 3", "return to list"]
)
def test_other_words_are_not(said):
    assert PATTERN.search(said) is None


def test_the_phrase_that_tells_success_best():
    success = np.r_[np.ones(20), np.zeros(20), np.nan]
    tasks = [f"task{i // 2}" for i in range(41)]
    phrases = {
        "score: 5": np.arange(0, 40, 2),
        "reward: 1": np.arange(0, 16),
        "reward: 0": np.arange(20, 24),  # in four episodes alone
    }
    told = leaks.telling(phrases, success, tasks)
    assert told is not None
    assert (told.phrase, told.episodes) == ("reward: 1", 16)
    assert told.above.value == pytest.approx(1 - 4 / 24)
    single = leaks.telling({"reward: 1": phrases["reward: 1"]}, success, tasks)
    assert single is not None
    assert single.above.low > told.above.low  # two phrases are compared: the interval is wider
    lost = leaks.telling({"outcome: failure": np.arange(20, 40)}, success, tasks)
    assert lost is not None
    assert lost.above == (-1.0, -1.0, -1.0)
    assert leaks.telling({}, success, tasks) is None


def episodes(starts, held_out, tasks):
    """Episodes of one step, whose prompts are these numbers."""
    n = len(starts)
    flat, none = np.zeros(n), np.zeros(0, int)
    replay = Replay(
        [f"e{i}" for i in range(n)], np.arange(n + 1), np.zeros(n, int), tasks, flat == 0, flat, flat == 0, flat,
        flat == 0, flat, np.array(held_out, bool),
    )  # fmt: skip
    tokens = Tokens(
        np.repeat(starts, 2), 2 * np.arange(n + 1), none, np.zeros(n + 1, int), np.arange(n + 1), flat == 0, flat == 0,
        np.zeros(n + 1, int), none, np.zeros(n, int), np.zeros((n, 2), int), np.zeros((n, 4), int),
    )  # fmt: skip
    return replay, tokens


def test_beginnings_that_stand_on_both_sides():
    starts, held_out = np.r_[np.arange(12), np.arange(9, 21)], [False] * 12 + [True] * 12
    replay, tokens = episodes(starts, held_out, [f"t{i}" for i in range(24)])
    assert leaks.shared_starts(replay, tokens) == pytest.approx(3 / 12)
    assert leaks.both_sides(replay) == []
    assert leaks.both_sides(replace(replay, tasks=[f"t{s}" for s in starts])) == ["t10", "t11", "t9"]
    same, tokens = episodes(np.zeros(24, int), held_out, replay.tasks)
    assert math.isnan(leaks.shared_starts(same, tokens))  # every episode begins alike, as in Wordle
