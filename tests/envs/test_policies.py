"""What a policy logs is what it drew from."""

import math

import numpy as np
import pytest

from offline_lm.envs import scripted
from offline_lm.envs.policies import Chooser, State, draw, greedy, mix, uniform

ACTIONS: tuple[str, ...] = ("a", "b", "c", "d")


def state(step: int = 0, **options) -> State:
    return State("goal", "page", ACTIONS, np.random.default_rng([7, 3, step]), **options)


def first(states):
    return [(np.eye(len(s.actions))[0], None) for s in states]


def test_mixture_by_hand():
    np.testing.assert_allclose(mix(np.array([1.0, 0, 0, 0]), 0.2), [0.85, 0.05, 0.05, 0.05])
    choice = Chooser("first", first, 0.2).act([state()])[0]
    logged = {c.action: c.logprob for c in choice.candidates}
    assert logged == pytest.approx({"a": math.log(0.85), "b": math.log(0.05), "c": math.log(0.05), "d": math.log(0.05)})
    assert [c.action for c in choice.candidates if c.executed] == [choice.action]
    assert choice.logprob == logged[choice.action]
    assert choice.complete


def test_what_cannot_be_done_has_no_log_probability():
    choice = Chooser("first", first).act([state()])[0]
    assert [c.logprob for c in choice.candidates] == [0.0, None, None, None]
    assert (choice.action, choice.logprob) == ("a", 0.0)


def test_draws_as_often_as_it_says():
    counts = dict.fromkeys(ACTIONS, 0)
    policy = Chooser("first", first, 0.4)
    for choice in policy.act([state(step) for step in range(4000)]):
        counts[choice.action] += 1
    expected = {"a": 0.7, "b": 0.1, "c": 0.1, "d": 0.1}
    for action, share in expected.items():
        assert abs(counts[action] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_a_draw_depends_on_nothing_but_its_own_seed():
    alone = [Chooser("random", uniform).act([state(step)])[0].action for step in range(20)]
    together = [c.action for c in Chooser("random", uniform).act([state(step) for step in reversed(range(20))])]
    assert alone == together[::-1]
    assert len(set(alone)) > 1


def test_names_tell_the_mixture():
    assert Chooser("scripted", uniform, 0.3).policy_id == "scripted-eps0.3"
    assert Chooser("random", uniform).policy_id == "random"


def test_greedy_and_softmax():
    np.testing.assert_array_equal(greedy([0.1, 0.9, 0.9], 0), [0, 1, 0])
    e = math.exp(-0.8 / 0.5)
    np.testing.assert_allclose(greedy([0.1, 0.9], 0.5), [e / (1 + e), 1 / (1 + e)])
    choice = draw(state(), greedy([4.0, 1, 2, 3], 0), [4.0, 1, 2, 3])
    assert [c.score for c in choice.candidates] == [4.0, 1, 2, 3]


# -- rules read pages ------------------------------------------------------------------------------------------

LOGIN = """- text: Username
- textbox [ref=e1]: {user}
- text: Password
- textbox [ref=e2]: {word}
- button "Login" [ref=e3]"""


def rule(task: str, goal: str, page: str, history=()):
    scene = scripted.Scene(State(goal, page, (), np.random.default_rng(0), None, history, task))
    return scripted.RULES[task](scene)


@pytest.mark.parametrize(
    ("user", "word", "action"),
    [("", "", "fill('e1', 'vina')"), ("vina", "", "fill('e2', 'US')"), ("vina", "US", "click('e3')")],
)
def test_a_rule_goes_on_from_what_it_sees(user, word, action):
    goal = 'Enter the username "vina" and the password "US" into the text fields and press login.'
    page = LOGIN.format(user=user, word=word).replace("]: \n", "]\n")
    assert rule("login-user", goal, page) == action


def test_boxes_that_are_wrongly_set_are_unset():
    page = '- checkbox "ab" [checked] [ref=e1]\n- checkbox "Cd" [ref=e2]\n- button "Submit" [ref=e3]'
    assert rule("click-checkboxes", "Select Cd and click Submit.", page) == "click('e1')"
    page = page.replace(" [checked]", "")
    assert rule("click-checkboxes", "Select Cd and click Submit.", page) == "click('e2')"
    assert rule("click-checkboxes", "Select nothing and click Submit.", page) == "click('e3')"


def test_names_match_by_case_first():
    page = '- generic "eget" [ref=e1]\n- generic "Eget" [ref=e2]'
    assert rule("click-link", 'Click on the link "Eget".', page) == "click('e2')"
    assert rule("click-link", 'Click on the link "EGET".', page) == "click('e1')"


def test_quotes_and_brackets_in_a_name():
    page = '- button "say \\"x [ref=e9]\\"" [ref=e1]\n- button "x" [ref=e2]'
    assert rule("click-button", 'Click on the "x" button.', page) == "click('e2')"


def test_a_task_without_a_rule_takes_any_action():
    p, scores = scripted.probabilities([state(task="no-such-task")])[0]
    np.testing.assert_allclose(p, 0.25)
    assert scores is None
