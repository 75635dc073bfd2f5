"""The pass over everything at once must never miss what the expressions alone would take out."""

import re
from dataclasses import replace

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.store import _typed, redact
from offline_lm.store._prefilter import Prefilter, re2_escape, widen
from offline_lm.store.redact import Redactor, default_patterns
from offline_lm.types import Candidate, Episode, Step

PATTERNS = default_patterns()
SLOW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def redactor(least):
    """One whose prefilter looks at so many characters or more; with fewer every text is looked at closely."""
    made = Redactor.default()
    made.prefilter.least = least
    return made


def found(expression, text):
    return pc.match_substring_regex(pa.array([text]), "(?is)" + expression)[0].as_py()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", PATTERNS)
@SLOW
@given(data=st.data())
def test_a_match_is_found_in_the_text_and_in_its_json(kind, data):
    pattern = re.compile(PATTERNS[kind], re.ASCII)
    text = data.draw(st.text(max_size=5)) + data.draw(st.from_regex(pattern)) + data.draw(st.text(max_size=5))
    widened = widen(PATTERNS[kind])
    assert widened is not None
    if any("\ud800" <= c <= "\udfff" for c in text) or not pattern.search(text):
        return
    assert found(widened, text)
    written = orjson.dumps({"k": [text]}).decode()
    assert found(widened, written) or found(r"\\[/u]", written)


@SLOW
@given(key=st.from_regex(redact._KEY, fullmatch=True), value=st.text(min_size=1, max_size=9))
def test_the_key_of_a_secret_is_found(key, value):
    if redact._is_secret(key) and not any("\ud800" <= c <= "\udfff" for c in key + value):
        step = Step(step=0, observation="page", action="a", extra={"x": [{key: value}]})
        assert redactor(least=0).prefilter([redact._as_text(step)]) == [True]


SECRETS = st.sampled_from([re.compile(regex, re.ASCII) for regex in PATTERNS.values()]).flatmap(st.from_regex)
WORDS = st.sampled_from(
    "password token input_tokens Cookie cookie: eos_token [12] textbox type [12] fill( \\u0070 \\/ \" ' \\ \n \t "
    "basket desk-lamp :// @ [redacted:jwt:3] Authorization secret= hunter2geheim xyzzy99 é 密码 \x1b[0m".split(" ")
)
TEXTS = st.lists(st.one_of(WORDS, WORDS, st.text(max_size=6), SECRETS), max_size=6).map(" ".join)
VALUES = st.recursive(
    st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
EXTRAS = st.dictionaries(TEXTS, VALUES, max_size=3)
MESSAGES = st.one_of(TEXTS, VALUES.map(lambda value: orjson.dumps([{"role": "user", "content": repr(value)}]).decode()))
STEPS = st.builds(
    Step,
    step=st.just(0),
    observation=TEXTS,
    action=st.none() | TEXTS,
    response=st.none() | TEXTS,
    messages=st.none() | MESSAGES,
    url=st.none() | TEXTS,
    action_args=st.none() | EXTRAS,
    sub_actions=st.none() | st.lists(st.one_of(TEXTS, st.just("Cookie")), max_size=2).map(tuple),
    target=st.none() | EXTRAS,
    candidates=st.none()
    | st.lists(st.builds(Candidate, action=TEXTS, response=st.none() | TEXTS), max_size=2).map(tuple),
    prompt_token_ids=st.none() | st.just((1, 2)),
    extra=st.none() | EXTRAS,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(steps=st.lists(STEPS, min_size=1, max_size=3), goal=st.none() | TEXTS, extra=EXTRAS)
def test_episodes_are_redacted_as_without_it(steps, goal, extra):
    numbered = tuple(replace(step, step=i) for i, step in enumerate(steps))
    episode = Episode(source="s", native_id="n", goal=goal, extra=extra, steps=numbered)
    fast, plain = redactor(least=0), redactor(least=10**9)
    assert repr(fast.episodes([episode, episode])) == repr([plain.episode(episode), plain.episode(episode)])
    assert fast.counts == plain.counts


@pytest.mark.parametrize("pattern", [_typed._CALL, _typed._BRACKETS, _typed._BARE, _typed._ARROW])
@SLOW
@given(data=st.data())
def test_what_types_has_a_verb_of_typing(pattern, data):
    assert _typed._SOME_VERB.search(data.draw(st.from_regex(pattern)))


def test_most_texts_are_not_looked_at_closely():
    page = "[1] link 'Cookie settings'\n[2] button 'Add desk-lamp to basket'\n[3] link 'Sign in' https://a.b/c?d=e"
    step = Step(step=0, observation=page, action="click[1]", extra={"input_tokens": 5, "tokenizer": "t", "cookies": 1})
    assert redactor(least=0).prefilter([redact._as_text(replace(step, extra={"input_tokens": 5})), "x"]) == [False] * 2
    assert redactor(least=0).prefilter([redact._as_text(step)]) == [True]


def test_an_expression_that_cannot_be_widened_looks_at_everything():
    assert widen(r"(?<=x)(?:a|b)?") is None
    assert widen(r"(a)b\1c") == "(?:a)b"
    assert Prefilter([r"(?=secret)"], (), least=0)(["a", "b"]) == [True, True]


def test_the_strict_patterns_can_be_widened():
    from omegaconf import OmegaConf

    from offline_lm import paths

    strict = OmegaConf.load(paths.CONF / "redact" / "strict.yaml").patterns
    prefilter = Prefilter(strict.values(), (), least=0)
    assert prefilter(["write to a.b@example.org", "call +49 (30) 1234 5678", "4111 1111 1111 1111", "buy 2 mugs"]) == [
        True, True, True, False
    ]  # fmt: skip


def test_what_re2_does_not_take_looks_at_everything():
    assert widen("(?:(?:(?:a{90}b){90}c){90}d){90}") is None
    assert Prefilter([], (), ["("], least=0)(["a", "b"]) == [True, True]
    assert Prefilter(["b"], (), least=0)(["a", "b", "\ud800"]) == [True, True, True]


def test_few_characters_are_looked_at_closely():
    prefilter = Prefilter(["b"], (), least=3)
    assert prefilter(["a", "c"]) == [True, True]
    assert prefilter(["ab", "c"]) == [True, False]


def test_letters_are_taken_as_they_are_by_the_class_of_what_is_not_meant():
    assert found(widen("x[^a]y") or "", "xAy")
    assert not found(widen("x[^a]y") or "", "xay")
    assert found(re2_escape("a.b"), "A.b")
    assert not found(re2_escape("a.b"), "axb")


def test_a_secret_beyond_64_bits_is_hidden_too():
    step = Step(step=0, observation="page", extra={"password": 2**70, "token": [2**80], "basket": 3})
    (hidden,) = redactor(least=0).episodes([Episode(source="s", native_id="n", steps=(step,))])
    assert hidden.steps[0].extra is not None
    assert str(2**70) not in repr(hidden)
    assert str(2**80) not in repr(hidden)
    assert hidden.steps[0].extra["basket"] == 3
