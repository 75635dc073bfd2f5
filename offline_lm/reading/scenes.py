"""Pages with questions about them: each a goal, whether it can be met here, and actions of which some are right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from offline_lm.reading.styles import BOX, BUTTON, CELL, FIELD, HEADING, LINK, MENU, RADIO, TEXT, Element
from offline_lm.reading.words import word, words
from offline_lm.reading.worlds import Thing, Wish, World

_WANT = (
    "Find {};Open {};I want {};Choose {};Book {};Select {};Look for {};Go to {};Show me {};We are looking for {}.;"
    "Could you get {}?;Purchase {}.;Pick {};Get {} for me;{};Reserve {}.;Add {};Please choose {}.;"
    "Your task: select {}.;Find and open {};Click on {};Buy {}.;Order {};I need {}."
).split(";")
_ASK = (
    "What is the {f} of {x}?;Tell me the {f} of {x}.;Which {f} has {x}?;Report the {f} for {x};{x}: what {f}?;"
    "Give the {f} of {x}.;Look up the {f} of {x};I need to know the {f} of {x}."
).split(";")
_COUNT = "How many {x} are there?;Count {x}.;Number of {x} on this page?;Tell me how many {x} are listed.".split(";")
_FILLER = (
    "Welcome back.;Sign in to see more.;All rights reserved.;Help and contact;Privacy settings;Terms of use;Sponsored;"
    "You have no new messages.;Sorted by relevance;Share this page;Last updated today;Language: English;"
    "Skip to content;Cookies help us improve.;Newsletter;Accessibility;Feedback;Loading complete.;Menu;Account"
).split(";")
_PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass(frozen=True)
class Act:
    """An action: its text, whether it is right, and what share of the goal's conditions what it acts on meets."""

    text: str
    right: bool
    grade: float = math.nan


@dataclass(frozen=True)
class Question:
    """A goal on a page; `met`: whether what is here fits it (NaN: not asked)."""

    skill: str
    goal: str
    met: float
    acts: list[Act]


@dataclass(frozen=True)
class Scene:
    """A page, what was done before it, and what is asked of it."""

    page: str
    past: list[str]
    questions: list[Question]
    url: str | None = None


def scenes(seed: int | str, *, easy: float = 0.0) -> Iterator[Scene]:
    """Endless; a share `easy` of the pages are short ones on which words alone are to be matched."""
    rng = Random(seed)
    while True:
        if simple := rng.random() < easy:
            kind = rng.choices((listing, detail, form, menu, trail), (4, 2, 1, 2, 1))[0]
        else:
            kind = rng.choices((listing, detail, form, menu, trail), (9, 5, 3, 2, 2))[0]
        scene = kind(World(rng, simple=simple), rng, float(simple))
        if rng.random() < 0.2:
            scene = replace(scene, url=f"https://{word(rng)}.{rng.choice(('com', 'org', 'net'))}/{word(rng)}")
        yield scene


# -- lists -----------------------------------------------------------------------------------------------------------


def listing(world: World, rng: Random, easy: float) -> Scene:
    """Several things, one under the other or in a table: which is meant, what is said of it, how many are there?"""
    most = 3 if rng.random() < easy else rng.choice((3, 4, 4, 5, 6, 8, 10))
    things = world.things(rng.randint(2, most))
    elements, links = _listed(world, things, rng)
    ways_on = [Element(LINK, world.style.cased(world.back))]
    if further := rng.random() < 0.5:
        ways_on.append(Element(LINK, world.style.cased(world.next)))
    _put(elements, ways_on, rng)
    page = world.style.write(_with_filler(elements, rng, easy), rng)
    on = world.style.press(ways_on[-1])
    off = [world.style.press(e) for e in ways_on[: 1 if further else 0]]
    press = [world.style.press(e) for e in links]
    out = []
    for _ in range(4):
        asked = _pick if easy else rng.choices((_pick, _place, _look_up, _count), (10, 2, 5, 1))[0]
        out.append(asked(world, things, press, on, off, rng))
    return Scene(page, _idle_past(world, rng), out)


