"""Which actions of a generated question are right, told anew from the texts of its page and its goal alone.

The texts are read in one style (an accessibility tree whose elements actions name by number); what is right does not
depend on the style.
"""

import json
import re
from datetime import date

from offline_lm.reading.scenes import _PLACES, _WANT
from offline_lm.reading.styles import Style
from offline_lm.reading.worlds import _NEXT

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
    take(r"\b(?:that is not|but not|not|other than|without) (\w+)", lambda m: without.append(m[1]))
    take(r"\bwhose \w+ is (\w+)|\b(?:with|of) \w+ (\w+)|\b\w+: (\w+)", lambda m: words.append(m[1] or m[2] or m[3]))
    words += [word for word in re.findall(r"\w+", phrase) if word not in "a the one and in that is called".split()]
    return words, without, tests, best


def but_kind(words, seen, rest):
    """Pages of things with own names do not show their kind: of a goal with other conditions one unseen word goes."""
    unseen = [word for word in words if word not in seen]
    return [word for word in words if word not in unseen[:1]] if words != unseen or any(rest) else words


def meets(title, facts, words, without, tests):
    have = tokens(title, facts)
    return (
        all(word in have for word in words)
        and not any(word in have for word in without)
        and all(test(said_of(facts, field or "")) for field, test in tests)
    )


# -- the right actions -------------------------------------------------------------------------------------------


def pick(page, past, goal, named):
    listed = things(page)
    words, without, tests, bests = conditions(wanted(goal))
    if named:
        seen = {word for title, facts in listed for word in tokens(title, facts)}
        words = but_kind(words, seen, (without, tests, bests))
    fits = [(title, facts) for title, facts in listed if meets(title, facts, words, without, tests)]
    for field, best in bests:
        values = [number(said_of(facts, field)) for _, facts in fits]
        fits = [t for t, x in zip(fits, values, strict=True) if x == best(values)]
    ways_on = [name for depth, _, role, name, *_ in elements(page) if role == "link" and not depth]
    on = [name for name in ways_on if name in _NEXT] or ways_on  # of these only the way back is ever pressed
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
    words, without, tests, _ = conditions(wanted(goal))
    asked = {word for word in words if word in options}
    words = [word for word in words if word not in options | labels]
    if named:
        words = but_kind(words, tokens(titles, facts), (without, tests))
    fits = meets(titles, facts, words, without, tests)
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
    about = set(re.findall(r"\w+", wanted(goal)))
    links = [set(name.split()) for *_, role, name, _, _ in elements(page) if role == "link"]
    known = any(about & link for link in links)
    return lambda verb, name, value: bool(about & set(name.split())) if not value else not known and value in about


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
