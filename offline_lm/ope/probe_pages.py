"""Questions about small pages, whose answers are known: what a critic must be able to read.

A page shows some items in one of four styles. Each question has one right answer, and nothing but goal and page
together tells it: goals come in pairs with opposite answers on the same page, or every answer is the right one to some
goal, so that neither a page nor an action is good by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offline_lm.ope.probe_words import Words, split

Rng = np.random.Generator
Item = tuple[str, str, str]
"""Colour, make, noun."""

FIELDS = ("price", "weight", "height", "stock", "votes", "code")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
_TITLES = ("Results", "Our range", "All offers", "Inventory")
_NAMES = ("{colour} {make} {noun}", "{noun}, {colour}, {make}", "{make} {noun} ({colour})")
_PHRASES = (  # a goal says it in other words than the page, so that copied text is not enough
    "{colour} {make} {noun}", "{noun} that is {colour} and {make}", "{make} {noun} in {colour}",
    "{noun}, {make}, {colour}",
)  # fmt: skip
_WISHES = ("Find the {}.", "Open the {}.", "I want the {}.", "Look for the {}.")


@dataclass(frozen=True)
class Question:
    """A goal on a page, in the text of a logged step.

    Attributes:
        style: name of the page's style, one of `STYLES`.
        candidates: actions, one of them right; without them the question is whether the page has what the goal names.
        right: index of the right candidate; without candidates 1 for yes, 0 for no.
    """

    style: str
    goal: str
    observation: str
    candidates: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Page:
    """A page's text, the action that clicks each of its items, and the pattern of an action that answers."""

    style: str
    text: str
    clicks: tuple[str, ...]
    answer: str

    def asks(self, goal: str, candidates: Sequence[str] = (), right: int = 0) -> Question:
        return Question(self.style, goal, self.text, tuple(candidates), right)


# -- styles ------------------------------------------------------------------------------------------------------------

Rows = Sequence[tuple[str, Mapping[str, int]]]


def _plain(title: str, rows: Rows, ids: Sequence[int], role: str) -> tuple[str, list[str]]:
    lines = [title, *([" | ".join(["name", *rows[0][1]])] if rows[0][1] else [])]
    lines += [" | ".join([name, *map(str, cells.values())]) for name, cells in rows]
    return "\n".join(lines), [f"click[{name}]" for name, _ in rows]


def _axtree(title: str, rows: Rows, ids: Sequence[int], role: str) -> tuple[str, list[str]]:
    lines = [f"RootWebArea '{title}', focused", f"\t[{ids[0]}] heading '{title}'"]
    for i, (name, cells) in zip(ids[1:], rows, strict=True):
        lines += [f"\t[{i}] {role} '{name}', clickable"]
        lines += [f"\t\tStaticText '{field}: {value}'" for field, value in cells.items()]
    return "\n".join(lines), [f"click('{i}')" for i in ids[1:]]


def _aria(title: str, rows: Rows, ids: Sequence[int], role: str) -> tuple[str, list[str]]:
    lines = [f'- heading "{title}" [level=1]', "- list:"]
    for name, cells in rows:
        lines += ["  - listitem:", f'    - {role} "{name}"']
        lines += [f"    - text: {field} {value}" for field, value in cells.items()]
    return "\n".join(lines), [f"getByRole('{role}', {{ name: '{name}' }}).click()" for name, _ in rows]


def _html(title: str, rows: Rows, ids: Sequence[int], role: str) -> tuple[str, list[str]]:
    tag = {"button": "button", "link": "a"}[role]
    lines = [f"<h1 id={ids[0]}>{title}</h1>", "<ul>"]
    for i, (name, cells) in zip(ids[1:], rows, strict=True):
        spans = "".join(f" <span class={field}>{value}</span>" for field, value in cells.items())
        lines += [f"<li><{tag} id={i}>{name}</{tag}>{spans}</li>"]
    return "\n".join([*lines, "</ul>"]), [f"click(id={i})" for i in ids[1:]]


STYLES: dict[str, tuple[Callable[[str, Rows, Sequence[int], str], tuple[str, list[str]]], str]] = {
    "plain": (_plain, "answer[{}]"),
    "axtree": (_axtree, "send_msg_to_user('{}')"),
    "aria": (_aria, "answer {}"),
    "html": (_html, "type({})"),
}
"""How a page is written, and how an action answers there. Two click by an item's name, two by its number."""


def _page(words: Words, style: str, rng: Rng, names: Sequence[str], cells: Sequence[Mapping[str, int]] = ()) -> Page:
    write, answer = STYLES[style]
    cells = cells or [{}] * len(names)
    shown = {value for row in cells for value in row.values()}
    ids = sorted(_pick(rng, [i for i in words.numbers if i not in shown], len(names) + 1))
    title, role = str(rng.choice(_TITLES)), str(rng.choice(["button", "link"]))
    text, clicks = write(title, list(zip(names, cells, strict=True)), ids, role)
    return Page(style, text, tuple(clicks), answer)


