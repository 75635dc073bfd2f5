"""Best of n: what is asked, what is chosen, what is logged."""

import numpy as np

from offline_lm.envs.policies import State
from offline_lm.envs.written import Judge, Proposal, Sample, Written

ACTIONS = ("a", "b", "c")


class Told:
    """Gives these answers to every state, with log-probabilities -1, -2 ..."""

    name, model, sampling = "told", "told@0", {"temperature": 1.0}

    def __init__(self, *answers):
        self.answers = answers

    def propose(self, states, n):
        assert n == len(self.answers)
        samples = [
            Sample(text, -float(i), {"response_logprobs": (-float(i),)}) for i, text in enumerate(self.answers, 1)
        ]
        return [Proposal(samples, {"prompt_token_ids": (len(s.goal),)}, (7, n)) for s in states]


def states(n=1):
    return [State("goal" * i, "page", ACTIONS, np.random.default_rng(0), grammar="exact") for i in range(1, n + 1)]


def judging(**q):
    asked = []

    def values(given):
        asked.append(list(given))
        return [np.array([q[a] for a in s["candidates"]]) for s in asked[-1]]

    return Judge("critic", "critic@1", "actions", values), asked


def test_one_answer_is_done_and_its_probability_is_that_of_drawing_it():
    (choice,) = Written(Told("b")).act(states())
    assert (choice.action, choice.logprob, choice.complete, choice.tokens) == ("b", -1.0, False, (7, 1))
    assert [(c.action, c.source, c.executed, c.logprob) for c in choice.candidates] == [
        ("b", "sampled", True, -1.0), ("a", "enumerated", False, None), ("c", "enumerated", False, None),
    ]  # fmt: skip
    assert choice.logged == {"response": "b", "prompt_token_ids": (4,), "response_logprobs": (-1.0,)}
    policy = Written(Told("b"))
    assert (policy.policy_id, policy.kind, policy.model) == ("told", "llm", "told@0")
    assert policy.sampling == {"over": "tokens", "n": 1, "temperature": 1.0}


def test_a_critic_chooses_among_the_different_actions_that_can_be_read_all_pages_in_one_call():
    judge, asked = judging(a=0.2, b=0.9)
    policy = Written(Told("a", "nonsense", "I say:\nb", "b", "a"), 5, judge)
    one, two = policy.act(states(2))
    assert [[s["candidates"] for s in call] for call in asked] == [[["a", "b"], ["a", "b"]]]
    assert [s["goal"] for s in asked[0]] == ["goal", "goalgoal"]
    assert (one.action, two.action, one.logprob) == ("b", "b", None)
    assert [(c.response, c.action, c.score, c.logprob, c.executed) for c in one.candidates] == [
        ("a", "a", 0.2, -1.0, False),
        ("nonsense", "nonsense", None, -2.0, False),
        ("I say:\nb", "b", 0.9, -3.0, True),
        ("b", "b", 0.9, -4.0, False),
        (None, "c", None, None, False),
    ]
    assert one.logged["response"] == "I say:\nb"
    assert one.logged["response_logprobs"] == (-3.0,)
    assert (policy.policy_id, policy.kind) == ("told-best5-critic", "search")
    assert policy.sampling == {"over": "tokens", "n": 5, "temperature": 1.0, "critic": "critic@1"}


def test_where_nothing_can_be_read_the_first_answer_is_the_error():
    judge, asked = judging()
    (choice,) = Written(Told("x", "y"), 2, judge).act(states())
    assert asked == []
    assert (choice.action, choice.candidates[0].executed) == ("x", True)
    assert [c.action for c in choice.candidates] == ["x", "y", *ACTIONS]


def test_an_executed_action_is_one_candidate_whatever_was_said_twice():
    judge, _ = judging(a=1.0)
    (choice,) = Written(Told("x", "a", "a"), 3, judge).act(states())
    assert [(c.response, c.executed) for c in choice.candidates[:2]] == [("x", False), ("a", True)]
    assert sum(bool(c.executed) for c in choice.candidates) == 1
