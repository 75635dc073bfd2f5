"""Which actions of a generated question are right, told anew from the texts of its page and its goal alone.

The texts are read in one style (an accessibility tree whose elements actions name by number); what is right does not
depend on the style.
"""

import json
import operator
import re
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

from offline_lm.reading.scenes import _PLACES, _WANT
from offline_lm.reading.styles import Style
from offline_lm.reading.worlds import _NEXT

STYLE = Style(
    look="axtree", grammar="call", by_name=False, quote='"', click="click", type="fill", say="answer", prefix="",
    case="lower",
)  # fmt: skip
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
VALUE = rf"(\d{{4}}-\d\d-\d\d|\d+ (?:{'|'.join(MONTHS)})|\d\d:\d\d|\$?\d+(?:\.\d+)?(?: (?:EUR|kg|min|seats))?)"
LIMITS = (  # those that include their value first: "more than" stands in "no more than"
    (operator.le, "at most|no more than|up to|a maximum of|by|until|not after"),
    (operator.ge, "at least|no less than|a minimum of|from|not before"),
    (operator.lt, "for less than|cheaper than|less than|fewer than|earlier than|under|below|before"),
    (operator.gt, "for more than|more than|later than|over|above|after"),
)
LEAST = "lowest-priced|least expensive|cheapest|smallest|lowest|fewest|earliest|oldest"
MOST = "highest-priced|most expensive|most recent|dearest|largest|highest|most|latest|newest"
NUMBERS = (  # fields of numbers
    "price cost fare fee date day departure due updated rating score amount length weight stock size votes".split()
)


class UnreadableError(Exception):
    """The page does not say what the question is about."""


def matched(pattern, text):
    found = re.fullmatch(pattern, text)
    assert found is not None, text
    return found


# -- pages -----------------------------------------------------------------------------------------------------