def _listed(world: World, things: Sequence[Thing], rng: Random) -> tuple[list[Element], list[Element]]:
    style = world.style
    fields = [*world.words, *world.scales]
    links: list[Element] = []
    elements = [
        Element(HEADING, style.cased(rng.choice((word(rng), "Results", f"Results for {world.kinds[0]}", "List"))))
    ]
    layout = rng.choice(("title", "title", "lines", "row"))
    if layout == "row" and (world.named or len(world.scales) > 1 or rng.random() < 0.7):
        elements += [Element(CELL, style.cased(name)) for name in ("name", *fields)]
    for thing in things:
        values = {**thing.words, **{f: world.scales[f].written(x) for f, x in thing.numbers.items()}}
        link = Element(LINK, style.cased(thing.title), depth=1)
        links.append(link)
        if layout == "title":
            elements.append(link)
            shown = [f for f in fields if f in world.scales or thing.name]
            text = [values[f] if len(world.scales) == 1 and f in world.scales else f"{f}: {values[f]}" for f in shown]
            if text and style.look == "plain" and rng.random() < 0.3:
                elements.append(Element(TEXT, style.cased(" | ".join(text)), depth=1))
            else:
                elements += [Element(TEXT, style.cased(t), depth=1) for t in text]
        elif layout == "lines":
            elements.append(link)
            elements.append(Element(TEXT, style.cased(", ".join(f"{f} {values[f]}" for f in fields)), depth=2))
        else:
            elements.append(link)
            elements += [Element(CELL, style.cased(values[f]), depth=1) for f in fields]
    return elements, links


def _pick(world: World, things: Sequence[Thing], press: list[str], on: str, off: list[str], rng: Random) -> Question:
    """Choose what a description fits; if nothing does, go on."""
    meant = rng.choice(things)
    if rng.random() < 0.35:
        meant = world.missed(meant)
    wishes = world.wishes(meant, things)
    phrase = world.described(meant.kind, wishes)
    if meant.name and not any(w.before or w.behind for w in wishes):
        phrase = meant.name
    else:
        wishes = [*wishes, Wish(lambda t: t.kind == meant.kind)]
    grades = [sum(w.holds(t) for w in wishes) / len(wishes) for t in things]
    here = max(grades) == 1.0
    acts = [Act(text, grade == 1.0, grade) for text, grade in zip(press, grades, strict=True)]
    acts += [Act(on, not here, 0.0 if here else 1.0), *(Act(text, False, 0.0) for text in off)]
    return Question("pick", rng.choice(_WANT).format(phrase), float(here), _some(acts, rng))


def _place(world: World, things: Sequence[Thing], press: list[str], on: str, off: list[str], rng: Random) -> Question:
    """Choose by place in the list."""
    i, n = rng.randrange(len(things)), len(things)
    said = [f"the {_PLACES[i]} {rng.choice(('item', 'one', 'entry', 'result', 'row'))}", f"number {i + 1} of the list"]
    if i == n - 1:
        said.append("the last one")
    if i == n - 2:
        said.append("the one before the last")
    if i:
        said.append(f"the one right after {things[i - 1].title}")
    if i + 1 < n:
        said.append(f"the one just above {things[i + 1].title}")
    acts = [Act(text, j == i) for j, text in enumerate(press)]
    return Question("place", rng.choice(_WANT).format(rng.choice(said)), math.nan, _some(acts, rng))


def _look_up(world: World, things: Sequence[Thing], press: list[str], on: str, off: list[str], rng: Random) -> Question:
    """Answer what a field of a thing says, or which thing says so."""
    tell = world.style.tell
    i = rng.randrange(len(things))
    fields = list(world.scales)
    if things[i].name:
        fields += world.words
    name = rng.choice(fields)
    values = [world.scales[name].written(t.numbers[name]) if name in world.scales else t.words[name] for t in things]
    if rng.random() < 0.25 and values.count(values[i]) == 1:  # the other way round
        goal = f"{rng.choice(('Which one has', 'Name the one with', 'What has'))} {name} {values[i]}?"
        acts = [Act(tell(t.title), j == i) for j, t in enumerate(things)]
        return Question("look_up", goal, math.nan, _some(acts, rng))
    whom = (
        things[i].title if rng.random() < 0.7 else f"the {_PLACES[i]} {rng.choice(('row', 'item', 'result', 'entry'))}"
    )
    goal = rng.choice(_ASK).format(f=name, x=whom)
    acts = [Act(tell(v), v == values[i]) for v in dict.fromkeys(values)]
    if len(acts) < 3:
        scale = world.scales.get(name)
        more = [scale.written(scale.draw(rng)) for _ in range(3)] if scale else world.words[name]
        acts += [Act(tell(v), False) for v in more if v not in values]
    return Question("look_up", goal, math.nan, _some(acts, rng))


