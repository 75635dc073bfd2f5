"""Made-up words and written numbers."""

import ast
import re
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from offline_lm import reading
from offline_lm.envs import office, shop
from offline_lm.reading import worlds
from offline_lm.reading.scenes import _PLACES
from offline_lm.reading.words import Scale, scales, word, words
from offline_lm.reading.worlds import World

CONTENT = {  # what the exact-truth sites speak of; their sizes ("mini") and colours among it
    w.lower()
    for text in (*shop._NOUNS, *shop._COLOURS, *shop._MATERIALS, *shop._SIZES, *office._NAMES, *office._EQUIPMENT,
                 *office._DAYS)
    for w in text.split()
}  # fmt: skip


def forms():
    """One scale of every form of writing, and how it is read back."""
    found: dict[tuple[str, int], Scale] = {}
    for seed in range(200):
        for scale in scales(Random(seed)).values():
            found.setdefault((scale.form, scale.high), scale)
    return list(found.values())


def read(text):
    """A written value as a number, by means other than those that wrote it."""
    for form in ("%Y-%m-%d", "%d %b", "%H:%M"):
        try:
            return (datetime.strptime(text, form) - datetime(1900, 1, 1)).total_seconds()
        except ValueError:
            continue
    return float(re.sub(r"^\$| (?:EUR|kg|min|seats)$", "", text))


def test_every_word_is_made_of_three_letters_or_more():
    rng = Random(0)
    drawn = [word(rng) for _ in range(5000)]
    assert all(re.fullmatch("[a-z]{3,}", w) for w in drawn)
    assert len(set(drawn)) > 4500


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_words_are_as_many_as_asked_and_differ(n):
    for seed in range(50):
        drawn = words(Random(seed), n)
        assert len(drawn) == len(set(drawn)) == n


def test_some_words_are_one_letter_apart():
    """Else a reader need compare no more than the first letters."""
    apart = 0
    for seed in range(200):
        drawn = words(Random(seed), 8)
        apart += any(len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1
                     for i, a in enumerate(drawn) for b in drawn[:i])  # fmt: skip
    assert 100 < apart < 200  # six draws of 0.15 or so: in most lists, not in all


def test_made_up_words_are_those_of_the_exact_truth_sites_by_rare_accident_only():
    rng = Random(1)
    assert sum(word(rng) in CONTENT for _ in range(20_000)) < 20  # one in a thousand


def test_few_worlds_hold_a_content_word_of_the_sites():
    with_one = 0
    for seed in range(400):
        world = World(Random(seed))
        drawn = {*world.kinds, *world.spare, *(v for values in world.words.values() for v in values)}
        with_one += not drawn.isdisjoint(CONTENT)
    assert with_one < 0.03 * 400  # of some 17 words each


def test_fixed_wording_shares_no_noun_colour_material_or_room_with_the_sites():
    fixed = " ".join([*worlds._FIELDS, *worlds._SUBMIT, *worlds._BACK, *worlds._NEXT])
    assert CONTENT.isdisjoint(fixed.split())


def test_reading_imports_nothing_of_ours_but_itself():
    for file in Path(reading.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, file
                names = [node.module or ""]
            ours = [name for name in names if name.split(".")[0] == "offline_lm"]
            assert all(name.startswith("offline_lm.reading.") for name in ours), file


@pytest.mark.parametrize("scale", forms(), ids=lambda s: f"{s.form}-{s.high}")
def test_written_values_order_as_their_numbers_do(scale):
    """From 0 to one past the highest: limits lie there too."""
    values = [read(scale.written(x)) for x in range(scale.high + 2)]
    assert all(a < b for a, b in pairwise(values))


@pytest.mark.parametrize("scale", forms(), ids=lambda s: f"{s.form}-{s.high}")
def test_numbers_drawn_lie_within_their_bounds(scale):
    drawn = [scale.draw(Random(seed)) for seed in range(300)]
    assert scale.low <= min(drawn) < max(drawn) <= scale.high


def test_no_word_for_the_best_is_a_word_for_a_place_in_a_list():
    said = {word for scale in forms() for word in (*scale.least, *scale.most)}
    assert said.isdisjoint({*_PLACES, "last"})


def test_things_with_names_of_their_own_are_of_one_kind():
    drawn = [world for world in map(World, map(Random, range(200))) if world.named]
    assert len(drawn) > 20
    for world in drawn:
        things = world.things(6)
        assert len({t.kind for t in [*things, *map(world.missed, things)]}) == 1


def test_values_are_written_so():
    def written(form, x):
        return Scale(0, 1, form, (), (), (), ()).written(x)

    assert written("date", 0) == "2026-01-01"
    assert written("date", 334) == "2026-12-27"
    assert written("day", 29) == "2 Feb"
    assert written("clock", 37) == "09:15"
    assert written("cents", 173) == "$8.65"
    assert written("stars", 45) == "4.5"
    assert written("{} kg", 12) == "12 kg"
