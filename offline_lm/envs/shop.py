"""A text web shop that is finite underneath: every value of every policy is known exactly.

A task is a deterministic Markov decision process of some hundred pages: home, search results over two pages,
product pages with a size to choose, the basket; a dead end that no click leads out of, purchases that cannot be
undone, and text that means nothing. The page text shows the state, so that a critic that reads goal and page can be
right everywhere (a product that lies on two shelves looks the same on both, and is worth the same). Words, wordings,
prices and positions are drawn from the site's seed; tasks of one site share its words, and a held-out task is a new
combination of them.

`exact` computes the values and records the logs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offline_lm.envs import exact
from offline_lm.envs.exact import End, Move, State, TextMDP, pick

BENCHMARK = "shop"
HORIZON = 5
"""Clicks of the longest of the shortest ways to a target: search, next page, product, size, buy."""
STEPS_PER_CLICK = 3
"""The step limit is this many times the horizon."""
WRONG_SIZE = 0.3
"""Reward for the right product in the wrong size, or in none."""

_NOUNS = (
    "mug kettle lamp scarf jacket chair vase clock blanket basket bottle wallet pillow towel backpack plate bench "
    "helmet umbrella candle notebook teapot ladder curtain"
).split()
_COLOURS = "red blue green black white yellow purple orange grey pink brown teal".split()
_MATERIALS = "steel cotton leather bamboo glass wool ceramic copper linen marble".split()
_SIZES = "small medium large mini giant standard".split()
_FILLER = (
    "Free returns within thirty days. ; Members earn points on every order. ; Rated 4.6 by our customers. ; "
    "Ships in two days. ; New arrivals every week. ; Ask our assistant anything. ; Gift wrapping available. ; "
    "Last chance offers end tonight. ; Trusted since 1998. ; Download our app."
).split(" ; ")
_GOALS = (
    "Buy a {colour} {material} {noun}, size {size}.",
    "I need one {material} {noun} in {colour}. Size: {size}.",
    "Order the {noun} that is {colour}, made of {material}, in {size}.",
    "Please get me a {size} {noun}, {colour}, {material}.",
)
_WORDING = {  # what a button is called on this site
    "buy": ("buy now", "order at once", "one click purchase"),
    "add": ("add to basket", "put in cart", "add to bag"),
    "checkout": ("checkout", "pay", "place order"),
    "remove": ("remove", "take out", "delete item"),
    "back": ("back to results", "return to list", "go back"),
    "home": ("home", "main page", "start"),
    "next": ("next page", "more results", "page 2"),
    "previous": ("previous page", "earlier results", "page 1"),
    "deals": ("daily deals", "offers", "bargains"),
    "lottery": ("prize draw", "win a voucher", "lucky wheel"),
    "wait": ("wait", "keep waiting", "stay in line"),
}


@dataclass(frozen=True)
class Product:
    """One thing for sale: title words and price; sizes are the task's."""

    colour: str
    material: str
    noun: str
    price: int

    @property
    def title(self) -> str:
        return f"{self.colour} {self.material} {self.noun}"


@dataclass(frozen=True)
class Site:
    """The words of one shop, drawn from its seed."""

    seed: int
    nouns: tuple[str, ...]
    colours: tuple[str, ...]
    materials: tuple[str, ...]
    sizes: tuple[str, ...]
    wording: dict[str, str]

    @classmethod
    def draw(cls, seed: int, nouns: int = 16, colours: int = 9, materials: int = 7) -> Site:
        rng = np.random.default_rng([seed, 0])
        wording = {button: str(rng.choice(names)) for button, names in _WORDING.items()}
        return cls(
            seed,
            nouns=pick(rng, _NOUNS, nouns),
            colours=pick(rng, _COLOURS, colours),
            materials=pick(rng, _MATERIALS, materials),
            sizes=pick(rng, _SIZES, 5),
            wording=wording,
        )