def _count(world: World, things: Sequence[Thing], press: list[str], on: str, off: list[str], rng: Random) -> Question:
    name = rng.choice(list(world.words))
    value = rng.choice(world.words[name])
    if things[0].name or rng.random() < 0.3:
        said, n = "entries in the list", len(things)
    else:
        said, n = f"{value} ones", sum(t.words[name] == value for t in things)
    wrong = rng.sample([x for x in range(max(0, n - 3), n + 4) if x != n], 3)
    acts = [Act(world.style.tell(str(x)), x == n) for x in (n, *wrong)]
    return Question("count", rng.choice(_COUNT).format(x=said), math.nan, _some(acts, rng))


# -- one thing, forms, menus, trails -----------------------------------------------------------------------------------


def detail(world: World, rng: Random, easy: float) -> Scene:
    """One thing with choices to make: is it what is wanted, what is still to choose, is it time to confirm?"""
    style, thing = world.style, world.thing()
    options = (
        {} if rng.random() < 0.25 else {n: words(rng, rng.choice((2, 3, 4))) for n in words(rng, rng.choice((1, 1, 2)))}
    )
    if options and rng.random() < 0.5:
        options = dict(zip(rng.sample(("size", "colour", "seat", "pack", "delivery", "variant"), len(options)),
                           options.values(), strict=True))  # fmt: skip
    chosen = {name: rng.choice([*values, *values, None]) for name, values in options.items()}
    done = rng.random() < 0.2  # after the last click: a page that says what was done
    elements = [Element(HEADING, style.cased(thing.title))]
    elements += [
        Element(TEXT, style.cased(f"{f}: {v}")) for f, v in thing.words.items() if thing.name or rng.random() < 0.3
    ]
    elements += [Element(TEXT, style.cased(f"{f}: {world.scales[f].written(x)}")) for f, x in thing.numbers.items()]
    if done:
        elements.insert(
            0, Element(HEADING, rng.choice(("Thank you", "Confirmed", "Done", "Success", "Your summary", "Booked")))
        )
    buttons: dict[tuple[str, str], Element] = {}
    as_radio = rng.random() < 0.5
    for name, values in options.items():
        if done or not as_radio:
            said = rng.choice((f"{name}: {chosen[name] or 'none'}", f"Selected {name}: {chosen[name] or '-'}"))
            elements.append(Element(TEXT, said))
        if not done:
            role = RADIO if as_radio else BUTTON
            for value in values:
                buttons[name, value] = Element(role, value, on=as_radio and value == chosen[name], depth=1)
            elements += [*([Element(TEXT, name)] if as_radio else []), *(buttons[name, v] for v in values)]
    submit, back = Element(BUTTON, style.cased(world.submit)), Element(LINK, style.cased(world.back))
    elements += [back] if done else rng.sample([submit, back], 2)
    page = style.write(_with_filler(elements, rng, easy), rng)
    out = []
    for n in range(4):
        meant = thing if n % 2 == 0 else world.missed(thing) if rng.random() < 0.7 else world.thing()
        wishes = [*world.wishes(meant, []), Wish(lambda t, kind=meant.kind: t.kind == kind)]
        if meant.name and not any(w.before or w.behind for w in wishes):
            phrase, wishes = meant.name, wishes[:1]
        else:
            phrase = world.described(meant.kind, wishes)
        wanted = {
            o: chosen[o] if chosen[o] and rng.random() < 0.5 else rng.choice(values) for o, values in options.items()
        }
        wanted = {o: v for o, v in wanted.items() if rng.random() < 0.85}
        said = [rng.choice((f"{o} {v}", f"{o}: {v}", f"in {v}", f"with {o} {v}")) for o, v in wanted.items()]
        goal = rng.choice(_WANT).format(rng.choice((", ", " ", " and ")).join([phrase, *said]))
        held = [w.holds(thing) for w in wishes]
        fits, set_right = all(held), [chosen[o] == v for o, v in wanted.items()]
        grade = (sum(held) + sum(set_right)) / (len(held) + len(set_right))
        ready = fits and all(set_right)
        if done:
            acts = [Act(style.tell(""), ready, grade), Act(style.press(back), not ready, 0.0 if ready else 1.0)]
            out.append(Question("done", goal, float(ready), acts))
            continue
        acts = [Act(style.press(submit), ready, grade), Act(style.press(back), not fits, 0.0 if fits else 1.0)]
        for (o, v), button in buttons.items():
            if v != chosen[o]:
                right = fits and wanted.get(o) == v
                acts.append(Act(style.press(button), right, 1.0 if right else sum(held) / len(held) / 2))
        out.append(Question("detail", goal, float(fits), _some(acts, rng, most=5, keep=1)))
    return Scene(page, _idle_past(world, rng), out)


