"""Made-up words, numbers and dates: a reader that learns on them learns relations between words, not words."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

_ONSETS = (
    *"b c d f g h j k l m n p r s t v w z".split() * 3,
    *"bl br ch cl cr dr fl fr gl gr ph pl pr qu sc sh sk sl sm sn sp st str sw th tr tw wh".split(),
    *[""] * 6,
)
_NUCLEI = (*"a e i o u".split() * 4, *"ai au ea ee ei ie io oa oo ou ow y".split())
_CODAS = (
    *[""] * 20, *"b ck d f g l m n p r s t x".split() * 2,
    *"ct ft lk ll ld lt mp nd ng nk nt pt rd rk rm rn rt ss st sh th tch".split(),
)  # fmt: skip
_ENDINGS = "er ing ed ly ion able ment ness ful less ist al ive ous ic age ant ary ity ure or et".split()


def word(rng: Random) -> str:
    """One to three syllables, at times with an English ending."""
    syllables = rng.choices((1, 2, 3), (9, 6, 1))[0]
    text = "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables))
    if syllables < 3 and rng.random() < 0.25:
        text += rng.choice(_ENDINGS)
    return text if len(text) > 2 else text + word(rng)


def words(rng: Random, n: int) -> list[str]:
    """n different ones; at times two that look much alike stand among them."""
    found: dict[str, None] = {}
    while len(found) < n:
        if found and rng.random() < 0.15:  # one letter apart: pieces of words must be compared too
            other = rng.choice(list(found))
            at = rng.randrange(len(other))
            found[other[:at] + rng.choice("abdegilmnoprstu") + other[at + 1 :]] = None
        else:
            found[word(rng)] = None
    return list(found)


_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


@dataclass(frozen=True)
class Scale:
    """A field whose values can be compared: how they are drawn, written, and spoken of.

    Attributes:
        low, high: of the numbers drawn, both included.
        form: how a number is written.
        least, most: superlatives.
        below, above: comparatives that go before a value, strict; up_to, at_least: those that include it.
    """

    low: int
    high: int
    form: str
    least: tuple[str, ...]
    most: tuple[str, ...]
    below: tuple[str, ...]
    above: tuple[str, ...]
    up_to: tuple[str, ...] = ("at most", "no more than", "up to", "a maximum of")
    at_least: tuple[str, ...] = ("at least", "no less than", "a minimum of")

    def written(self, x: int) -> str:
        match self.form:
            case "date":
                return f"2026-{1 + x // 28:02d}-{1 + x % 28:02d}"
            case "day":
                return f"{1 + x % 28} {_MONTHS[x // 28]}"
            case "clock":
                return f"{x // 4:02d}:{15 * (x % 4):02d}"
            case "cents":
                return f"${x / 20:.2f}"
            case "stars":
                return f"{x / 10:.1f}"
            case form:
                return form.format(x)

    def draw(self, rng: Random) -> int:
        return rng.randint(self.low, self.high)


_CHEAP = ("cheapest", "lowest-priced", "least expensive"), ("most expensive", "dearest", "highest-priced")
_COST = ("under", "below", "for less than", "cheaper than"), ("over", "above", "for more than")
_SMALL = ("smallest", "lowest", "fewest"), ("largest", "highest", "most")
_LESS = ("under", "below", "less than", "fewer than"), ("over", "above", "more than")
_EARLY = ("earliest", "oldest"), ("latest", "newest", "most recent")
_BEFORE = ("before", "earlier than"), ("after", "later than"), ("by", "until", "not after"), ("from", "not before")


def scales(rng: Random) -> dict[str, Scale]:
    """Fields of numbers by name, one way of writing each."""
    price = rng.choice(((1, 99, "${}"), (1, 999, "${}"), (20, 1999, "cents"), (2, 500, "{} EUR"), (5, 99, "{}")))
    when = rng.choice(((0, 334, "date"), (0, 334, "day"), (28, 92, "clock")))
    size = rng.choice(((1, 20, "{}"), (1, 200, "{}"), (10, 99, "{} kg"), (1, 60, "{} min"), (2, 12, "{} seats")))
    return {
        rng.choice(("price", "cost", "fare", "fee")): Scale(*price, *_CHEAP, *_COST),
        rng.choice(("date", "day", "departure", "due", "updated")): Scale(*when, *_EARLY, *_BEFORE),
        rng.choice(("rating", "score")): Scale(10, 50, "stars", *_SMALL, *_LESS),
        rng.choice(("amount", "length", "weight", "stock", "size", "votes")): Scale(*size, *_SMALL, *_LESS),
    }
