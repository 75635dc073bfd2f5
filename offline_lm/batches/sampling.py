"""Which episodes an update trains on: a function of (seed, step) and of what is eligible, with nothing remembered.

A `Sampler` draws from strata, each with its share of every batch: the sources of a mix, and within them successes and
failures. What of it a store must be asked for is read in `sampling_store`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from offline_lm.errors import UserError

Array = np.ndarray

STRATEGIES = ("uniform", "success", "recency", "td")
_SHARES, _DRAWS, _EPOCHS = range(3)
"""What random numbers are for: each use has its own, so that none depends on how many another took."""
_LEAST_PRIORITY = 1e-6


@dataclass(frozen=True, eq=False)
class Stratum:
    """Episodes that have a share of every batch between them.

    Attributes:
        share: of a batch's episodes.
        episodes: int64 [m], ascending.
        probability: float64 [m], each draw's, with replacement; None: without replacement, in epochs shuffled anew.
    """

    share: float
    episodes: Array
    probability: Array | None = None


@dataclass(frozen=True, eq=False)
class Sampler:
    """Batches of episodes, each a function of (seed, step, sizes, strata).

    A run that resumes at a step, or makes its sampler anew because episodes have come, draws what it would have drawn:
    there is no state to save. Episodes that are not eligible change nothing.

    Attributes:
        strata: disjoint, their shares sum to 1.
        beta: how much of the bias of `probability` the weights correct, 0 to 1.
        said: what the one who asked for it should know, in sentences.
    """

    strata: tuple[Stratum, ...]
    seed: int
    beta: float = 0.0
    said: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Episodes that can be drawn: those held, however many were ever added (trap 12)."""
        return sum(len(stratum.episodes) for stratum in self.strata)

    def batches(
        self, sizes: Array, *, at_least: int | None = None, at_most: int | None = None, start: int = 0
    ) -> Iterator[Array]:
        """Endless batches of episodes, int64 [b], from the one of step `start` on.

        Batches are cut from one endless sequence in which each stratum has its share: of a batch of b episodes, of any
        size, b * share to within one where there are two strata, two where there are more, and of all batches
        together as exactly.

        Where the batch of a step lies in the sequence, and in the epochs of strata drawn without replacement, is that
        of the sizes before it: `start` costs a walk over the batches before, 60 to 160 us each. One stratum with
        probabilities needs none.

        Args:
            sizes: int64 [E], above 0, of every episode.
            at_least: a batch ends with the episode that brings it to this size.
            at_most: or before the one that would exceed this; an episode that alone exceeds it is a batch of its own.
        """
        size = at_most if at_least is None else at_least
        if size is None or None not in (at_least, at_most):
            raise ValueError("one of at_least and at_most is wanted")
        epochs = [None if s.probability is not None else _Epochs(s.episodes, self._epochs_of(i))
                  for i, s in enumerate(self.strata)]  # fmt: skip
        k = len(self.strata)
        shares, phases = [s.share for s in self.strata], self._rng(_SHARES).random(k)
        done, guess = 0, 32
        for step in count(start if epochs == [None] else 0):
            streams = [e or _Draws(s, self._rng(_DRAWS, step, i))
                       for i, (e, s) in enumerate(zip(epochs, self.strata, strict=True))]  # fmt: skip
            while True:
                counts = _apportioned(done + np.arange(guess + 1), shares, phases)
                counts = [n - n[0] for n in counts]
                seen = [stream.first(int(n[-1])) for stream, n in zip(streams, counts, strict=True)]
                parts = [np.r_[0, np.cumsum(sizes[e])][n] for e, n in zip(seen, counts, strict=True)]
                totals = np.sum(parts, axis=0)
                if totals[-1] > size:
                    break
                guess *= 2
            if at_least is not None:
                length = int(np.searchsorted(totals, size))
            else:
                length = max(int(np.searchsorted(totals, size, side="right")) - 1, 1)
            done, guess = done + length, 2 * length + 8
            for stream, n in zip(streams, counts, strict=True):
                stream.pass_over(int(n[length]))
            if step >= start:
                yield np.concatenate([e[: n[length]] for e, n in zip(seen, counts, strict=True)])

    def weights(self, episodes: int) -> Array:
        """float64 [episodes], what a loss multiplies each step of an episode with: (m P(e))^-beta, at most 1.

        Schaul et al. 2015, section 3.4, with m the episodes of a stratum: the shares of strata are meant, and are not
        corrected. 0 for what cannot be drawn.
        """
        out = np.zeros(episodes)
        for s in self.strata:
            out[s.episodes] = 1.0 if s.probability is None else (len(s.episodes) * s.probability) ** -self.beta
        return out / out.max()

    def _epochs_of(self, stratum: int) -> np.random.Generator:
        return np.random.default_rng(self.seed) if len(self.strata) == 1 else self._rng(_EPOCHS, stratum)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