class Task:
    """One goal on one site.

    Args:
        horizon: clicks of the shortest way to the target, or one more than it takes; 5 or more. The products of the
            target's kind lie on the last two of its `horizon` - 3 pages of results; the pages before them are empty.

    Attributes:
        target: the product that the goal names, an index into `products`; `size` is its size.
        mdp: the task as tables.
    """

    def __init__(self, site: Site, number: int, horizon: int = HORIZON) -> None:
        if horizon < HORIZON:
            raise ValueError(f"a way takes {HORIZON} clicks at least, not {horizon}")
        self.site, self.number = site, number
        rng = np.random.default_rng([site.seed, 1, number])
        noun, other = (str(w) for w in rng.choice(site.nouns, 2, replace=False))
        colour, material = str(rng.choice(site.colours)), str(rng.choice(site.materials))
        self.sizes = tuple(str(s) for s in rng.permutation(site.sizes)[:3])
        self.size = str(rng.choice(self.sizes))
        self.nouns = (noun, other)

        def others(words: Sequence[str], word: str, n: int) -> tuple[str, ...]:
            return pick(rng, [w for w in words if w != word], n)

        c, m = others(site.colours, colour, 3), others(site.materials, material, 3)
        # near misses: one attribute right, so that no single word gives the target away
        looks = [(colour, material), (colour, m[0]), (colour, m[1]), (c[0], material), (c[1], material), (c[2], m[2])]
        shelf = [Product(a, b, noun, int(rng.integers(3, 99))) for a, b in looks]
        order = rng.permutation(len(shelf))
        self.target = int(np.flatnonzero(order == 0)[0])
        wrong = [(colour, material), (c[0], m[0]), (c[1], material)]  # the right look on the wrong kind of thing
        self.products = [shelf[i] for i in order] + [Product(a, b, other, int(rng.integers(3, 99))) for a, b in wrong]
        mixed = [(c[2], m[0]), (c[0], m[1])]
        self.products += [Product(a, b, str(rng.choice(site.nouns)), int(rng.integers(3, 99))) for a, b in mixed]
        goal = str(rng.choice(_GOALS)).format(colour=colour, material=material, noun=noun, size=self.size)
        last = horizon - 4
        self._shelves: dict[tuple[str, int], list[int]] = {
            **{(noun, page): [] for page in range(last - 1)},
            (noun, last - 1): [0, 1, 2], (noun, last): [3, 4, 5], (other, 0): [6, 7, 8], ("deals", 0): [9, 10, 6],
        }  # fmt: skip
        self._rng = rng
        mdp = TextMDP.explore(
            ("home",), self._view, benchmark=BENCHMARK, seed=site.seed, number=number, goal=goal,
            limit=STEPS_PER_CLICK * horizon,
        )  # fmt: skip
        self.mdp = mdp if horizon == HORIZON else replace(mdp, variant=f"h{horizon}")

    def _moves(self, state: State) -> list[Move]:
        w = self.site.wording
        home: State = ("home",)
        match state:
            case ("home",):
                return [
                    *((f"search[{n}]", ("results", n, 0)) for n in sorted(self.nouns)),
                    (f"click[{w['deals']}]", ("results", "deals", 0)),
                    (f"click[{w['lottery']}]", ("queue",)),
                ]
            case ("queue",):  # the dead end: nothing leads out, the step limit ends it
                return [(f"click[{w['wait']}]", state), (f"click[{w['home']}]", state)]
            case ("results", shelf, page):
                moves: list[Move] = [
                    (f"click[{self.products[i].title}]", ("product", i, None, state))
                    for i in self._shelves[shelf, page]
                ]
                for button, other in (("next", page + 1), ("previous", page - 1)):
                    if (shelf, other) in self._shelves:
                        moves.append((f"click[{w[button]}]", ("results", shelf, other)))
                return [*moves, (f"click[{w['home']}]", home)]
            case ("product", i, size, results):
                return [
                    *((f"click[{s}]", ("product", i, s, results)) for s in self.sizes if s != size),
                    (f"click[{w['add']}]", ("basket", i, size, results)),
                    (f"click[{w['buy']}]", self._end(i, size)),
                    (f"click[{w['back']}]", results),
                ]
            case ("basket", i, size, results):
                return [
                    (f"click[{w['checkout']}]", self._end(i, size)),
                    (f"click[{w['remove']}]", ("product", i, size, results)),
                    (f"click[{w['home']}]", home),
                ]
        raise AssertionError(state)

    def _end(self, product: int, size: str | None) -> End:
        """A purchase. The careless policy takes another product of the target's kind for the target."""
        worth = 1.0 if size == self.size else WRONG_SIZE
        decoy = (self.target + 1) % 6
        return End(reward=worth * (product == self.target), mistaken=worth * (product == decoy))

    def _view(self, state: State) -> tuple[str, list[Move]]:
        """The text of a page, and its actions. It shows the whole state, but not the goal."""
        moves, lines = self._moves(state), []
        match state:
            case ("home",):
                lines = ["Welcome to the shop."]
            case ("queue",):
                lines = ["You are in line for the wheel. Thousands are before you."]
            case ("results", shelf, page):
                lines = [f"Results for {shelf}, page {page + 1}:"]
                lines += [f"{self.products[i].title} ${self.products[i].price}" for i in self._shelves[shelf, page]]
            case ("product", i, size, _):
                lines = [
                    f"Product: {self.products[i].title} ${self.products[i].price}",
                    f"Sizes: {', '.join(self.sizes)}",
                ]
                lines.append(f"Selected: {size or 'none'}")
            case ("basket", i, size, _):
                lines = [f"Basket: {self.products[i].title}", f"Selected: {size or 'none'}"]
        # one filler line a page, fixed for the task: distractor text must not name the state
        lines.append(str(self._rng.choice(_FILLER)))
        lines.append(" ".join(action for action, _ in moves if not any(p.title in action for p in self.products)))
        return "\n".join(lines), moves


def single_turn(task: TextMDP) -> TextMDP:
    """All that the task can end in as actions of one page, the step limit 1."""
    ends: dict[str, End] = {}
    for s, a in np.argwhere(task.next == -1):
        path = " ".join([*task.paths[s], task.actions[s][a]])
        ends[path] = End(float(task.reward[s, a]), float(task.mistaken[s, a]))
    return TextMDP.explore(
        ("page",), lambda _: ("One click.", list(ends.items())), benchmark=f"{task.benchmark}_single", seed=task.seed,
        number=task.number, goal=task.goal, limit=1,
    )  # fmt: skip


def record(tasks: Iterable[Task], episodes: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Episodes of `tasks` in the `jsonl` format (`exact.record`)."""
    return exact.record((task.mdp for task in tasks), episodes, seed)
