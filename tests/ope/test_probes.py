"""Probes: pages whose answers another parser finds again, words that stay apart, and what a linear probe learns."""

import math
import re

import numpy as np
import pytest
import torch

from offline_lm.models import backbone
from offline_lm.models.critic import Critic
from offline_lm.models.heads import Heads
from offline_lm.ope import probes
from offline_lm.ope.probe_pages import FIELDS, ORDINALS, PROBES, STYLES, Question, Split, draw
from offline_lm.ope.probe_words import Words, split

SPLITS = draw(0, 60, 40)
COLOURS, MAKES, NOUNS = (set().union(*slot) for slot in zip(*(words.slots() for words in split(0)), strict=True))


# -- a page read back ----------------------------------------------------------------------------------------------


def rows_of(question):
    """(id, name, {field: value}) of every item, from the page's text alone."""
    text = question.observation
    if question.style == "plain":
        _, *lines = [line.split(" | ") for line in text.splitlines()]
        _, *fields = lines.pop(0) if lines[0][0] == "name" else [""]
        return [(None, name, dict(zip(fields, map(int, cells), strict=True))) for name, *cells in lines]
    item, cell = {
        "axtree": (r"\[(\d+)\] (?:link|button) '(.+)', clickable", r"StaticText '(\w+): (\d+)'"),
        "aria": (r"- ()(?:link|button) \"(.+)\"", r"- text: (\w+) (\d+)"),
        "html": (r"<(?:a|button) id=(\d+)>(.+)</(?:a|button)>", r"<span class=(\w+)>(\d+)</span>"),
    }[question.style]
    found = list(re.finditer(item, text))
    ends = [*(m.start() for m in found[1:]), len(text)]
    cells = [re.findall(cell, text[m.end() : end]) for m, end in zip(found, ends, strict=True)]
    return [(m[1], m[2], {f: int(v) for f, v in own}) for m, own in zip(found, cells, strict=True)]


def groups(pattern, text):
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return found.groups()


def clicked(question, action):
    """Number of the row that an action clicks."""
    ids, names, _ = zip(*rows_of(question), strict=True)
    if question.style in ("axtree", "html"):
        return ids.index(*groups(r"^click\((?:'|id=)(\d+)'?\)$", action))
    pattern = r"^click\[(.+)\]$" if question.style == "plain" else r"^getByRole\('\w+', { name: '(.+)' }\)\.click\(\)$"
    return names.index(*groups(pattern, action))


def said(action):
    return int(*groups(r"^\D+(\d+)\D*$", action))


def words_in(text):
    return set(re.findall(r"\w+", text)) & (COLOURS | MAKES | NOUNS)


def is_right(probe, question, action):
    """Whether this action (None: yes) is what the goal asks for."""
    rows, goal = rows_of(question), question.goal
    names = [name for _, name, _ in rows]
    if probe == "match":
        return words_in(goal) in [words_in(name) for name in names]
    if probe == "match_action":
        return words_in(goal) == words_in(names[clicked(question, action)])
    if probe == "lookup":
        field, of = groups(r"^(?:What is|Tell me) the (\w+) of the (.+)[.?]$", goal)
        row = names.index(of) if of in names else ORDINALS.index(of.removesuffix(" item"))
        return said(action) == rows[row][2][field]
    if probe == "compare":
        chosen = clicked(question, action)
        asked = [names.index(name) for name in groups(r"the (\w+ \w+) (?:and|or) the (\w+ \w+)", goal)]
        assert chosen in asked
        (other,) = set(asked) - {chosen}
        (field,) = set(re.findall(r"\w+", goal)) & set(FIELDS)
        value, against = rows[chosen][2][field], rows[other][2][field]
        if limit := re.search(r"(under|over) (\d+)\.$", goal):
            against = int(limit[2])
        return value < against if re.search("lower|under", goal) else value > against
    if probe == "negate":
        chosen = words_in(names[clicked(question, action)])
        colour, kind = words_in(goal) & COLOURS, words_in(goal) & NOUNS
        assert kind < chosen
        return (colour < chosen) != bool(re.search(r"\bnot\b|isn't|\bno\b", goal))
    if probe == "count":
        return said(action) == sum(words_in(goal) < words_in(name) for name in names)
    way, of = groups(r"^Open the item right (before|after) the (.+)\.$", goal)
    return clicked(question, action) == names.index(of) + {"before": -1, "after": 1}[way]


