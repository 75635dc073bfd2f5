"""Which actions of a generated question are right, derived anew from the texts of its page and goal.

The texts are read in one style only (an accessibility tree whose elements actions name by number); what is right does
not depend on the style.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date
from functools import cache
from itertools import islice

import pytest

from offline_lm.reading.scenes import _PLACES, _WANT, scenes
from offline_lm.reading.styles import Style
from offline_lm.reading.worlds import _NEXT, World

STYLE = Style(
    look="axtree", grammar="call", by_name=False, quote='"', click="click", type="fill", say="answer", prefix="",
    case="lower",
)  # fmt: skip
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
VALUE = rf"(\d{{4}}-\d\d-\d\d|\d+ (?:{'|'.join(MONTHS)})|\d\d:\d\d|\$?\d+(?:\.\d+)?(?: (?:EUR|kg|min|seats))?)"
BELOW = "for less than|cheaper than|less than|fewer than|earlier than|under|below|before"
ABOVE = "for more than|more than|later than|over|above|after"
LEAST = "lowest-priced|least expensive|cheapest|smallest|lowest|fewest|earliest|first|oldest"
MOST = "highest-priced|most expensive|most recent|dearest|largest|highest|most|latest|newest"
NUMBERS = (  # fields of numbers; "": a comparison that does not say of what
    *"price cost fare fee date day departure due updated rating score amount length weight stock size votes".split(),
    "",
)


class UnreadableError(Exception):
    """The page does not say what the question is about."""


# -- pages -----------------------------------------------------------------------------------------------------


def elements(page):
    """(depth, number, role, name, value, checked) of each line."""
    line = r'( *)(?:\[(\d+)\] (\w+)|StaticText) "([^"]*)"(?: value="([^"]*)")?(?:, checked="(true|false)")?'
    found = [re.fullmatch(line, text).groups() for text in page.split("\n")]
    return [(len(indent) // 2, ident, role, *rest) for indent, ident, role, *rest in found]


def things(page):
    """Title, and what is said as (field or "", value), of each thing on a list."""
    out, header = [], []
    for depth, _, role, name, _, _ in elements(page):
        if role == "cell" and not depth:
            header.append(name)
        elif role == "link" and depth:
            out.append((name, []))
        elif role == "cell":
            facts = out[-1][1]
            facts.append((header[1 + len(facts)] if header else "", name))
        elif depth == 1:
            out[-1][1].append(tuple(name.split(": ")) if ": " in name else ("", name))
        elif depth == 2:
            out[-1][1].extend(tuple(part.split(" ", 1)) for part in name.split(", "))
    return out


def tokens(title, facts):
    return {*title.split(), *(word for _, value in facts for word in value.split())}


def number(text):
    if "-" in text:
        return date.fromisoformat(text).toordinal()
    if text[-3:] in MONTHS:
        return MONTHS.index(text[-3:]) * 100 + int(text[:-4])
    if ":" in text:
        return int(text[:2]) * 60 + int(text[3:])
    return float(text.removeprefix("$").split()[0])


def said_of(facts, field):
    """What is said of a field; one that the page does not name can be told only where it is the only number."""
    found = [value for name, value in facts if name == field]
    if not found and field in NUMBERS:
        found = [value for name, value in facts if re.fullmatch(VALUE, value) and not (name and field)]
    if len(found) != 1:
        raise UnreadableError
    return found[0]


# -- goals -----------------------------------------------------------------------------------------------------


def wanted(goal, templates=_WANT):
    """What a goal says inside its wording."""
    for template in sorted(templates, key=len, reverse=True):
        before, after = template.split("{}")
        if goal.startswith(before) and goal.endswith(after):
            return goal[len(before) : len(goal) - len(after)]
    raise AssertionError(goal)


def conditions(phrase):
    """Words that must stand there, words that must not, tests of numbers by field ("": the only one), superlatives."""
    words, without, tests, best = [], [], [], []

    def take(pattern, keep):
        nonlocal phrase
        phrase = re.sub(pattern, lambda m: keep(m) or " , ", phrase)

    field = r"(?:\bwith (\w+) )?"
    take(rf"{field}\b(?:{BELOW}) {VALUE}", lambda m: tests.append((m[1], lambda x, v=m[2]: number(x) < number(v))))
    take(rf"{field}\b(?:{ABOVE}) {VALUE}", lambda m: tests.append((m[1], lambda x, v=m[2]: number(x) > number(v))))
    take(rf"\bwith (\w+) {VALUE}", lambda m: tests.append((m[1], lambda x, v=m[2]: x == v)))
    for pick, names in ((min, LEAST), (max, MOST)):
        take(rf"\bwith the (?:{names}) (\w+)", lambda m, pick=pick: best.append((m[1], pick)))
        take(rf"\b(?:{names})(?= |,|$)", lambda m, pick=pick: best.append(("", pick)))
    take(r"\bcalled (.*)", lambda m: words.extend(m[1].split()))
    take(r"\b(?:that is not|but not|not|other than|without) (\w+)", lambda m: without.append(m[1]))
    take(r"\bwhose \w+ is (\w+)|\b(?:with|of) \w+ (\w+)|\b\w+: (\w+)", lambda m: words.append(m[1] or m[2] or m[3]))
    words += [word for word in re.findall(r"\w+", phrase) if word not in "a the one and in that is".split()]
    return words, without, tests, best


def but_kind(words, seen, rest):
    """Pages of things with own names do not show their kind: of a goal with other conditions one unseen word goes."""
    unseen = [word for word in words if word not in seen]
    return [word for word in words if word not in unseen[:1]] if words != unseen or any(rest) else words


def meets(title, facts, wish):
    words, without, tests, _ = wish
    have = tokens(title, facts)
    return (
        all(word in have for word in words)
        and not any(word in have for word in without)
        and all(test(said_of(facts, field or "")) for field, test in tests)
    )


# -- the right actions -------------------------------------------------------------------------------------------


def pick(page, past, goal, named):
    listed = things(page)
    words, *rest = conditions(wanted(goal))
    if named:
        seen = set().union(*(tokens(*t) for t in listed))
        words = but_kind(words, seen, rest)
    fits = [t for t in listed if meets(*t, (words, *rest))]
    for field, best in rest[-1]:
        values = [number(said_of(facts, field)) for _, facts in fits]
        fits = [t for t, x in zip(fits, values, strict=True) if x == best(values)]
    ways_on = [name for depth, _, role, name, *_ in elements(page) if role == "link" and not depth]
    on = [name for name in ways_on if name in _NEXT] or ways_on  # no other link at this depth is ever pressed
    names = [title for title, _ in fits] or on
    return lambda verb, name, value: name in names


def place(page, past, goal, named):
    titles = [title for title, _ in things(page)]
    said = wanted(goal)
    if found := re.fullmatch(r"the one (right after|just above) (.*)", said):
        i = titles.index(found[2]) + (1 if found[1] == "right after" else -1)
    elif found := re.fullmatch(r"number (\d+) of the list", said):
        i = int(found[1]) - 1
    elif said in ("the last one", "the one before the last"):
        i = len(titles) - (1 if said == "the last one" else 2)
    else:
        i = _PLACES.index(said.split()[1])
    return lambda verb, name, value: name == titles[i]


def look_up(page, past, goal, named):
    listed = things(page)
    if found := re.fullmatch(r"(?:Which one has|Name the one with|What has) (\w+) (.*)\?", goal):
        (answer,) = [title for title, facts in listed if said_of(facts, found[1]) == found[2]]
        return lambda verb, name, value: value == answer
    ways = (
        r"What is the (?P<f>\w+) of (?P<x>.*)\?|Tell me the (?P<f>\w+) of (?P<x>.*)\.|Which (?P<f>\w+) has (?P<x>.*)\?|"
        r"Report the (?P<f>\w+) for (?P<x>.*)|(?P<x>.*): what (?P<f>\w+)\?|Give the (?P<f>\w+) of (?P<x>.*)\.|"
        r"Look up the (?P<f>\w+) of (?P<x>.*)|I need to know the (?P<f>\w+) of (?P<x>.*)\."
    )
    (found,) = filter(None, (re.fullmatch(way, goal) for way in ways.split("|")))
    titles = [title for title, _ in listed]
    x = found["x"]
    i = titles.index(x) if x in titles else _PLACES.index(x.split()[1])
    answer = said_of(listed[i][1], found["f"])
    return lambda verb, name, value: value == answer


def count(page, past, goal, named):
    listed = things(page)
    found = re.search(r"(\w+) ones", goal)
    n = sum(found[1] in tokens(*t) for t in listed) if found else len(listed)
    return lambda verb, name, value: value == str(n)


def detail(page, past, goal, named):
    lines = elements(page)
    options = {name for depth, _, role, name, *_ in lines if role in ("radio", "button") and depth}
    chosen = {name for *_, role, name, _, on in lines if role == "radio" and on == "true"}
    facts, labels = [], set()
    for depth, _, role, name, *_ in lines:
        if role is None and not depth:
            field, _, value = name.removeprefix("Selected ").partition(": ")
            labels.add(field)
            if value in options:
                chosen.add(value)
            elif value:
                facts.append((field, value))
    titles = " ".join(name for depth, _, role, name, *_ in lines if role == "heading")
    words, *rest = conditions(wanted(goal))
    asked = {word for word in words if word in options}
    words = [word for word in words if word not in options | labels]
    if named:
        words = but_kind(words, tokens(titles, facts), rest)
    fits = meets(titles, facts, (words, *rest))
    ready = fits and asked <= chosen

    submit = [name for depth, _, role, name, *_ in lines if role == "button" and not depth]

    def right(verb, name, value):
        if name in options:
            return fits and name in asked
        if name in submit or verb == "answer":
            return ready
        return not fits if submit else not ready  # back

    return right


def form(page, past, goal, named):
    lines = elements(page)
    held = {name: value or "" for *_, role, name, value, _ in lines if role in ("textbox", "combobox")}
    ticked = {name: on == "true" for *_, role, name, _, on in lines if role == "checkbox"}
    verbs = (
        "Fill in {} and submit", "Enter {}", "Send the form with {}", "Set {}.", "Submit {}", "Complete: {}",
    )  # fmt: skip
    filled, boxed = {}, {}
    for part in wanted(goal, verbs).split(", "):
        first, _, rest = part.partition(" ")
        last = part.rpartition(" ")[2]
        if first in ("tick", "untick"):
            boxed[rest] = first == "tick"
        elif rest in ("on", "off"):
            boxed[first] = rest == "on"
        elif part.startswith('"'):
            filled[last] = re.match('"(.*)"', part)[1]
        elif last in held and part.endswith(f" for {last}"):
            filled[last] = part.removesuffix(f" for {last}")
        else:
            filled[first.removesuffix(":")] = rest
    assert filled.keys() == held.keys()
    assert boxed.keys() == ticked.keys()
    (submit, _) = [name for *_, role, name, _, _ in lines if role == "button"]

    def right(verb, name, value):
        if name == submit:
            return filled == held and boxed == ticked
        if name in held:
            return filled[name] == value != held[name]
        return name in ticked and boxed[name] != ticked[name]

    return right


def menu(page, past, goal, named):
    about = set(re.findall(r"\w+", wanted(goal)))
    links = [set(name.split()) for *_, role, name, _, _ in elements(page) if role == "link"]
    known = any(about & link for link in links)
    return lambda verb, name, value: bool(about & set(name.split())) if not value else not known and value in about


def trail(page, past, goal, named):
    came_for = any(json.dumps(wanted(goal)) in did for did in past)
    (submit,) = [name for *_, role, name, _, _ in elements(page) if role == "button"]
    return lambda verb, name, value: came_for == (name == submit)


done = detail  # a page without buttons
SKILLS = dict(pick=pick, place=place, look_up=look_up, count=count, detail=detail, done=done, form=form, menu=menu,
              trail=trail)  # fmt: skip


def read(act, page):
    """(verb, name of the element, value) of an action; it names exactly one element."""
    verb, *rest = re.fullmatch(r'(\w+)\("([^"]*)"(?:, "([^"]*)")?\)|answer\(\)', act).groups()
    if verb is None:
        return "answer", "", ""
    if verb == "answer":
        return verb, "", rest[0]
    at, value = rest
    lines = [line for line in elements(page) if line[2] not in ("heading", None)]
    (name,) = [line[3] for line in lines if line[1] == at] or [line[3] for line in lines if line[3] == at]
    return verb, name, value


@cache
def judged(named, n=150):
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
        pages = [*islice(scenes(21), n), *([] if named else islice(scenes(22, easy=1.0), n // 4))]
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
    """A superlative may be that of a thing that is not on the page (known, at most a fifth of them); nothing else errs."""
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


def test_the_check_sees_swapped_labels():
    """Each skill's reading tells a right action from a wrong one: turned labels would not pass."""
    for skill in SKILLS:
        asked = next(a for a, same in judged(False) if a.skill == skill and same)
        assert {act.right for act in asked.acts} == {False, True}


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


def test_a_page_fits_a_goal_where_going_on_is_wrong():
    """`met` and the labels say the same of lists; of forms, trails and pages that say it is done, `met` is to finish."""
    for scene in drawn():
        for q in scene.questions:
            if q.skill == "pick":
                full = [act for act in q.acts if act.grade == 1.0]
                assert {act.right for act in full} == {True}
                assert {act.right for act in q.acts if act.grade < 1.0} <= {False}
            if q.skill in ("trail", "done"):
                assert q.met == q.acts[0].right != q.acts[1].right


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
        said = re.sub(r'^\{"action": "\w+", "text": "|^\w+(?:\(.|\[| )', "", right)
        assert re.sub(r'(?:.\)|\]|"\})$', "", said).lower() in scene.page.lower()


@pytest.mark.parametrize("skill", ["pick", "detail", "menu"])
def test_neither_answer_is_rare(skill):
    """Whether the page fits is an even enough question, and no action of its kind is always right."""
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