# -- questions ---------------------------------------------------------------------------------------------------------


def match(words: Words, style: str, rng: Rng) -> list[Question]:
    """Is what the goal names on the page? Twice yes; twice no, where one word differs from an item's.

    The other word stands on the page too wherever that makes an item that does not.
    """
    items = _alike(words, rng, size=3, n=int(rng.integers(1, 7)))
    page = _page(words, style, rng, _named(rng, items))
    asked = [(_any(rng, items), 1) for _ in range(2)] + [(_near_miss(words, rng, items), 0) for _ in range(2)]
    return [page.asks(_wish(rng, item), right=yes) for item, yes in asked]


def match_action(words: Words, style: str, rng: Rng) -> list[Question]:
    """Which click opens the item that the goal names? Four of the items, which share words, are on offer."""
    items = _alike(words, rng, size=2, n=int(rng.integers(4, 7)))
    page = _page(words, style, rng, _named(rng, items))
    offered = _pick(rng, range(len(items)), 4)
    return [
        page.asks(_wish(rng, items[offered[right]]), [page.clicks[i] for i in offered], right)
        for right in _pick(rng, range(4), 2)
    ]


def lookup(words: Words, style: str, rng: Rng) -> list[Question]:
    """What is in this field of this item, which is named or counted? On offer: two fields of two items."""
    names = _distinct(words, rng, int(rng.integers(3, 6)))
    fields = _pick(rng, FIELDS, 2)
    values = np.reshape(_pick(rng, words.numbers, 2 * len(names)), (-1, 2)).tolist()
    page = _page(words, style, rng, names, [dict(zip(fields, row, strict=True)) for row in values])
    cells = [(row, column) for row in _pick(rng, range(len(names)), 2) for column in (0, 1)]
    candidates = [page.answer.format(values[row][column]) for row, column in cells]
    questions = []
    for right in _pick(rng, range(4), 2):
        row, column = cells[right]
        of = _any(rng, [names[row], f"{ORDINALS[row]} item"])
        goal = _any(rng, ["What is the {} of the {}?", "Tell me the {} of the {}."]).format(fields[column], of)
        questions.append(page.asks(goal, candidates, right))
    return questions