@pytest.mark.parametrize("probe", PROBES)
def test_the_right_answer_is_right_and_no_other(probe):
    questions = [q for part in SPLITS[probe].parts() for q in part]
    assert {q.style for q in questions} == set(STYLES)
    for question in questions:
        if probe == "match":
            assert is_right(probe, question, None) == question.right, question
        else:
            right = [is_right(probe, question, action) for action in question.candidates]
            assert right == [i == question.right for i in range(len(right))], question


@pytest.mark.parametrize("probe", PROBES)
def test_neither_page_nor_action_is_right_by_itself(probe):
    """Goals of one page differ in their answers, so that a score that ignores the goal is worth chance."""
    pages = {}
    for question in SPLITS[probe].test:
        pages.setdefault(question.observation, []).append(question)
    for questions in pages.values():
        rights = [q.right for q in questions]
        if probe == "match":
            assert sorted(rights) == [0, 0, 1, 1]
        else:
            assert len(set(rights)) == len(rights) == 2
            assert questions[0].candidates == questions[1].candidates


def test_no_word_and_no_number_is_in_two_parts():
    for probe, parts in SPLITS.items():
        seen = []
        for part in parts.parts():
            text = " ".join(" ".join([q.goal, q.observation, *q.candidates]) for q in part)
            seen.append(words_in(text) | {n for n in re.findall(r"\d+", text) if len(n) > 1})
        assert all(len(s) > 20 for s in seen), probe
        assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2], probe


def test_words_are_new_for_another_seed_and_the_same_again_for_this_one():
    assert split(0) == split(0)
    assert split(0)[2].nouns != split(1)[2].nouns
    assert len(COLOURS & MAKES | MAKES & NOUNS | COLOURS & NOUNS) == 0
    assert draw(0, 60, 40) == SPLITS


def test_what_is_not_there_differs_in_one_word():
    absent_words = 0
    no = [q for q in SPLITS["match"].fit if not q.right]
    for question in no:
        asked = words_in(question.goal)
        assert max(len(asked & words_in(name)) for _, name, _ in rows_of(question)) == 2
        absent_words += not asked <= words_in(question.observation)
    assert 0 < absent_words < 0.4 * len(no)


# -- the linear probe ----------------------------------------------------------------------------------------------


def test_logistic_regression_by_hand():
    """Of four rows at -1 one is right, of four at 1 three are: without L2 the log-odds are -ln 3 and ln 3."""
    x, y = np.repeat([[-1.0], [1.0]], 4, axis=0), np.array([1, 0, 0, 0, 1, 1, 1, 0])
    assert probes.fit(x, y, 0.0).score(np.array([[1.0], [-1.0]])) == pytest.approx(
        [math.log(3), -math.log(3)], abs=1e-3
    )
    # features are standardised: another unit and a constant beside change nothing
    moved = np.hstack([5 + 100 * x, np.full((8, 1), 7.0)])
    assert probes.fit(moved, y, 0.0).score(np.array([[105.0, 8.0]])) == pytest.approx([math.log(3)], abs=1e-3)
    # with L2 the gradient is sigmoid(w) - 3/4 + l2 w = 0: w = ln 3 / 2 at the l2 for which that holds
    w = math.log(3) / 2
    l2 = (0.75 - 1 / (1 + math.exp(-w))) / w
    assert probes.fit(x, y, l2).score(np.array([[1.0]])) == pytest.approx([w], abs=1e-3)


def _yes_no(y):
    return [Question("plain", "", "", (), int(label)) for label in y]


def test_a_linear_truth_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20)
    x = [rng.normal(size=(n, 20)) for n in (600, 200, 1000)]
    y = [part @ truth > 0 for part in x]
    found = probes.measure(Split(*map(_yes_no, y)), x)
    assert found.pairwise.mean() > 0.97
    assert found.sensitivity is None
    noise = [rng.integers(2, size=len(part)) for part in x]
    assert abs(probes.measure(Split(*map(_yes_no, noise)), x).pairwise.mean() - 0.5) < 4 * 0.5 / 1000**0.5


def test_regularisation_is_chosen_on_the_second_part():
    """30 rows of 200 features, one of which tells: little of the noise is kept."""
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(n, 200)) for n in (30, 500, 1000)]
    y = [(part[:, 0] > 0).astype(float) for part in x]
    losses = {
        l2: np.logaddexp(0, np.where(y[1] > 0, -1, 1) * probes.fit(x[0], y[0], l2).score(x[1])).mean()
        for l2 in probes.STRENGTHS
    }
    best = min(losses, key=lambda l2: losses[l2])
    assert best > probes.STRENGTHS[0]
    both = probes.fit(np.concatenate(x[:2]), np.concatenate(y[:2]), best)
    assert probes.train(x, y).score(x[2]) == pytest.approx(both.score(x[2]))