def form(world: World, rng: Random, easy: float) -> Scene:
    """Fields to fill with what a goal says: which is still empty or wrong, with what, and is it time to submit?"""
    style = world.style
    n = rng.choice((1, 2)) if rng.random() < easy else rng.choice((2, 3, 4))
    names = words(rng, n) if rng.random() < 0.5 else rng.sample(
        ("name", "email", "city", "date", "title", "subject", "phone", "address", "message", "from", "to", "comment"), n
    )  # fmt: skip
    held = {name: "" if rng.random() < 0.3 else " ".join(words(rng, rng.choice((1, 1, 2)))) for name in names}
    boxes = {name: rng.random() < 0.5 for name in words(rng, rng.choice((0, 0, 1, 2)))}
    fields = {name: Element(rng.choice((FIELD, FIELD, MENU)), style.cased(name), value) for name, value in held.items()}
    ticks = {name: Element(BOX, style.cased(name), on=on) for name, on in boxes.items()}
    submit, back = Element(BUTTON, style.cased(world.submit)), Element(BUTTON, style.cased(world.back))
    page = style.write(_with_filler([*fields.values(), *ticks.values(), submit, back], rng, easy), rng)
    out = []
    for _ in range(4):
        kept = 1.0 if rng.random() < 0.4 else 0.6  # at times all is as it should be, where no field is empty
        wanted = {
            f: v if v and rng.random() < kept else " ".join(words(rng, rng.choice((1, 1, 2)))) for f, v in held.items()
        }
        set_to = {b: on if rng.random() < kept else not on for b, on in boxes.items()}
        said = [rng.choice((f"{f}: {v}", f"{f} {v}", f'"{v}" as {f}', f"{v} for {f}")) for f, v in wanted.items()]
        said += [
            rng.choice((f"{'tick' if on else 'untick'} {b}", f"{b} {'on' if on else 'off'}"))
            for b, on in set_to.items()
        ]
        rng.shuffle(said)
        verb = rng.choice(
            ("Fill in {} and submit", "Enter {}", "Send the form with {}", "Set {}.", "Submit {}", "Complete: {}")
        )
        right = {f: held[f] == v for f, v in wanted.items()}
        boxed = {b: boxes[b] == on for b, on in set_to.items()}
        ready = all(right.values()) and all(boxed.values())
        grade = (sum(right.values()) + sum(boxed.values())) / (len(right) + len(boxed))
        acts = [Act(style.press(submit), ready, grade), Act(style.press(back), False, 0.0)]
        acts += [Act(style.press(ticks[b]), not boxed[b], float(not boxed[b])) for b in boxes]
        for f, v in wanted.items():
            acts.append(Act(style.enter(fields[f], v), not right[f], 1.0 - right[f]))
            others = [x for g, x in wanted.items() if g != f and x != v] or [word(rng)]
            acts.append(Act(style.enter(fields[f], rng.choice(others)), False, 0.0))
        out.append(Question("form", verb.format(", ".join(said)), float(ready), _some(acts, rng, most=5, keep=1)))
    return Scene(page, _idle_past(world, rng), out)


