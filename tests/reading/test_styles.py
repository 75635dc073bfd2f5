"""Looks of pages and grammars of actions."""

import html
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from random import Random

import pytest

from offline_lm.reading.scenes import scenes
from offline_lm.reading.styles import (
    BOX,
    BUTTON,
    CELL,
    FIELD,
    HEADING,
    LINK,
    MENU,
    RADIO,
    TEXT,
    Element,
    Style,
)

LOOKS = ("axtree", "aria", "html", "plain", "indexed")
GRAMMARS = ("call", "webarena", "json", "playwright", "ref", "words", "bracket")
STYLES = {(s.look, s.grammar): s for s in (Style.draw(Random(seed)) for seed in range(600))}


def page():
    return [
        Element(HEADING, "plove"),
        Element(TEXT, "frin: skoo"),
        Element(LINK, "dark vimp", depth=1),
        Element(CELL, "12 kg"),
        Element(BUTTON, "vanch"),
        Element(FIELD, "tolm", value="grue"),
        Element(MENU, "quist", value="naff"),
        Element(BOX, "brill", on=True),
        Element(BOX, "stee"),
        Element(RADIO, "wump", on=True),
    ]


def test_every_look_and_grammar_is_drawn():
    assert {look for look, _ in STYLES} == set(LOOKS)
    assert {grammar for _, grammar in STYLES} == set(GRAMMARS)


@pytest.mark.parametrize("style", STYLES.values(), ids=map(" ".join, STYLES))
def test_a_page_shows_every_name_value_and_mark(style):
    elements = page()
    text = style.write(elements, Random(0))
    lines = text.split("\n")
    assert len(lines) == len(elements)
    for element, line in zip(elements, lines, strict=True):
        assert element.name in line
        assert element.value in line
        if element.role in (LINK, BUTTON, FIELD, MENU) and style.look != "plain":
            assert element.ident in line
    on, off = lines[7].replace("brill", "stee"), lines[8]
    assert on.replace(elements[7].ident, elements[8].ident) != off  # a box that is set looks otherwise
    assert len({e.ident for e in elements}) == len(elements)


@pytest.mark.parametrize("style", STYLES.values(), ids=map(" ".join, STYLES))
def test_actions_differ_by_element_and_value(style):
    elements = page()
    style.write(elements, Random(1))
    pressed = [style.press(e) for e in elements if e.role in (LINK, BUTTON, BOX, RADIO)]
    entered = [style.enter(e, v) for e in elements if e.role in (FIELD, MENU) for v in ("ab", "cd")]
    told = [style.tell(v) for v in ("", "ab", "cd")]
    every = [*pressed, *entered, *told]
    assert len(set(every)) == len(every)
    for text, e in zip(pressed, (e for e in elements if e.role in (LINK, BUTTON, BOX, RADIO)), strict=True):
        assert (e.name if style.by_name else e.ident) in text


def test_one_element_in_each_look():
    """Written by hand, so that a change of a look is seen."""
    link, field = Element(LINK, "dark vimp", depth=1), Element(FIELD, "tolm", value="grue")
    box = Element(BOX, "brill", on=True)
    by_look = {
        "axtree": ["  [a0] link 'dark vimp', clickable", "[a0] textbox 'tolm' value='grue'",
                   "[a0] checkbox 'brill', checked='true'"],
        "aria": ['  - link "dark vimp" [ref=a0]', '- textbox "tolm" [ref=a0]: grue',
                 '- checkbox "brill" [checked] [ref=a0]'],
        "html": ["<a id='a0'>dark vimp</a>", "<input id='a0' name='tolm' value='grue'>",
                 "<input type=checkbox id='a0' checked>brill"],
        "plain": ["[dark vimp]", "[tolm]: grue", "(x) brill"],
        "indexed": ["[a0]<link>dark vimp", "[a0]<textbox>tolm = grue", "[a0]<checkbox>brill (on)"],
    }  # fmt: skip
    base = replace(STYLES["axtree", "call"], quote="'", prefix="a")
    for look, lines in by_look.items():
        style = replace(base, look=look)
        for element, line in zip((link, field, box), lines, strict=True):
            element.ident = "a0"
            assert style._line(element) == line