def test_scores_are_judged_within_a_question():
    """By hand: [3, 1, 2, 4] with the first right beats 2 of 3; [1, 1, 0, 0] with the second right ties for the top."""
    ask = [Question("plain", "", "", tuple("abcd"), right) for right in (0, 1)]
    found = probes.judge(ask, np.array([3.0, 1, 2, 4, 1, 1, 0, 0]))
    assert found.pairwise == pytest.approx([2 / 3, 2.5 / 3])
    assert found.hit == pytest.approx([0, 0.5])
    # variances within are 1.25 and 0.25, the right ones' scores are 3 and 1: their variance is 1
    assert found.sensitivity == pytest.approx(0.75)
    assert probes.labels(ask).tolist() == [1, 0, 0, 0, 0, 1, 0, 0]
    yes_no = probes.judge(_yes_no([1, 1, 0]), np.array([2.0, -1.0, -3.0]))
    assert yes_no.pairwise.tolist() == yes_no.hit.tolist() == [1, 0, 1]


def test_a_score_of_states_alone_has_no_sensitivity():
    ask = [Question("plain", "", "", tuple("ab"), 0)] * 2
    found = probes.judge(ask, np.array([1.0, 1, 5, 5]))
    assert found.sensitivity == 0
    assert found.pairwise.tolist() == found.hit.tolist() == [0.5, 0.5]


# -- features ------------------------------------------------------------------------------------------------------


def test_counting_words_does_not_answer_what_asks_for_reading():
    splits = draw(1, 200, 100)
    found = {name: probes.measure(splits[name], x) for name, x in probes.bag_of_words(splits).items()}
    assert 0.5 <= found["match"].pairwise.mean() < 0.8
    for name in ("lookup", "compare", "negate", "count", "order"):
        assert found[name].pairwise.mean() == pytest.approx(0.5, abs=0.02), name
    # an action that names its item, itself or by the line of its number, is found by counting
    by_style = {style: found["match_action"].pairwise[found["match_action"].styles == style].mean() for style in STYLES}
    assert min(by_style.values()) > 0.95


def test_overlap_counts_by_hand():
    question = Question("plain", "Find the red mug", "red mug\nblue red mug", ("click[red mug]",), 0)
    split_ = Split([question], [question], [question])
    (row,) = probes.bag_of_words({"match_action": split_})["match_action"][0].tolist()
    # shared words, their occurrences, shared pairs, their occurrences: action in goal, action in page, goal in page
    assert row == [2, 2, 1, 1, 2, 4, 1, 2, 2, 4, 1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def small():
    torch.set_num_threads(1)
    splits = draw(0, 10, 4)
    return splits, *backbone.tiny(probes.texts(splits), vocab_size=400, width=16, layers=2, heads=2)


def test_features_are_those_that_a_critic_reads(small, tmp_path):
    """Heads on them say of every question what a critic with these heads says."""
    splits, model, tokenizer = small
    heads = Heads(16, hidden=8)
    critic = Critic(model, tokenizer, heads, {"max_tokens": 1024, "history": 4, "grounding": True, "has_q": True})
    found = probes.encode(model, tokenizer, splits, tmp_path)
    for name, parts in splits.items():
        for part, x in zip(parts.parts(), found[name], strict=True):
            states = [{"goal": q.goal, "observation": q.observation, "candidates": list(q.candidates)} for q in part]
            features = torch.from_numpy(x)
            with torch.no_grad():
                own = heads.values(features) if name == "match" else heads.q_values(features).amin(dim=0)
            said = [number for s in critic.score(states) for number in ([s.v] if name == "match" else s.q or [])]
            assert own.numpy() == pytest.approx(said, abs=1e-5), name


def test_a_tokenizer_is_not_shown_the_test(small):
    shown = set(probes.texts(small[0]))
    assert all(question.observation not in shown for parts in small[0].values() for question in parts.test)


def test_words_are_those_of_the_page():
    """A page of two letters' words: nothing else is drawn from."""
    words = Words(
        ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"),
        ("m1", "m2", "m3"),
        tuple(f"n{i}" for i in range(9)),
        tuple(range(700, 760)),
    )
    for ask in PROBES.values():
        for question in ask(words, "axtree", np.random.default_rng(0)):
            assert not words_in(question.goal + question.observation)
            assert all(700 <= int(n) < 760 for n in re.findall(r"\b\d\d+\b", question.observation))