def compare(words: Words, style: str, rng: Rng) -> list[Question]:
    """Of two items, open the one with the lower (or higher) number, or the one under (or over) a limit."""
    names = _distinct(words, rng, int(rng.integers(2, 5)))
    field = _any(rng, FIELDS)
    ordered = sorted(words.numbers)
    low = int(rng.integers(len(ordered) - 2))
    high = int(rng.integers(low + 2, min(low + len(ordered) // 3, len(ordered))))
    pair = _pick(rng, [ordered[low], ordered[high]], 2)
    limit = ordered[int(rng.integers(low + 1, high))]
    values = [*pair, *_pick(rng, [n for n in ordered if n not in (*pair, limit)], len(names) - 2)]
    shown = _pick(rng, range(len(names)), len(names))
    page = _page(words, style, rng, [names[i] for i in shown], [{field: values[i]} for i in shown])
    candidates = [page.clicks[shown.index(i)] for i in (0, 1)]
    smaller = int(np.argmin(pair))
    a, b = names[:2]
    if rng.random() < 0.5:
        goals = [f"Of the {a} and the {b} open the one with the {which} {field}." for which in ("lower", "higher")]
    else:
        goals = [f"Open the {a} or the {b}, its {field} must be {than} {limit}." for than in ("under", "over")]
    return [page.asks(goal, candidates, right) for goal, right in zip(goals, (smaller, 1 - smaller), strict=True)]


def negate(words: Words, style: str, rng: Rng) -> list[Question]:
    """Open the one that is (or is not) of this colour: two items of a kind are on offer, others stand beside them."""
    colours, nouns = _pick(rng, words.colours, 2), _pick(rng, words.nouns, 2)
    items = [(colour, _any(rng, words.makes), noun) for noun in nouns for colour in colours]
    shown = _pick(rng, range(4), 4)
    page = _page(words, style, rng, _named(rng, [items[i] for i in shown]))
    candidates = [page.clicks[shown.index(i)] for i in (0, 1)]
    right = int(rng.integers(2))
    yes, no = _any(rng, [
        ("Open the {1} that is {0}.", "Open the {1} that is not {0}."),
        ("Choose the {1} which is {0}.", "Choose the {1} which isn't {0}."),
        ("A {1}, but only a {0} one.", "A {1}, but no {0} one."),
    ])  # fmt: skip
    asked = colours[right], nouns[0]
    return [page.asks(yes.format(*asked), candidates, right), page.asks(no.format(*asked), candidates, 1 - right)]


def count(words: Words, style: str, rng: Rng) -> list[Question]:
    """How many items are of this kind? On offer: the numbers of this kind and of the other one on the page."""
    few, many = sorted(_pick(rng, range(1, 5), 2))
    nouns = _pick(rng, words.nouns, 2)
    colours = _pick(rng, words.colours, few + many)
    items = [(colour, _any(rng, words.makes), nouns[i >= few]) for i, colour in enumerate(colours)]
    page = _page(words, style, rng, _named(rng, _pick(rng, items, len(items))))
    candidates = [page.answer.format(n) for n in (few, many)]
    wording = _any(rng, ["How many of the items are a {}?", "Count the items whose kind is {}."])
    return [page.asks(wording.format(noun), candidates, i) for i, noun in enumerate(nouns)]


def order(words: Words, style: str, rng: Rng) -> list[Question]:
    """Open the item right before (or after) this one: its two neighbours are on offer."""
    names = _distinct(words, rng, int(rng.integers(3, 7)))
    page = _page(words, style, rng, names)
    at = int(rng.integers(1, len(names) - 1))
    candidates = [page.clicks[at - 1], page.clicks[at + 1]]
    goals = [f"Open the item right {where} the {names[at]}." for where in ("before", "after")]
    return [page.asks(goal, candidates, i) for i, goal in enumerate(goals)]


PROBES: dict[str, Callable[[Words, str, Rng], list[Question]]] = {
    "match": match, "match_action": match_action, "lookup": lookup, "compare": compare, "negate": negate,
    "count": count, "order": order,
}  # fmt: skip
"""One page with its questions. `match` is read at the prompt's end (V), the others at each action's end (Q)."""


# -- drawing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Questions to fit a probe on, to choose its regularisation with, and to test it on: no word is in two of them."""

    fit: list[Question]
    validation: list[Question]
    test: list[Question]

    def parts(self) -> tuple[list[Question], list[Question], list[Question]]:
        return self.fit, self.validation, self.test


def draw(seed: int, n_train: int, n_test: int, styles: Sequence[str] = tuple(STYLES)) -> dict[str, Split]:
    """Every probe's questions on `n_train` and `n_test` pages; a fifth of the former is for validation."""
    held = n_train // 5
    out = {}
    for number, (name, ask) in enumerate(PROBES.items()):
        parts = []
        for part, (words, n) in enumerate(zip(split(seed), (n_train - held, held, n_test), strict=True)):
            rng = np.random.default_rng([seed, 1, number, part])
            parts.append([q for i in range(n) for q in ask(words, styles[i % len(styles)], rng)])
        out[name] = Split(*parts)
    return out


def _pick(rng: Rng, options: Sequence[Any], n: int) -> list[Any]:
    """n different options in random order."""
    return [options[i] for i in rng.permutation(len(options))[:n].tolist()]


def _any(rng: Rng, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _alike(words: Words, rng: Rng, size: int, n: int) -> list[Item]:
    """n different items of `size` colours, makes and nouns, so that they share words."""
    few = [_pick(rng, slot, size) for slot in words.slots()]
    return _pick(rng, [(colour, make, noun) for colour in few[0] for make in few[1] for noun in few[2]], n)


def _near_miss(words: Words, rng: Rng, items: Sequence[Item]) -> Item:
    """An item that is not there, but for one word is."""
    swapped = {(*item[:slot], other[slot], *item[slot + 1 :]) for item in items for other in items for slot in range(3)}
    if missing := sorted(swapped - set(items)):
        return _any(rng, missing)
    item, slot = _any(rng, items), int(rng.integers(3))
    absent = [word for word in words.slots()[slot] if all(word != other[slot] for other in items)]
    changed = list(item)
    changed[slot] = _any(rng, absent)
    return changed[0], changed[1], changed[2]


def _named(rng: Rng, items: Sequence[Item]) -> list[str]:
    """What the page calls them: all in one way."""
    name = _any(rng, _NAMES)
    return [_say(name, item) for item in items]


def _wish(rng: Rng, item: Item) -> str:
    return _any(rng, _WISHES).format(_say(_any(rng, _PHRASES), item))


def _say(pattern: str, item: Item) -> str:
    return pattern.format(colour=item[0], make=item[1], noun=item[2])


def _distinct(words: Words, rng: Rng, n: int) -> list[str]:
    """n names of two words that share none."""
    pairs = zip(_pick(rng, words.colours, n), _pick(rng, words.nouns, n), strict=True)
    return [f"{colour} {noun}" for colour, noun in pairs]
