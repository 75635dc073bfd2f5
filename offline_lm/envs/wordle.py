"""Wordle as in LMRL-Gym, on a list of words short enough to know every value exactly.

The facts are those of Abdulhai et al. 2023 (arXiv 2311.18232) and its repository: six guesses of a hidden word of five
letters, each word of the list equally likely; after a guess a letter is g (in its place), y (elsewhere in the word) or
b (not in it); a wrong guess earns -1, the right one 0 and ends the episode, and so does the sixth. Guesses are chosen
from the list, so that the paper's reward for what is no word cannot occur. The paper's list has 430 words; ours has 40
drawn from `WORDS`, none with a letter twice, so that feedback is the same under every rule for doubled letters.

The page is the board: guesses and feedback so far. The states are beliefs: the words that are still possible, all
equally likely, and the guesses left. Every policy of these two has exact values, all behaviours here and the optimum
among them; `play.play_texts` gives the exact return of one that reads the board.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from offline_lm.envs.exact import Array, End, Go, Move, Outcome, State, TextMDP, pick

BENCHMARK = "wordle"
GUESSES = 6
N_WORDS = 40

WORDS = tuple(
    """
    light might night right fight sight eight shape shade shake shame share shave shale grape grace grade grate grave
    graze crane crate craze crave stone store stole stove stoke brick trick thick flick slick quick round sound mound
    found pound bound wound hound batch match patch latch watch plant slant giant chant grant bread tread break spine
    shine whine blame flame frame house mouse rouse money honey train brain grain drain stain beach peach teach reach
    lemon melon board hoard music radio ocean uncle zebra juice olive piano water tiger cloud dance wheat fruit crisp
""".split()
)
"""Many differ in one letter: the guess that is most likely right then often tells little."""


def feedback(guess: str, word: str) -> str:
    """Five marks, apart: `feedback("crane", "react")` is "y y g b y"."""
    return " ".join("g" if a == b else "y" if a in word else "b" for a, b in zip(guess, word, strict=True))


def task(
    seed: int = 0, number: int = 0, *, words: Sequence[str] | None = None, data: Sequence[str] = ("any", "half")
) -> TextMDP:
    """The game on the list that `seed` draws. `number` only names the task.

    A state is (guesses left, indices of the words still possible).

    Args:
        words: the list, in place of the one drawn; different words of five different letters.
        data: the `players` whose games are the logs; by default they earn about what the paper's data does, -4.
    """
    if words is None:
        words = pick(np.random.default_rng([seed, 4]), WORDS, N_WORDS)
    spelt = [" ".join(word) for word in words]
    marks = [[feedback(guess, word) for word in words] for guess in words]

    def view(state: State) -> tuple[str, list[Move]]:
        left, possible = state
        moves: list[Move] = []
        for g, guess in enumerate(spelt):
            parts: dict[str, list[int]] = defaultdict(list)
            for w in possible:
                parts[marks[g][w]].append(w)
            outcomes: list[tuple[float, Outcome]] = []
            for told, part in parts.items():
                if part == [g]:
                    after = End(0.0)
                elif left == 1:
                    after = End(-1.0)
                else:
                    after = Go((left - 1, tuple(part)), -1.0, told)
                outcomes.append((len(part) / len(possible), after))
            moves.append((guess, outcomes))
        return "Wordle", moves

    start: State = (GUESSES, tuple(range(len(words))))
    mdp = TextMDP.explore(
        start, view, benchmark=BENCHMARK, seed=seed, number=number, goal="Guess the hidden word in few guesses.",
        limit=GUESSES, success=0.0,
    )  # fmt: skip
    every = players(mdp)
    return replace(mdp, policies={name: every[name] for name in data})


def players(mdp: TextMDP) -> dict[str, Array]:
    """The paper's scripted players, policies [S, A]: any word; any possible word; each of these half the time; the
    possible word whose feedback has the most entropy."""
    words = [action.replace(" ", "") for action in mdp.actions[0]]
    marks = [[feedback(guess, word) for word in words] for guess in words]
    anything = np.full(mdp.next.shape, 1 / mdp.next.shape[1])
    possible, informed = np.zeros(mdp.next.shape), np.zeros(mdp.next.shape)
    for s, (_, hidden) in enumerate(mdp.states):
        possible[s, list(hidden)] = 1 / len(hidden)
        entropy = [_entropy(marks[g], hidden) for g in hidden]
        best = [g for g, nats in zip(hidden, entropy, strict=True) if nats > max(entropy) - 1e-9]
        informed[s, best] = 1 / len(best)
    return {"any": anything, "half": (anything + possible) / 2, "possible": possible, "informed": informed}


def _entropy(marks: list[str], words: Sequence[int]) -> float:
    counts = Counter(marks[w] for w in words).values()
    return -sum(n / len(words) * math.log(n / len(words)) for n in counts)


def normalised_score(mean_return: float, *, worst: float, data: float, best: float) -> float:
    """The paper's score (its appendix E): 0 for the worst return, 50 for that of the data, 100 for the best.

    Its own scale for Wordle: data -4.12, best -1.935, on which its ILQL (-2.04) scores 97.7.
    """
    if mean_return < data:
        return 50 * (mean_return - worst) / (data - worst)
    return 50 + 50 * (mean_return - data) / (best - data)