def test_one_action_in_each_grammar():
    e = Element(BUTTON, "vanch", ident="e7")
    base = replace(
        STYLES["axtree", "call"], by_name=False, quote="'", click="click", type="fill", say="answer", prefix="e"
    )
    expected = {
        "call": ("click('e7')", "fill('e7', 'ab')", "answer('ab')", "answer()"),
        "webarena": ("click [e7]", "fill [e7] [ab]", "answer [ab]", "answer []"),
        "bracket": ("click[e7]", "fill[e7, ab]", "answer[ab]", "answer[]"),
        "words": ("CLICK e7", "FILL ab INTO e7", "answer ab", "answer"),
        "ref": ("click ref=e7", "fill ref=e7 = ab", "answer ab", "answer"),
        "playwright": ('page.getByRole("button", { name: "vanch" }).click()',
                       'page.getByRole("button", { name: "vanch" }).fill("ab")', "answer('ab')", "answer()"),
    }  # fmt: skip
    for grammar, texts in expected.items():
        s = replace(base, grammar=grammar)
        assert (s.press(e), s.enter(e, "ab"), s.tell("ab"), s.tell("")) == texts
    s = replace(base, grammar="json")
    parsed = [json.loads(text) for text in (s.press(e), s.enter(e, "ab"), s.tell("ab"), s.tell(""))]
    assert parsed == [{"action": "click", "index": "e7"}, {"action": "fill", "index": "e7", "text": "ab"},
                      {"action": "answer", "text": "ab"}, {"action": "answer"}]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("lower", "dark vimp 2 kg"),
        ("title", "Dark Vimp 2 Kg"),
        ("sentence", "Dark vimp 2 kg"),
        ("upper", "DARK VIMP 2 KG"),
    ],
)
def test_case_of_a_site(case, text):
    assert replace(STYLES["axtree", "call"], case=case).cased("dark vimp 2 kg") == text


# -- on the pages that are generated -----------------------------------------------------------------------------


def named_once(monkeypatch, seed, n):
    """Of each action on n generated pages that names an element: how often that element stands on the page."""
    drawn = []
    write, press, enter = Style.write, Style.press, Style.enter

    def writing(self, elements, rng):
        text = write(self, elements, rng)
        drawn.append((self, elements, text))
        return text

    named = {}

    def pressing(self, e):
        return named.setdefault(press(self, e), e) and press(self, e)

    def entering(self, e, value):
        return named.setdefault(enter(self, e, value), e) and enter(self, e, value)

    monkeypatch.setattr(Style, "write", writing)
    monkeypatch.setattr(Style, "press", pressing)
    monkeypatch.setattr(Style, "enter", entering)
    drawing = scenes(seed, easy=0.2)
    for _ in range(n):
        named.clear()
        scene = next(drawing)
        style, elements, text = drawn[-1]
        assert text == scene.page
        for act in itertools.chain.from_iterable(q.acts for q in scene.questions):
            if act.text in named:
                e = named[act.text]
                # a cell or a heading may say the same; a click on either is nobody's
                same = [x for x in elements if x.role not in (TEXT, HEADING, CELL)]
                yield sum((x.name == e.name and (style.grammar != "playwright" or x.role == e.role))
                          if style.by_name else x.ident == e.ident for x in same)  # fmt: skip


def test_actions_name_one_element_of_their_page(monkeypatch):
    counts = Counter(named_once(monkeypatch, 7, 300))
    assert counts.keys() == {1}
    assert counts[1] > 2000


def test_texts_keep_to_their_form():
    """No quote or tag of a look stands inside a name, where it would break the line."""
    for scene in islice(scenes(3), 100):
        assert html.unescape(scene.page) == scene.page
        assert not re.search(r"['\"][^'\"\n]*['\"]{2}[^'\"\n]+['\"]", scene.page)
