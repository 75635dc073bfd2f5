"""Small worlds of made-up things: what there is, what may be wished of it, and how a wish is worded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from offline_lm.reading.styles import Style
from offline_lm.reading.words import Scale, scales, words

_FIELDS = (
    "colour material type brand city status category owner label model topic format region plan style team finish "
    "genre language room"
).split()
_SUBMIT = (
    "buy now;book;reserve;confirm;submit;apply;save;send;place order;request;proceed;add to list;sign up;check out;"
    "complete;create;accept;take it;continue;ok"
).split(";")
_BACK = "back;return;cancel;go back;previous;close;back to list;dismiss;not this one".split(";")
_NEXT = "next page;more;next;show more;load more;further results;older".split(";")


@dataclass(frozen=True)
class Thing:
    """One record: its kind and its words and numbers by field; `name` where it has one of its own."""

    kind: str
    words: dict[str, str]
    numbers: dict[str, int]
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or f"{' '.join(self.words.values())} {self.kind}"


@dataclass(frozen=True)
class Wish:
    """One condition on a thing: whether it holds, and how it is said, before the noun or behind it."""

    holds: Callable[[Thing], bool]
    before: str = ""
    behind: str = ""


class World:
    """The words of one site."""

    def __init__(self, rng: Random, *, simple: bool = False) -> None:
        self.rng, self.simple = rng, simple
        self.style = Style.draw(rng)
        if simple and rng.random() < 0.7:
            self.style = replace(self.style, by_name=True)
        n_fields = 1 if simple else rng.choice((1, 2, 2, 3, 3))
        own = rng.random() < 0.4  # fields with made-up names
        names = words(rng, n_fields) if own else rng.sample(_FIELDS, n_fields)
        values = words(rng, 4 + n_fields * 5 + 6)
        self.kinds = values[: rng.choice((1, 2, 3, 4))]
        self.words = {name: values[4 + 5 * i : 4 + 5 * i + rng.choice((3, 4, 5))] for i, name in enumerate(names)}
        self.spare = values[4 + 5 * n_fields :]
        measured = list(scales(rng).items())
        self.scales: dict[str, Scale] = {} if simple else dict(rng.sample(measured, rng.choice((1, 1, 2))))
        self.named = not simple and rng.random() < 0.25
        if self.named:  # a name says nothing of the kind: there is one alone
            self.kinds = self.kinds[:1]
        self.submit, self.back, self.next = rng.choice(_SUBMIT), rng.choice(_BACK), rng.choice(_NEXT)

    def thing(self) -> Thing:
        rng = self.rng
        name = " ".join(words(rng, rng.choice((1, 2)))) if self.named else ""
        return Thing(
            rng.choice(self.kinds),
            {f: rng.choice(v) for f, v in self.words.items()},
            {f: s.draw(rng) for f, s in self.scales.items()},
            name,
        )

    def things(self, n: int) -> list[Thing]:
        """Up to n with different titles, most of them near misses of one another."""
        found = {(first := self.thing()).title: first}
        for _ in range(4 * n):
            if len(found) == n:
                break
            thing = self.thing()
            if self.rng.random() < 0.6:  # one word other than another thing's
                like = self.rng.choice(list(found.values()))
                change = self.rng.choice([*self.words, "kind"])
                kept = {**like.words, **({change: thing.words[change]} if change in thing.words else {})}
                thing = Thing(thing.kind if change == "kind" else like.kind, kept, thing.numbers, thing.name)
            found.setdefault(thing.title, thing)
        things = list(found.values())
        self.rng.shuffle(things)
        return things

    # -- wishes ------------------------------------------------------------------------------------------------

    def wishes(self, thing: Thing, among: Sequence[Thing]) -> list[Wish]:
        """Some conditions that hold for `thing`: about its words, its numbers, or its place among the others."""
        rng = self.rng
        if thing.name and rng.random() < 0.5:
            return [Wish(lambda t: t.name == thing.name, behind=f"called {thing.name}" if rng.random() < 0.5 else "")]
        fields = rng.sample(list(self.words), rng.randint(0 if self.scales else 1, len(self.words)))
        wishes = [self._word(f, thing.words[f], among) for f in fields]
        if self.scales and (rng.random() < 0.35 or not wishes):
            rest = [t for t in among if t.kind == thing.kind and all(w.holds(t) for w in wishes)]
            wishes.append(self._number(rng.choice(list(self.scales)), thing, rest))
        return wishes

    def _word(self, field: str, value: str, among: Sequence[Thing]) -> Wish:
        rng = self.rng
        if rng.random() < 0.15:
            others = [v for v in self.words[field] if v != value]
            shown = [v for v in others if any(t.words[field] == v for t in among)]  # these a negation rules out
            other = rng.choice(shown or others)
            said = rng.choice(("not {}", "that is not {}", "but not {}", "other than {}", "without {}")).format(other)
            return Wish(lambda t: t.words[field] != other, behind=said)
        if rng.random() < 0.6:
            return Wish(lambda t: t.words[field] == value, before=value)
        said = rng.choice((f"with {field} {value}", f"whose {field} is {value}", f"in {value}", f"{field}: {value}",
                           f"({value})", f"of {field} {value}", f"that is {value}", value))  # fmt: skip
        return Wish(lambda t: t.words[field] == value, behind=said)

    def _number(self, field: str, thing: Thing, rest: Sequence[Thing]) -> Wish:
        """A condition on a number of `thing`, which rules out some of `rest`, what fits but for it, if it can."""
        rng, scale = self.rng, self.scales[field]
        x, others = thing.numbers[field], [t.numbers[field] for t in rest]
        if len(others) > 1 and rng.random() < 0.5 and x in (min(others), max(others)):
            said = rng.choice(scale.least if x == min(others) else scale.most)
            if len(self.scales) > 1:
                return Wish(lambda t: t.numbers[field] == x, behind=f"with the {said} {field}")
            return Wish(lambda t: t.numbers[field] == x, before=said)
        if rng.random() < 0.2:
            return Wish(lambda t: t.numbers[field] == x, behind=f"with {field} {scale.written(x)}")
        above, below = [y for y in others if y > x], [y for y in others if y < x]
        upper = rng.random() < 0.5 if bool(above) == bool(below) else bool(above)
        included = rng.random() < 0.5
        gap = max(1, (scale.high - scale.low) // rng.choice((4, 10, 30)))
        if upper:
            most = min(min(above, default=x + gap), scale.high + 1)
            limit = rng.randint(x if included else min(x + 1, most), max(x, most - included))
            holds = (lambda t: t.numbers[field] <= limit) if included else (lambda t: t.numbers[field] < limit)
            said = rng.choice(scale.up_to if included else scale.below)
        else:
            least = max(max(below, default=x - gap), scale.low - 1, 0)
            limit = rng.randint(min(x, least + included), x if included else max(x - 1, least))
            holds = (lambda t: t.numbers[field] >= limit) if included else (lambda t: t.numbers[field] > limit)
            said = rng.choice(scale.at_least if included else scale.above)
        said = f"{said} {scale.written(limit)}"
        # a comparison says of what where there are two fields of numbers, and often where there is one
        return Wish(holds, behind=said if len(self.scales) == 1 and rng.random() < 0.5 else f"with {field} {said}")

    def missed(self, thing: Thing) -> Thing:
        """A thing like `thing` but for one word or number."""
        fields = [*self.words, *self.scales]
        change = self.rng.choice(fields if self.named else [*fields, "kind"])
        other, kept, numbers = self.thing(), dict(thing.words), dict(thing.numbers)
        if change in kept:
            kept[change] = self.rng.choice([v for v in self.words[change] if v != thing.words[change]])
        elif change in numbers:
            numbers[change] = self.scales[change].draw(self.rng)
        kind = self.rng.choice([*self.kinds, *self.spare[:2]]) if change == "kind" else thing.kind
        return Thing(kind, kept, numbers, other.name)

    def described(self, kind: str, wishes: Sequence[Wish]) -> str:
        """The noun phrase of some wishes."""
        before = [w.before for w in wishes if w.before]
        behind = [w.behind for w in wishes if w.behind]
        self.rng.shuffle(before)
        self.rng.shuffle(behind)
        phrase = " ".join([self.rng.choice(("a", "the", "one", "")), *before, kind]).strip()
        if before and self.rng.random() < 0.15:
            phrase, before = f"{self.rng.choice(('the', 'a'))} {kind}, {', '.join(before)}", []
        return self.rng.choice((", ", " ", " ", " and ")).join([phrase, *behind]) if behind else phrase