def elements(page):
    """(depth, number, role, name, value, checked) of each line."""
    line = r'( *)(?:\[(\d+)\] (\w+)|StaticText) "([^"]*)"(?: value="([^"]*)")?(?:, checked="(true|false)")?'
    found = [matched(line, text) for text in page.split("\n")]
    return [(len(m[1]) // 2, m[2], m[3], m[4], m[5], m[6]) for m in found]


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
    """What is said of a field; one that the page or the goal (None) does not name is the only number."""
    found = [value for name, value in facts if name == field]
    if not found and (field in NUMBERS or field is None):
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


class Conditions(NamedTuple):
    """What a goal asks of a thing; a field of None is that of the only number.

    Attributes:
        words, without: words that must stand there, and that must not.
        told: words that must stand there and are said to be the value of a field, so no kind and no name.
        limits: of a number, by field: (field, compare, value); compare(number there, value) holds.
        exact: (field, what is said of it).
        best: superlatives, (field, min or max), over the things that meet all else.
    """

    words: list[str]
    told: list[str]
    without: list[str]
    limits: list[tuple[str | None, Callable[[float, float], bool], str]]
    exact: list[tuple[str, str]]
    best: list[tuple[str | None, Callable[[list[float]], float]]]


def conditions(phrase, labels=()):
    """`labels`: fields of the page; what follows one of them is its value."""
    asked = Conditions([], [], [], [], [], [])

    def take(pattern, keep):
        nonlocal phrase
        phrase = re.sub(pattern, lambda m: keep(m) or " , ", phrase)

    for compare, said in LIMITS:
        pattern = rf"(?:\bwith (\w+) )?\b(?:{said}) {VALUE}"
        take(pattern, lambda m, compare=compare: asked.limits.append((m[1], compare, m[2])))
    take(rf"\bwith (\w+) {VALUE}", lambda m: asked.exact.append((m[1], m[2])))
    for best, names in ((min, LEAST), (max, MOST)):
        take(rf"\bwith the (?:{names}) (\w+)", lambda m, best=best: asked.best.append((m[1], best)))
        take(rf"\b(?:{names})(?= |,|$)", lambda m, best=best: asked.best.append((None, best)))
    take(r"\b(?:that is not|but not|not|other than|without) (\w+)", lambda m: asked.without.append(m[1]))
    for said in (r"whose \w+ is", r"(?:with|of) \w+", r"\w+:", *map(re.escape, labels), "that is", "in"):
        take(rf"\b{said} (\w+)", lambda m: asked.told.append(m[1]))
    take(r"\((\w+)\)", lambda m: asked.told.append(m[1]))
    asked.words.extend(word for word in re.findall(r"\w+", phrase) if word not in "a the one and called".split())
    return asked


def but_kind(asked, seen):
    """Things with own names are all of one kind, which pages do not show: of the words of a goal one unseen goes.

    A goal of nothing but words that are not there is the name of another thing.
    """
    unseen = [word for word in asked.words if word not in seen]
    if asked.words == unseen and not any(asked[1:]):
        return asked
    return asked._replace(words=[word for word in asked.words if word not in unseen[:1]])


def meets(title, facts, asked):
    """All but superlatives."""
    have = tokens(title, facts)
    return (
        all(word in have for word in asked.words + asked.told)
        and not any(word in have for word in asked.without)
        and all(compare(number(said_of(facts, field)), number(x)) for field, compare, x in asked.limits)
        and all(said_of(facts, field) == x for field, x in asked.exact)
    )


def fitting(listed, asked):
    """Titles of the things that meet every condition."""
    fits = [(title, facts) for title, facts in listed if meets(title, facts, asked)]
    for field, best in asked.best:
        values = [number(said_of(facts, field)) for _, facts in fits]
        fits = [t for t, x in zip(fits, values, strict=True) if x == best(values)]
    return [title for title, _ in fits]


def asked_of(page, goal, named):
    """The conditions of a goal on a list."""
    asked = conditions(wanted(goal))
    return but_kind(asked, {word for t in things(page) for word in tokens(*t)}) if named else asked


# -- the right actions -------------------------------------------------------------------------------------------


def pick(page, past, goal, named):
    ways_on = [name for depth, _, role, name, *_ in elements(page) if role == "link" and not depth]
    on = [name for name in ways_on if name in _NEXT] or ways_on  # of these only the way back is ever pressed
    names = fitting(things(page), asked_of(page, goal, named)) or on
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
            if name.startswith("Selected "):
                options.add(value)
            if value in options:
                chosen.add(value)
            elif value:
                facts.append((field, value))
    titles = " ".join(name for depth, _, role, name, *_ in lines if role == "heading")
    asked = conditions(wanted(goal), labels)
    to_choose = options.intersection(asked.words + asked.told)
    asked = asked._replace(
        words=[word for word in asked.words if word not in options],
        told=[word for word in asked.told if word not in options],
    )
    if named:
        asked = but_kind(asked, tokens(titles, facts))
    fits = meets(titles, facts, asked)
    ready = fits and to_choose <= chosen
    submit = [name for depth, _, role, name, *_ in lines if role == "button" and not depth]

    def right(verb, name, value):
        if name in options:
            return fits and name in to_choose
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
            filled[last] = part.split('"')[1]
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
    about, held = set(re.findall(r"\w+", wanted(goal))), {}
    for depth, _, role, name, *_ in elements(page):
        if role == "link" and re.fullmatch("[a-z]+", name):  # a section; what is between is no lone small word
            held[name] = {name}
        elif role is None and depth:
            held[list(held)[-1]].add(name)
    ways = [section for section, items in held.items() if about & items]
    return lambda verb, name, value: name in ways if not value else not ways and value in about


def trail(page, past, goal, named):
    came_for = any(json.dumps(wanted(goal)) in did for did in past)
    (submit,) = [name for *_, role, name, _, _ in elements(page) if role == "button"]
    return lambda verb, name, value: came_for == (name == submit)


SKILLS = {
    "pick": pick,
    "place": place,
    "look_up": look_up,
    "count": count,
    "detail": detail,
    "done": detail,  # a page without buttons
    "form": form,
    "menu": menu,
    "trail": trail,
}


def read(act, page):
    """(verb, name of the element, value) of an action; it names exactly one element."""
    verb, at, value = matched(r'(\w+)\((?:"([^"]*)")?(?:, "([^"]*)")?\)', act).groups()
    if verb == "answer":
        return verb, "", at or ""
    lines = [line for line in elements(page) if line[2] not in ("heading", None)]
    (name,) = [line[3] for line in lines if line[1] == at] or [line[3] for line in lines if line[3] == at]
    return verb, name, value
