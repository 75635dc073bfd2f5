"""Generated scenes: their labels hold against answers read from the texts, and a seed is all that they depend on."""

import hashlib
import math
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import islice

import pytest
from answers import SKILLS, STYLE, UnreadableError, conditions, read, wanted

from offline_lm.reading.scenes import scenes
from offline_lm.reading.styles import Style
from offline_lm.reading.worlds import World


@cache
def judged(named, n=400):
    """Of the questions on n pages: the question, and whether the texts say the same (None: the page does not say).

    Args:
        named: whether the things have names of their own. Their pages are kept apart: they do not show a thing's kind.
    """
    init, out = World.__init__, []

    def pinned(self, rng, *, simple=False):
        init(self, rng, simple=simple)
        self.named = named and not simple

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "__init__", pinned)
        patch.setattr(Style, "draw", classmethod(lambda cls, rng: STYLE))
        pages = [*islice(scenes(21), n), *([] if named else islice(scenes(22, easy=1.0), n // 8))]
    for scene in pages:
        for asked in scene.questions:
            try:
                right = SKILLS[asked.skill](scene.page, scene.past, asked.goal, named)
                same = [right(*read(act.text, scene.page)) for act in asked.acts] == [act.right for act in asked.acts]
            except UnreadableError:
                same = None
            out.append((asked, same))
    return out


@cache
def drawn(n=300):
    return [*islice(scenes(5), n), *islice(scenes(6, easy=1.0), n // 3)]


# -- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("skill", ["place", "look_up", "count", "form", "menu", "trail"])
def test_the_texts_tell_which_actions_are_right(skill, named):
    same = Counter(same for asked, same in judged(named) if asked.skill == skill)
    assert same[True] >= 10
    assert same[False] == 0
    assert same[None] <= 0.15 * same[True]  # a table without a head does not say which number is which


@pytest.mark.parametrize("skill", ["detail", "done"])
def test_the_texts_of_one_thing_tell_what_to_do(skill):
    same = Counter(same for asked, same in judged(False) if asked.skill == skill)
    assert same[True] >= 20
    assert same.keys() == {True}


def test_the_texts_of_a_list_tell_what_to_pick():
    """Only superlatives err: some are those of a thing that is not on the page (known; at most a fifth)."""
    picks = [(bool(conditions(wanted(a.goal))[3]), same) for a, same in judged(False) if a.skill == "pick"]
    same = Counter(picks)
    assert same[False, True] > 100
    assert same[False, False] == 0
    assert same[True, False] <= 0.2 * same[True, True]
    assert same[False, None] + same[True, None] <= 0.1 * len(picks)


@pytest.mark.parametrize("skill", ["pick", "detail", "done"])
def test_kinds_that_pages_do_not_show_decide_few_questions(skill):
    """Pages of things with own names show no kind, yet it counts (known): a bound on how often it decides."""
    same = Counter(same for asked, same in judged(True) if asked.skill == skill)
    assert same[True] >= 20
    assert same[False] <= 0.3 * same[True]


# -- shape -------------------------------------------------------------------------------------------------------


def test_actions_are_few_and_differ_and_some_are_right():
    every = [q for scene in drawn() for q in scene.questions]
    for q in every:
        texts = [act.text for act in q.acts]
        assert 1 <= len(texts) <= 5
        assert len(set(texts)) == len(texts)
        assert any(act.right for act in q.acts)
        assert all(math.isnan(act.grade) or 0 <= act.grade <= 1 for act in q.acts)
        assert math.isnan(q.met) or q.met in (0.0, 1.0)
    assert {q.skill for q in every} == set(SKILLS)


def test_only_a_lone_answer_is_right_without_a_wrong_one():
    """All things of a list may say the same of a field; then the one answer stands alone."""
    every = [q for scene in drawn() for q in scene.questions]
    all_right = [q for q in every if all(act.right for act in q.acts)]
    assert all(len(q.acts) == 1 and q.skill in ("look_up", "place") for q in all_right)
    assert len(all_right) < 0.02 * len(every)


def test_of_a_list_right_is_what_meets_every_condition():
    for q in (q for scene in drawn() for q in scene.questions if q.skill == "pick"):
        assert all(act.right == (act.grade == 1.0) for act in q.acts)


def test_where_all_is_done_the_first_action_ends_and_the_second_goes_back():
    for q in (q for scene in drawn() for q in scene.questions if q.skill in ("trail", "done")):
        assert [act.right for act in q.acts] == [q.met == 1.0, q.met == 0.0]


def test_pages_hold_what_right_actions_press_by_name():
    for scene in drawn():
        page = scene.page.lower()
        for q in scene.questions:
            for act in q.acts:
                if act.right and (found := re.search(r'name: "([^"]+)"', act.text)):
                    assert found[1].lower() in page


def test_what_a_look_up_answers_stands_on_the_page():
    asked = [(scene, q) for scene in drawn() for q in scene.questions if q.skill == "look_up"]
    assert len(asked) > 50
    for scene, q in asked:
        (right,) = [act.text for act in q.acts if act.right]
        said = re.sub(r'^\{"action": "\w+", "text": "|^\w+(?:\(.| ?\[| )', "", right)
        assert re.sub(r'(?:.\)|\]|"\})$', "", said).lower() in scene.page.lower()


@pytest.mark.parametrize("skill", ["pick", "detail", "menu"])
def test_pages_that_fit_and_pages_that_do_not_are_both_common(skill):
    met = [q.met for scene in drawn() for q in scene.questions if q.skill == skill]
    assert 0.1 < sum(met) / len(met) < 0.9


# -- seeds -------------------------------------------------------------------------------------------------------


def test_scenes_follow_from_the_seed_alone():
    """In another process, whose strings hash otherwise, too."""
    code = "from itertools import islice; from offline_lm.reading.scenes import scenes; import hashlib; " \
           "print(hashlib.sha256(repr(list(islice(scenes('3 7', easy=0.3), 40))).encode()).hexdigest())"  # fmt: skip
    digests = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                       env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    here = hashlib.sha256(repr(list(islice(scenes("3 7", easy=0.3), 40))).encode()).hexdigest()
    assert digests == {here + "\n"}


def test_seeds_differ():
    pages = [scene.page for seed in range(20) for scene in islice(scenes(seed), 3)]
    assert len(set(pages)) == len(pages)
