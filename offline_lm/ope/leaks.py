"""What logs give away: pages that state the reward, and tasks that stand on both sides of the split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from offline_lm.batches.replay import Replay
from offline_lm.batches.tokens import Tokens
from offline_lm.ope import clustered
from offline_lm.ope.clustered import NAN, Measured

Array = np.ndarray

REWARD_WORDS = (
    r"(?i)\b(?:reward|score|success|succeeded|passed|outcome|return)\b[\\\"']{0,2}\s*(?:\([^)\n]{0,40}\))?\s*[:=]\s*"
    r"(?:[-+]?[0-9]+(?:\.[0-9]+)?|true|false|yes|no|success|failure|pass|fail)\b"
)
"""A reward with its value, such as `reward: 1.0`, `"success": true`, `score (min 0.0, max 1.0): 0.67`. RE2 syntax."""

FEWEST = 5
"""Episodes whose pages say a phrase, below which it is not looked at."""
STARTS = 10
"""Different beginnings on the held-out side, below which beginnings do not tell tasks apart."""


class Told(NamedTuple):
    """A phrase of the pages, in how many episodes it stands, and how much likelier these succeed than the others."""

    phrase: str
    episodes: int
    above: Measured


def telling(phrases: Mapping[str, Array], success: Array, tasks: list[str]) -> Told | None:
    """The phrase that tells success best, for or against it; None if pages say none often enough.

    Args:
        phrases: by phrase the episodes, int64 from 0, of which a page says it before the last action is taken.
        success: float64 [E], NaN where unknown.
        tasks: [E].

    The interval allows for as many phrases as are compared (Bonferroni).
    """
    known = np.flatnonzero(~np.isnan(success))
    won = (success[known] >= 1).astype(float)
    ids = clustered.clusters(np.array(tasks)[known], known)
    said = {phrase: np.isin(known, episodes) for phrase, episodes in phrases.items()}
    said = {phrase: here for phrase, here in said.items() if FEWEST <= here.sum() <= len(known) - FEWEST}
    level = 1 - (1 - clustered.LEVEL) / max(len(said), 1)
    told = [Told(p, int(here.sum()), clustered.difference(won, here, ids, level)) for p, here in said.items()]
    return max(told, key=lambda each: max(each.above.low, -each.above.high), default=None)


def both_sides(replay: Replay) -> list[str]:
    """Tasks that have episodes in training and held out, in order of name."""
    held = {task for task, out in zip(replay.tasks, replay.held_out, strict=True) if out}
    return sorted(held & {task for task, out in zip(replay.tasks, replay.held_out, strict=True) if not out})


def shared_starts(replay: Replay, tokens: Tokens) -> float:
    """Share of held-out episodes that begin with the very prompt, goal and page, of a training episode.

    NaN where the held-out side has fewer than `STARTS` different beginnings.
    """
    starts = np.array([hashlib.sha256(tokens.prompt(n).tobytes()).hexdigest() for n in replay.offsets[:-1].tolist()])
    held, train = starts[replay.held_out], starts[~replay.held_out]
    return float(np.isin(held, train).mean()) if len(np.unique(held)) >= STARTS else NAN
