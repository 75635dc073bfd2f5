"""Random Markov decision processes whose pages are text, and whose values are known exactly.

Garnets (Archibald, McKinnon & Thomas 1995; Bhatnagar et al. 2009): `states` states with `actions` actions each; an
action leads to `branching` successors drawn without replacement, with chances that cut the unit interval at random
points, and earns a reward drawn from a normal distribution. Ours end: each outcome is the last with chance `ends`. An
episode starts anywhere. The behaviour policy is drawn too, uniform over the simplex, but leaves no action without a
hundredth of it, so that logs can show them all.

The values of the behaviour, the optimum and the expectile fixed point of IQL are `TextMDP.evaluate`, `optimal` and
`expectile`. With `branching=1` and `ends` 0 or 1 nothing is left to chance, and a log in which every action occurs
determines Q*.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from offline_lm.envs.exact import End, Go, Move, Outcome, State, TextMDP

BENCHMARK = "mdp"
STEP_LIMIT = 40
LEAST = 0.01
"""What every action has of the behaviour policy, at least."""

_ONSETS, _VOWELS = "b d f g h j k l m n p r s t v w z".split(), "a e i o u".split()


def task(
    seed: int = 0, number: int = 0, *, states: int = 12, actions: int = 3, branching: int = 2, ends: float = 0.1
) -> TextMDP:
    """The process that (`seed`, `number`) draws.

    Args:
        states, actions: how many; every state has every action.
        branching: successors of an action, at most `states`.
        ends: the chance that an outcome ends the episode, in place of going on.
    """
    rng = np.random.default_rng([seed, 5, number])
    names = _names(rng, states + actions)
    places, acts = names[:states], names[states:]
    table = [[_outcomes(rng, states, branching, ends) for _ in acts] for _ in places]

    def view(state: State) -> tuple[str, list[Move]]:
        moves: list[Move] = [(f"go {act}", outcomes) for act, outcomes in zip(acts, table[state[0]], strict=True)]
        return f"This is {places[state[0]]}.", moves

    start: list[tuple[float, State]] = [(1 / states, (s,)) for s in range(states)]
    mdp = TextMDP.explore(
        start, view, benchmark=BENCHMARK, seed=seed, number=number, goal="Earn much.", limit=STEP_LIMIT, success=None
    )
    behaviour = LEAST + (1 - LEAST * actions) * rng.dirichlet(np.ones(actions), states)
    return replace(mdp, policies={"behaviour": behaviour / behaviour.sum(axis=1, keepdims=True)})


def _outcomes(rng: np.random.Generator, states: int, branching: int, ends: float) -> list[tuple[float, Outcome]]:
    """What one action leads to; its reward is the same whatever happens."""
    reward = float(rng.normal())
    cuts = np.sort(rng.random(branching - 1))
    chances = np.diff(cuts, prepend=0.0, append=1.0)
    successors = rng.permutation(states)[:branching]
    last = rng.random(branching) < ends
    return [
        (float(chance), End(reward) if over else Go((int(s),), reward))
        for chance, s, over in zip(chances, successors, last, strict=True)
    ]


def _names(rng: np.random.Generator, n: int) -> list[str]:
    """Different words made up of two syllables."""
    syllables = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
    drawn = rng.choice(len(syllables) ** 2, n, replace=False)
    return [syllables[i // len(syllables)] + syllables[i % len(syllables)] for i in drawn]