def _apportioned(n: Array, shares: Sequence[float], phases: Array) -> list[Array]:
    """How many of the first n of a sequence are of each stratum: lines of slope share, rounded.

    Strata are split in two, and those again, each time to within one, so that no count ever falls as n grows.

    Args:
        n: int64 [m], ascending.
        phases: [k] from 0 to below 1, where the lines begin.
    """
    if len(shares) == 1:
        return [n]
    half = len(shares) // 2
    left = np.floor(n * (sum(shares[:half]) / sum(shares)) + phases[half]).astype(np.int64)
    return [
        *_apportioned(left, shares[:half], phases[:half]),
        *_apportioned(n - left, shares[half:], phases[half:]),
    ]


class _Epochs:
    """Episodes without replacement, shuffled anew in every epoch."""

    def __init__(self, episodes: Array, rng: np.random.Generator) -> None:
        self.episodes, self.rng, self.ahead = episodes, rng, episodes[:0]

    def first(self, n: int) -> Array:
        """The next n episodes; they stay where they are."""
        if n > len(self.ahead):
            epochs = -(-(n - len(self.ahead)) // len(self.episodes))
            self.ahead = np.concatenate([self.ahead, *(self.rng.permutation(self.episodes) for _ in range(epochs))])
        return self.ahead[:n]

    def pass_over(self, n: int) -> None:
        self.ahead = self.ahead[n:]


class _Draws:
    """Episodes of one step with replacement, each by its probability."""

    def __init__(self, stratum: Stratum, rng: np.random.Generator) -> None:
        assert stratum.probability is not None
        self.stratum, self.rng, self.drawn = stratum, rng, stratum.episodes[:0]
        self.edges = np.cumsum(stratum.probability)

    def first(self, n: int) -> Array:
        if n > len(self.drawn):
            at = np.searchsorted(self.edges, self.rng.random(n - len(self.drawn)) * self.edges[-1], side="right")
            self.drawn = np.concatenate([self.drawn, self.stratum.episodes[at]])
        return self.drawn[:n]

    def pass_over(self, n: int) -> None:
        """Nothing is left of a step's draws."""


def uniform(eligible: Array, seed: int) -> Sampler:
    """All `eligible` (bool [E]) alike, without replacement within an epoch."""
    return Sampler((Stratum(1.0, np.flatnonzero(eligible)),), seed)


def sampler(
    eligible: Array, seed: int, strategy: str = "uniform", *, capacity: int | None = None,
    sources: Mapping[str, tuple[float, Array]] | None = None, order: Array | None = None, success: Array | None = None,
    priority: Array | None = None, half_life: float = 1000.0, alpha: float = 0.6, beta: float = 1.0,
) -> Sampler:  # fmt: skip
    """The sampler of a strategy over the `eligible` episodes.

    `uniform`: without replacement within an epoch. `success`: half of every batch from episodes that succeeded, half
    from those that failed, each as `uniform`; where there are none of a kind, all are drawn as `uniform`, and `said`
    tells. `recency`: by 0.5 ** (n / half_life), n the newer episodes of its source. `td`: by priority ** alpha (Schaul
    et al. 2015, eq. 1, the proportional variant), which `Sampler.weights` correct.

    Args:
        eligible: bool [E], at least one.
        capacity: of them the newest so many alone.
        sources: name to (share, bool [E]), disjoint: a batch is mixed of them, and of nothing else (RLPD, Ball et al.
            2023, halves of logged and fresh). The strategy holds within each. None of them may be empty.
        order: [E] ascending with time; for `recency` and `capacity`.
        success: float64 [E] (`Replay.success`): 1 is success, below is failure, NaN, unknown, is not drawn; for
            `success`.
        priority: float64 [E], at least 0, NaN where not known yet: such have the greatest that is known (Schaul,
            algorithm 1), so that they are seen; for `td`. See `episode_priority`.

    Raises:
        ValueError: an unknown strategy, or an array that it needs is not given.
        UserError: a source has no episode that is held.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy}: one of {', '.join(STRATEGIES)} is wanted")
    held = np.flatnonzero(eligible)
    if capacity is not None and len(held) > capacity:
        held = np.sort(held[np.argsort(_given(order, "order")[held], kind="stable")[-capacity:]])
    strata, said = [], []
    for name, (share, belongs) in (sources or {"": (1.0, np.ones(len(eligible), bool))}).items():
        mine = held[belongs[held]]
        if not len(mine):
            raise UserError(f"mix: no episode of {name} is held for training, of which a share of {share:g} is wanted")
        if strategy == "success":
            classes, told = _by_success(mine, _given(success, "success")[mine], f" of {name}" if name else "")
            strata += [Stratum(share / len(classes), each) for each in classes]
            said += told
        elif strategy == "recency":
            newer = np.empty(len(mine))
            newer[np.argsort(_given(order, "order")[mine], kind="stable")[::-1]] = np.arange(len(mine))
            strata.append(Stratum(share, mine, _normed(0.5 ** (newer / half_life))))
        elif strategy == "td":
            known = _priorities(_given(priority, "priority")[held], belongs[held])
            strata.append(Stratum(share, mine, _normed(known**alpha)))
        else:
            strata.append(Stratum(share, mine))
    return Sampler(tuple(strata), seed, beta if strategy == "td" else 0.0, tuple(said))


def _by_success(episodes: Array, success: Array, where: str) -> tuple[Sequence[Array], list[str]]:
    won, failed = episodes[success >= 1], episodes[success < 1]
    unknown = len(episodes) - len(won) - len(failed)
    if not len(won) or not len(failed):
        none = "succeeded" if not len(won) else "failed"
        return [episodes], [f"strategy=success: no episode{where} {none}, so all {len(episodes)} are drawn uniformly"]
    told = [f"strategy=success: {unknown} episodes{where} of unknown outcome are not drawn"] if unknown else []
    return [won, failed], told


def _priorities(held: Array, mine: Array) -> Array:
    """Of those that are `mine`, above 0; the greatest of all `held` where unknown."""
    greatest = np.nanmax(held) if not np.isnan(held).all() else 1.0
    return np.where(np.isnan(held), greatest, held)[mine] + _LEAST_PRIORITY


def _given(x: Array | None, name: str) -> Array:
    if x is None:
        raise ValueError(f"{name} is wanted")
    return x


def _normed(x: Array) -> Array:
    return x / x.sum()


def episode_priority(td_error: Array, offsets: Array) -> Array:
    """float64 [E]: an episode's mean |TD error| over the steps that have one, NaN where none has.

    The mean, not the sum: a batch is filled with steps, and long episodes take their room in it.

    Args:
        td_error: float64 [N], NaN where unknown.
        offsets: int64 [E+1].
    """
    known = ~np.isnan(td_error)
    total = np.add.reduceat(np.where(known, np.abs(td_error), 0.0), offsets[:-1])
    n = np.add.reduceat(known.astype(np.int64), offsets[:-1])
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def rows_of(offsets: Array, episodes: Array) -> Array:
    """int64: the rows of whole `episodes`, end to end, each in order."""
    lengths = offsets[episodes + 1] - offsets[episodes]
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(offsets[episodes] - ends + lengths, lengths)
