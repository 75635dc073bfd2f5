"""The words and numbers of the probe pages, split so that a probe is tested on words that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_NOUNS = """
    acorn album almanac anchor apron armchair arrow atlas award axe bagel balloon banjo barrel beaker beehive bell belt
    biscuit bonnet bookcase boots bowl bracelet bread broom brush bucket buggy cabinet cactus cage cake camera canoe cap
    cape carpet cello chain chalk charger cheese chisel clarinet cloak coat comb compass cookie couch cradle crate crown
    cup cushion dagger desk dice doll domino door drawer drill drum easel engine envelope eraser fan feather fence
    flag flask flute fork fountain freezer funnel gate globe glove goblet guitar hammer hammock harp hat hinge hook horn
    jar jug kayak keyboard kite knife knob lantern lens lock lorry magnet mallet map marker mask mattress medal mirror
    mitten mop necklace needle oar oven paddle pan parasol parcel pencil piano pipe pitcher plug poster puppet purse
    puzzle quilt radio raft rake ribbon ring robe rope ruler saddle sandal saw scale scooter shawl shelf shovel sink
    sled sofa spade spoon stamp stapler stool stove sword tambourine tent thimble ticket toaster torch tractor tray
    trumpet trunk tub valve van violin wagon wardrobe watch wheel whistle wrench zipper
""".split()
_COLOURS = """
    amber azure beige black blue bronze brown coral cream crimson cyan emerald fuchsia golden green grey indigo ivory
    khaki lavender lilac magenta maroon mauve mustard navy ochre olive orange pink plum purple red rose ruby scarlet
    silver teal turquoise violet white yellow
""".split()
_MAKES = """
    bamboo ceramic checked concrete copper cotton curved dotted enamel felt folding glass granite hollow iron knitted
    leather linen marble nylon oaken oval padded paper plain plastic quilted round rubber rusty silken slender square
    steel striped suede varnished velvet wicker wooden woollen woven
""".split()
_NUMBERS = range(10, 400)

Array = np.ndarray


@dataclass(frozen=True)
class Words:
    """What a page is filled with: each attribute's words in a list of its own, and numbers of two or three digits."""

    colours: tuple[str, ...]
    makes: tuple[str, ...]
    nouns: tuple[str, ...]
    numbers: tuple[int, ...]

    def slots(self) -> tuple[tuple[str, ...], ...]:
        """The words of an item's three places."""
        return self.colours, self.makes, self.nouns


def split(seed: int) -> tuple[Words, Words, Words]:
    """Disjoint words to fit a probe on (half of each list), to choose its regularisation with (a sixth), to test on."""
    rng = np.random.default_rng([seed, 0])
    parts: list[list[Any]] = [[], [], []]
    for listed in (_COLOURS, _MAKES, _NOUNS, _NUMBERS):
        shuffled = rng.permutation(listed).tolist()
        half, two_thirds = len(shuffled) // 2, 2 * len(shuffled) // 3
        for part, own in zip(parts, np.split(shuffled, [half, two_thirds]), strict=True):
            part.append(tuple(own.tolist()))
    fit, validation, test = (Words(*part) for part in parts)
    return fit, validation, test