def menu(world: World, rng: Random, easy: float) -> Scene:
    """Sections to choose from and a field to search in: where does the way to the goal begin?"""
    style = world.style
    sections = words(rng, rng.randint(2, 3 if rng.random() < easy else 8))
    links = [Element(LINK, style.cased(s)) for s in sections]
    held = {s: words(rng, rng.choice((0, 1, 2))) for s in sections}
    search = Element(FIELD, rng.choice(("Search", "Find", "Query", "search")))
    shown: list[Element] = [search] if rng.random() < 0.5 else []
    for section, link in zip(sections, links, strict=True):
        shown += [link, *(Element(TEXT, style.cased(item), depth=1) for item in held[section])]
    page = style.write(_with_filler(shown if search in shown else [*shown, search], rng, easy), rng)
    out = []
    for _ in range(4):
        known = rng.random() < 0.65
        section = rng.choice(sections) if known else ""
        noun = rng.choice([section, *held[section] * 2]) if known else word(rng)
        about = rng.choice((noun, f"{word(rng)} {noun}", f"{noun} {word(rng)}", f"{noun} with {word(rng)} {word(rng)}"))
        acts = [Act(style.press(e), s == section) for s, e in zip(sections, links, strict=True)]
        # where the section is known, a search would do as well: it is not asked about
        acts += [Act(style.enter(search, word(rng)), False), *([] if known else [Act(style.enter(search, noun), True)])]
        out.append(Question("menu", rng.choice(_WANT).format(about), float(known), _some(acts, rng)))
    return Scene(page, [], out)


def trail(world: World, rng: Random, easy: float) -> Scene:
    """A page that says little: which goal the run is after shows in what was done before."""
    style = world.style
    things = world.things(4)
    links = [Element(LINK, style.cased(t.title)) for t in things]
    style.write(links, rng)
    by_name = style.by_name
    i = rng.randrange(len(things))
    past = [style.press(links[i])] if by_name else [style.enter(Element(FIELD, "search", ident="7"), things[i].title)]
    past = [*_idle_past(world, rng), *past]
    if rng.random() < 0.5:
        past.append(style.press(Element(BUTTON, rng.choice(("continue", "details", "ok", "go")), ident="3")))
    submit, back = Element(BUTTON, style.cased(world.submit)), Element(LINK, style.cased(world.back))
    page = style.write(_with_filler(rng.sample([submit, back], 2), rng, easy), rng)
    out = []
    others = [j for j in range(len(things)) if j != i]
    for j in [i, *rng.sample(others, min(len(others), rng.choice((1, 1, 2))))]:
        goal = rng.choice(_WANT).format(things[j].title)
        acts = [Act(style.press(submit), j == i, float(j == i)), Act(style.press(back), j != i, float(j != i))]
        out.append(Question("trail", goal, float(j == i), acts))
    return Scene(page, past, out)


# -- parts -----------------------------------------------------------------------------------------------------------


def _some(acts: Sequence[Act], rng: Random, most: int = 4, keep: int = 0) -> list[Act]:
    """At most `most`: a right one if there is one, the first `keep`, the nearest misses, and others."""
    right = [a for a in acts if a.right]
    wrong = [a for a in acts[keep:] if not a.right]
    rng.shuffle(wrong)
    near = sorted(wrong, key=lambda a: 0.0 if math.isnan(a.grade) else -a.grade)
    first = [a for a in acts[:keep] if not a.right]
    chosen = {
        a.text: a for a in [*rng.sample(right, min(len(right), 1 + (rng.random() < 0.2))), *first, *near[:2], *wrong]
    }
    return rng.sample(kept := list(chosen.values())[:most], len(kept))


def _put(elements: list[Element], more: list[Element], rng: Random) -> None:
    """`more` above or below."""
    if rng.random() < 0.3:
        elements[:0] = more
    else:
        elements += more


def _with_filler(elements: list[Element], rng: Random, easy: float) -> list[Element]:
    """Between what matters stands what does not."""
    out = list(elements)
    for _ in range(0 if rng.random() < easy else rng.choice((0, 1, 2, 4))):
        text = rng.choice(_FILLER) if rng.random() < 0.6 else " ".join(words(rng, rng.choice((2, 3, 5))))
        role = rng.choice((TEXT, TEXT, LINK, HEADING))
        out.insert(rng.choice((0, len(out), rng.randint(0, len(out)))), Element(role, text))
    return out


def _idle_past(world: World, rng: Random) -> list[str]:
    """Earlier actions that tell nothing."""
    style = world.style
    out = []
    for _ in range(0 if world.simple else rng.choice((0, 0, 1, 2, 3))):
        e = Element(rng.choice((LINK, BUTTON)), style.cased(" ".join(words(rng, rng.choice((1, 2))))))
        e.ident = f"{style.prefix}{rng.randrange(1, 90)}"
        out.append(style.press(e) if rng.random() < 0.8 else style.enter(e, word(rng)))
    return out
