"""A desk that lets the meeting rooms of an office, finite underneath: every value of every policy is known exactly.

A task is a deterministic Markov decision process of some hundred pages, accessibility trees in the style of BrowserGym
(`[17] button 'Reserve'`, actions such as `click('17')`): a search form whose day is selected and whose equipment is
filled in before it searches, a list of rooms with several attributes each, a room's page, a review before the
reservation that cannot be undone, pages that lead nowhere, and text that means nothing. A goal names a day, a piece
of equipment and a bound on the seats, which is a comparison of numbers; rooms miss it by one of the three. The page
text shows the state. Words, wordings and the numbers of the elements are drawn from the site's seed; tasks of one site
share them, and a held-out task is a new combination. `exact` computes the values and records the logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offline_lm.envs import exact
from offline_lm.envs.exact import End, Move, State, TextMDP, pick

BENCHMARK = "office"
STEP_LIMIT = 15
WRONG_SEATS = 0.3
"""Reward for a room on the right day, with the right equipment, that has too few or too many seats."""

_NAMES = (
    "Cedar Quartz Heron Juniper Falcon Onyx Willow Comet Saturn Maple Dolphin Amber Birch Lynx Neptune Coral Hazel "
    "Raven Topaz Orbit"
).split()
_EQUIPMENT = (
    "projector, whiteboard, piano, loudspeaker, flip chart, video screen, lectern, kitchenette, microphone, printer, "
    "stage, balcony"
).split(", ")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_FILLER = (
    "The {equipment} in the cellar is being repaired. ; Windows are cleaned on {day}. ; Fire drill at noon. ; "
    "At most 2 bicycles fit in the hall. ; Leave at least 3 chairs by the door. ; Choir practice moved to {day}. ; "
    "Lost: one left glove. ; Someone left a {equipment} in the corridor. ; Lunch is served from 12 to 14. ; "
    "The lift stops on floor 5 again. ; Plants are watered by the caretaker."
).split(" ; ")
_GOALS = (
    "Reserve a room with a {equipment} for {day}: {seats}.",
    "We meet on {day} and want a {equipment} in the room, {seats}.",
    "Find us any room that has a {equipment} and {seats}. The day is {day}.",
    "{day}: one room, {seats}, a {equipment} in it.",
)
_AT_LEAST = ("at least {n} seats", "{n} seats or more", "no fewer than {n} seats")
_AT_MOST = ("at most {n} seats", "{n} seats or fewer", "no more than {n} seats")
_WORDING = {  # what a thing is called on this site
    "desk": ("Room desk", "Meeting rooms", "House calendar"),
    "home": ("Overview", "Lobby", "Desk"),
    "find": ("Find a room", "Look for a room", "Room search"),
    "mine": ("My reservations", "Reserved by me", "My rooms"),
    "news": ("Notice board", "House news", "Announcements"),
    "staff": ("Staff entrance", "Caretaker login", "Administration"),
    "day": ("Day", "Weekday", "When"),
    "equipment": ("Equipment", "Must have", "Features"),
    "search": ("Search", "Show rooms", "List matching"),
    "incomplete": ("Both fields are required.", "Fill in the form first.", "Something is missing."),
    "seats": ("{n} seats", "seats: {n}", "capacity {n}"),
    "free": ("free", "available", "open"),
    "taken": ("taken", "occupied", "already reserved"),
    "reserve": ("Reserve", "Request this room", "Continue"),
    "at_once": ("Instant reservation", "Reserve without review", "Skip review and reserve"),
    "others": ("Other rooms", "All matching rooms", "Rooms found"),
    "confirm": ("Confirm", "Submit reservation", "Yes, reserve"),
    "edit": ("Edit search", "Change the search", "Search again"),
    "cancel": ("Cancel", "Discard", "Abort"),
}


@dataclass(frozen=True)
class Room:
    """One room; a row of the list."""

    name: str
    floor: int
    seats: int
    equipment: str


@dataclass(frozen=True)
class Want:
    """What a goal asks for: the day, the equipment, and from `least` to `most` seats."""

    day: str
    equipment: str
    least: float
    most: float

    def worth(self, day: str, room: Room) -> float:
        """The reward for a reservation."""
        if (day, room.equipment) != (self.day, self.equipment):
            return 0.0
        return 1.0 if self.least <= room.seats <= self.most else WRONG_SEATS


@dataclass(frozen=True)
class Site:
    """The words of one desk, drawn from its seed; `ids` number the elements of a page, `menu` orders the first page."""

    seed: int
    names: tuple[str, ...]
    equipment: tuple[str, ...]
    days: tuple[str, ...]
    wording: dict[str, str]
    menu: tuple[str, ...]
    ids: tuple[int, ...]

    @classmethod
    def draw(cls, seed: int, names: int = 16, equipment: int = 8, days: int = 5) -> Site:
        rng = np.random.default_rng([seed, 2])
        return cls(
            seed,
            names=pick(rng, _NAMES, names),
            equipment=pick(rng, _EQUIPMENT, equipment),
            days=pick(rng, _DAYS, days),
            wording={thing: str(rng.choice(words)) for thing, words in _WORDING.items()},
            menu=pick(rng, ("find", "mine", "news", "staff"), 4),
            ids=tuple(int(i) for i in rng.integers(5, 30) + np.cumsum(rng.integers(1, 5, 16))),
        )


class _Tree:
    """An accessibility tree in the making: its lines, and what the actions on it lead to."""

    def __init__(self, title: str, ids: Sequence[int]) -> None:
        self.lines, self.moves = [f"RootWebArea '{title}', focused"], []
        self._ids = iter(ids)

    def node(self, role: str, name: str, marks: str = "", *, depth: int = 1) -> str:
        """Add an element; returns its number, as actions name it."""
        number = str(next(self._ids))
        self.lines.append("\t" * depth + f"[{number}] {role} '{name}'{marks}")
        return number

    def text(self, *texts: str, depth: int = 1) -> None:
        self.lines += ["\t" * depth + f"StaticText '{text}'" for text in texts]

    def click(self, role: str, name: str, after: State | End, *, depth: int = 1) -> None:
        """Add an element that leads somewhere when it is clicked."""
        self.moves.append((f"click('{self.node(role, name, ', clickable', depth=depth)}')", after))


class Task:
    """One goal on one site.

    Attributes:
        want: what the goal asks for; `mistaken` is what the careless policy takes it for.
        rooms: every room of the house; three have each piece of `equipment` that the house knows.
        taken: which rooms (indices) are not free, by day.
        mdp: the task as tables.
    """

    def __init__(self, site: Site, number: int) -> None:
        self.site, self.number = site, number
        rng = np.random.default_rng([site.seed, 3, number])
        self.days, self.equipment = pick(rng, site.days, 3), pick(rng, site.equipment, 3)
        day, other_day = pick(rng, self.days, 2)
        equipment, other_equipment = pick(rng, self.equipment, 2)

        sizes = {e: [int(n) for n in rng.integers(2, 25) + np.cumsum(rng.integers(1, 8, 3))] for e in self.equipment}
        # the bound parts two neighbours, and is often itself one of them
        below, above = sizes[equipment][:2] if rng.random() < 0.5 else sizes[equipment][1:]
        at_least, bound = bool(rng.random() < 0.5), int(rng.integers(below, above))
        low, high = Want(day, equipment, 0, bound), Want(day, equipment, bound + 1, math.inf)
        self.want, opposite = (high, low) if at_least else (low, high)
        right, wrong = (above, below) if at_least else (below, above)
        seats = str(rng.choice(_AT_LEAST if at_least else _AT_MOST)).format(n=bound + at_least)
        goal = str(rng.choice(_GOALS)).format(day=day, equipment=equipment, seats=seats)
        mistakes = (replace(self.want, day=other_day), Want(day, other_equipment, 0, math.inf), opposite)
        self.mistaken = mistakes[int(rng.integers(len(mistakes)))]

        sizes[other_equipment][int(rng.integers(3))] = right  # a near miss: everything fits but the equipment
        names = iter(pick(rng, site.names, 9))
        self.rooms = [Room(next(names), int(rng.integers(1, 6)), n, e) for e in self.equipment for n in sizes[e]]
        # two rooms are taken each day; one that the goal wants, and its neighbour, are always free
        kept = {self._index(equipment, right), self._index(equipment, wrong)}
        others = [i for i in range(len(self.rooms)) if i not in kept]
        self.taken = {d: {int(i) for i in rng.permutation(others)[:2]} for d in self.days}
        # a search lists the three rooms that have the equipment, and one that has not
        self.lists: dict[str, list[int]] = {}
        for e in self.equipment:
            own = [i for i, room in enumerate(self.rooms) if room.equipment == e]
            stray = int(rng.choice([i for i in range(len(self.rooms)) if i not in own]))
            listed = [*own, self._index(other_equipment, right) if e == equipment else stray]
            self.lists[e] = [int(i) for i in rng.permutation(listed)]
        # one line a kind of page, fixed for the task: distractor text must not name the state
        self._filler = {
            kind: str(rng.choice(_FILLER)).format(day=rng.choice(site.days), equipment=rng.choice(site.equipment))
            for kind in ("home", "mine", "news", "staff", "form", "list", "room", "review")
        }
        self.mdp = TextMDP.explore(
            ("home",), self._view, benchmark=BENCHMARK, seed=site.seed, number=number, goal=goal, limit=STEP_LIMIT
        )

    def _index(self, equipment: str, seats: int) -> int:
        return next(i for i, r in enumerate(self.rooms) if (r.equipment, r.seats) == (equipment, seats))

    # -- the pages ---------------------------------------------------------------------------------------------

    def _view(self, state: State) -> tuple[str, list[Move]]:
        """The text of a page, and its actions. It shows the whole state, but not the goal."""
        w = self.site.wording
        tree = _Tree(w["desk"], self.site.ids)
        home: State = ("home",)
        back = home
        if state[0] not in ("home", "staff"):
            tree.click("link", w["home"], home)
        match state:
            case ("home",):
                tree.node("heading", w["home"])
                for page in self.site.menu:
                    tree.click("link", w[page], ("form", None, None, False) if page == "find" else (page,))
            case ("mine",):
                tree.node("heading", w["mine"])
                tree.text("You hold no reservation.")
            case ("news",):
                tree.node("heading", w["news"])
                tree.text("Read by few, pinned for all:")
            case ("staff",):  # the dead end: nothing leads out, the step limit ends it
                tree.node("heading", w["staff"])
                tree.text("The session is locked until a known staff number is given.")
                tree.node("textbox", "Staff number", ", disabled=True")
                tree.click("button", "Try again", state)
                back = state
            case ("form", day, equipment, alert):
                self._form(tree, day, equipment, alert)
            case ("list", day, equipment):
                self._list(tree, day, equipment)
                back = ("form", day, equipment, False)
            case ("room", day, equipment, i):
                self._room(tree, day, equipment, i)
                back = ("list", day, equipment)
            case ("review", day, equipment, i):
                self._review(tree, day, equipment, i)
                back = ("room", day, equipment, i)
        tree.text(self._filler[state[0]])
        moves = tree.moves if state == home else [*tree.moves, ("go_back()", back)]
        return "\n".join(tree.lines), moves

    def _form(self, tree: _Tree, day: str | None, equipment: str | None, alert: bool) -> None:
        w = self.site.wording
        tree.node("heading", w["find"])
        box = tree.node("combobox", w["day"], f" value='{day or ''}', hasPopup='menu'")
        for option in self.days:
            tree.node("option", option, f", selected={option == day}", depth=2)
        tree.moves += [
            (f"select_option('{box}', '{option}')", ("form", option, equipment, False))
            for option in self.days if option != day
        ]  # fmt: skip
        field = tree.node("textbox", w["equipment"], f" value='{equipment or ''}'")
        tree.text("One of: " + ", ".join(self.equipment), depth=2)
        tree.moves += [
            (f"fill('{field}', '{word}')", ("form", day, word, False)) for word in self.equipment if word != equipment
        ]
        if alert:
            tree.lines.append(f"\talert '{w['incomplete']}'")
        filled = day is not None and equipment is not None
        tree.click("button", w["search"], ("list", day, equipment) if filled else ("form", day, equipment, True))

    def _list(self, tree: _Tree, day: str, equipment: str) -> None:
        w = self.site.wording
        tree.node("heading", f"{day}, {equipment}")
        for i in self.lists[equipment]:
            room = self.rooms[i]
            tree.node("row", f"floor {room.floor} | {self._describe(room)} | {self._state(day, i)}")
            tree.click("link", room.name, ("room", day, equipment, i), depth=2)
        tree.click("button", w["edit"], ("form", day, equipment, False))

    def _room(self, tree: _Tree, day: str, equipment: str, i: int) -> None:
        w, room = self.site.wording, self.rooms[i]
        tree.node("heading", room.name)
        tree.text(f"You searched: {day}, {equipment}", f"floor {room.floor}", self._describe(room))
        tree.text(f"{day}: {self._state(day, i)}")
        if i not in self.taken[day]:
            tree.click("button", w["reserve"], ("review", day, equipment, i))
            tree.click("button", w["at_once"], self._end(day, room))
        tree.click("link", w["others"], ("list", day, equipment))

    def _review(self, tree: _Tree, day: str, equipment: str, i: int) -> None:
        w, room = self.site.wording, self.rooms[i]
        tree.node("heading", f"{room.name}, {day}")
        tree.text(self._describe(room), f"You searched: {day}, {equipment}", "A reservation cannot be changed later.")
        tree.click("button", w["cancel"], ("home",))
        tree.click("button", w["edit"], ("form", day, equipment, False))
        tree.click("button", w["confirm"], self._end(day, room))

    def _describe(self, room: Room) -> str:
        return f"{self.site.wording['seats'].format(n=room.seats)} | {room.equipment}"

    def _state(self, day: str, i: int) -> str:
        return self.site.wording["taken" if i in self.taken[day] else "free"]

    def _end(self, day: str, room: Room) -> End:
        return End(reward=self.want.worth(day, room), mistaken=self.mistaken.worth(day, room))


def record(tasks: Iterable[Task], episodes: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Episodes of `tasks` in the `jsonl` format (`exact.record`)."""
    return exact.record((task.mdp for task in tasks), episodes, seed)
