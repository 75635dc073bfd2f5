"""Wordle against games played out word by word, without a set of possible words anywhere."""

import functools
import math
from collections import defaultdict

import numpy as np
import orjson
import pytest

from offline_lm.envs import exact, wordle
from offline_lm.envs.play import play_texts
from offline_lm.logs.jsonl import read
from offline_lm.types import Episode

FEW = ("light", "might", "stone", "store", "crane")


@functools.cache
def task(seed=0, words=None):
    return wordle.task(seed, words=words)


def test_feedback_by_hand():
    assert wordle.feedback("crane", "react") == "y y g b y"
    assert wordle.feedback("light", "might") == "b g g g g"
    assert wordle.feedback("stone", "stone") == "g g g g g"


def test_the_words_are_what_the_module_says():
    assert len(wordle.WORDS) == len(set(wordle.WORDS)) == 95
    assert all(len(word) == len(set(word)) == 5 for word in wordle.WORDS)
    first = task().actions[0]
    assert len(first) == len(set(first)) == 40
    assert {word.replace(" ", "") for word in first} < set(wordle.WORDS)


# -- exact values ----------------------------------------------------------------------------------------------


def parts(secrets, guess):
    told = defaultdict(list)
    for secret in secrets:
        told[wordle.feedback(guess, secret)].append(secret)
    return told.items()


def played(secrets, left, weigh):
    """Mean reward to come over the secrets, as boards are played out: `weigh` gives the share of each guess."""
    options = []
    for guess in FEW:
        total = 0.0
        for told, part in parts(secrets, guess):
            if told != "g g g g g":
                total += len(part) * (-1.0 + (played(part, left - 1, weigh) if left > 1 else 0.0))
        options.append(total / len(secrets))
    return weigh(secrets, options)


def half(secrets, options):
    share = [0.5 / 5 + 0.5 * (word in secrets) / len(secrets) for word in FEW]
    return float(np.dot(share, options))


@pytest.mark.parametrize("left", [1, 2, 4])
def test_values_of_a_short_list_by_playing_it_out(left):
    mdp = task(words=FEW)
    mine = wordle.players(mdp)["half"]
    (v_best, _), (v_half, _) = mdp.optimal(1.0), mdp.evaluate(mine, 1.0)
    checked = 0
    for s, (guesses, possible) in enumerate(mdp.states):
        if guesses == left:
            secrets = [FEW[i] for i in possible]
            assert v_best[s] == pytest.approx(played(secrets, left, lambda _, options: max(options)), abs=1e-12)
            assert v_half[s] == pytest.approx(played(secrets, left, half), abs=1e-12)
            checked += 1
    assert checked >= 3


def test_the_players_by_hand_and_in_order():
    mdp = task()
    returns = {name: mdp.play(policy) for name, policy in wordle.players(mdp).items()}
    # any word: each of the six guesses is right once in 40
    assert returns["any"] == pytest.approx(-sum((39 / 40) ** k for k in range(1, 7)), abs=1e-12)
    v, q = mdp.optimal(1.0)
    optimum = mdp.play(mdp.greedy(q))
    assert optimum == pytest.approx(v[0])
    assert returns["any"] < returns["half"] < returns["possible"] < returns["informed"] < optimum
    # one guess is right, and at best every other one tells the word
    assert -2 < optimum <= -39 / 40
    assert np.mean([returns["any"], returns["half"]]) == pytest.approx(-4.12, abs=0.15)  # the paper's data
    assert list(mdp.behaviours()) == ["any", "half"]


def test_information_is_entropy_over_possible_words():
    mdp = task(words=FEW)
    informed = wordle.players(mdp)["informed"]
    # crane parts the others in light|might and stone|store, light and might in one, two and ...: by hand
    gains = {g: -sum(len(p) / 5 * math.log(len(p) / 5) for _, p in parts(FEW, g)) for g in FEW}
    best = [g for g in FEW if gains[g] > max(gains.values()) - 1e-9]
    np.testing.assert_allclose(informed[0], [(g in best) / len(best) for g in FEW])
    assert (wordle.players(mdp)["possible"][0] == 0.2).all()


def test_the_score_of_the_paper():
    """Returns and scale as in the paper's repository: ILQL and behaviour cloning."""
    scale = {"worst": -6.0, "data": -4.121715, "best": -1.935}
    assert wordle.normalised_score(-2.035400390625, **scale) == pytest.approx(97.7, abs=0.05)
    assert wordle.normalised_score(-2.814208984375, **scale) == pytest.approx(79.9, abs=0.05)
    assert [wordle.normalised_score(scale[name], **scale) for name in scale] == [0, 50, 100]
    assert wordle.normalised_score(-5.0608575, **scale) == pytest.approx(25)


# -- boards ----------------------------------------------------------------------------------------------------


def consistent(board, words):
    """Words of the list that a board leaves."""
    lines = board.split("\n")[1:]
    turns = list(zip(lines[::2], lines[1::2], strict=True))
    return [w for w in words if all(wordle.feedback(g.replace(" ", ""), w) == told for g, told in turns)]


def test_boards_show_the_state():
    mdp = task()
    words = [word.replace(" ", "") for word in mdp.actions[0]]
    for s in range(0, len(mdp.states), 17):
        left, possible = mdp.states[s]
        assert consistent(mdp.pages[s], words) == [words[i] for i in possible]
        assert mdp.pages[s].count("\n") == 2 * (6 - left)


def last_consistent(words):
    def choose(states):
        return [words.index(consistent(state["observation"], words)[-1]) for state in states]

    return choose


def test_a_policy_that_reads_earns_what_it_earns_for_each_word():
    mdp = task()
    words = [word.replace(" ", "") for word in mdp.actions[0]]
    total = 0
    for secret in words:
        board = "Wordle"
        for _ in range(6):
            guess = consistent(board, words)[-1]
            if guess == secret:
                break
            total -= 1
            board += f"\n{' '.join(guess)}\n{wordle.feedback(guess, secret)}"
    assert play_texts(mdp, last_consistent(words)) == pytest.approx(total / 40)


def test_games_are_logged_as_they_are_played(tmp_path):
    mdp = task()
    words = [word.replace(" ", "") for word in mdp.actions[0]]
    made = list(exact.record([mdp], 60, seed=2))
    for episode in made:
        steps = episode["steps"]
        assert episode["success"] == (steps[-1]["reward"] == 0)
        assert episode["terminated"] is True
        assert [s["reward"] for s in steps[:-1]] == [-1.0] * (len(steps) - 1)
        assert episode["outcome_reward"] == (1 - len(steps) if episode["success"] else -6)
        secrets = consistent(steps[-1]["observation"], words)
        last = steps[-1]["action"].replace(" ", "")
        assert last in secrets if episode["success"] else secrets != [last]
        assert [s["observation"].count("\n") for s in steps] == [2 * t for t in range(len(steps))]
        assert [s["observation"].split("\n")[-2] for s in steps[1:]] == [s["action"] for s in steps[:-1]]
    assert {e["success"] for e in made} == {True, False}
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join(map(orjson.dumps, made)))
    for e in read(log):
        assert isinstance(e, Episode)
        assert e.quality_flags == (("success_without_reward",) if e.success else ())  # its reward is 0, all others less
