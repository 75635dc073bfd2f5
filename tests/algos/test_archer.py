"""ArCHer: its critic finds the values of the actor, not of the logs; its actor's loss by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from offline_lm.algos.archer import Archer, ArcherCritic
from offline_lm.envs import random_mdp
from offline_lm.ope.fixed_points import GAMMA, trained, windows
from offline_lm.types import Logged, Responses

torch.set_num_threads(1)
CRITIC = ArcherCritic(GAMMA, 1.0)


@pytest.mark.parametrize("own", [True, False], ids=["another policy", "the behaviour"])
def test_the_critic_is_the_value_of_the_actor_whoever_made_the_logs(own):
    """On tables, against the linear system of that policy (`TextMDP.evaluate`)."""
    tasks = [random_mdp.task(7, n, states=4, branching=1, ends=0.2) for n in range(2)]
    data = windows(tasks, 0)
    policies = np.random.default_rng(3).dirichlet(np.ones(3), (2, 4)) if own else data.policy
    of_rows = policies.reshape(8, 3)[data.batch.states[:, 0].long().numpy()]
    batch = replace(data.batch, candidate_weight=torch.from_numpy(of_rows.ravel()))
    v, q = trained(CRITIC, batch, 8, 24)
    for task, pi, mu, v_found, q_found in zip(
        tasks, policies, data.policy, v.reshape(2, 4), q.reshape(2, 4, 3), strict=True
    ):
        v_true, q_true = task.evaluate(pi, GAMMA)
        np.testing.assert_allclose(v_found, v_true, atol=1e-4)
        np.testing.assert_allclose(q_found, q_true, atol=1e-4)
        assert (abs(task.evaluate(mu, GAMMA)[0] - v_true).max() > 0.05) == own


def test_a_critic_without_an_actor_is_refused():
    data = windows([random_mdp.task(7, 0, states=4, branching=1, ends=0.2)], 0)
    with pytest.raises(ValueError, match="the actor's probabilities"):
        trained(CRITIC, data.batch, 4, 12)


def f64(*x):
    return torch.tensor(x, dtype=torch.float64)


ALGO = Archer(0.9, CRITIC, critic_warmup=0.5, samples=2)


def responses(**changes):
    """Two states with two and three responses, of 2, 1, 1, 1, 1 tokens; the second state was drawn twice as often."""
    return replace(
        Responses(
            logprobs=f64(-1, -1, -2, -1, -1, -2).requires_grad_(), owner=torch.tensor([0, 0, 1, 2, 3, 4]),
            weight=f64(0.2, 0.2, 0.2, 0.4, 0.4, 0.4), advantages=f64(1, -1, 2, 0, -3),
            state=torch.tensor([0, 0, 1, 1, 1]), old=torch.zeros(6), reference=torch.zeros(6),
        ),
        **changes,
    )  # fmt: skip


def test_the_loss_is_minus_the_expected_advantage_by_hand():
    (loss,) = ALGO.loss(responses()).values()
    e = math.exp(-1)
    # state 0: -2 against -2, so halves, which cancel; state 1: 1, 1 and e in 2 + e
    assert loss.item() == pytest.approx(-0.4 * (2 - 3 * e) / (2 + e))
    # responses that were drawn: the first twice, the third never
    (loss,) = ALGO.loss(responses(proposal=f64(0, 0, math.log(2) + 1, 1, -math.inf))).values()
    assert loss.item() == pytest.approx(-0.4 * 4 / 3)


def test_the_gradient_makes_better_actions_likelier_and_ignores_v():
    gradients = []
    for v in (0.0, 5.0):
        batch = responses(advantages=f64(1, -1, 2, 0, -3) - v)
        (loss,) = ALGO.loss(batch).values()
        gradients.append(torch.autograd.grad(loss, batch.logprobs)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0][0] == gradients[0][1] < 0 < gradients[0][2]  # down the loss, up the first response
    assert gradients[0][3] < 0 < gradients[0][5]


def test_parts_add_up_to_the_whole():
    whole = responses()
    first = responses(
        logprobs=whole.logprobs[:3], owner=whole.owner[:3], weight=whole.weight[:3], advantages=whole.advantages[:2],
        state=whole.state[:2],
    )  # fmt: skip
    second = responses(
        logprobs=whole.logprobs[3:], owner=whole.owner[3:] - 2, weight=whole.weight[3:],
        advantages=whole.advantages[2:], state=whole.state[2:] - 1,
    )  # fmt: skip
    parts = sum(ALGO.loss(part)["actor"] for part in (first, second))
    torch.testing.assert_close(parts, ALGO.loss(whole)["actor"])


def test_advantages_are_q_minus_v_of_every_known_response():
    some = torch.zeros(2)
    logged = Logged(
        offsets=torch.tensor([0, 2]), reward=some, continues=some, returns=some, acted=some.bool(),
        bootstrap_mask=some.bool(), v=f64(0.5, 1), q=some, outcome=some[:1], task=some[:1].long(), page=some.long(),
        response_q=f64(1, 0, math.nan), response_of=torch.tensor([0, 0, 1]),
    )  # fmt: skip
    torch.testing.assert_close(ALGO.advantages(logged)[0], f64(0.5, -0.5, math.nan), equal_nan=True)


@pytest.mark.parametrize(("wrong", "told"), [({"samples": 0}, "samples=0"), ({"critic_warmup": 2}, "critic_warmup=2")])
def test_settings_are_checked(wrong, told):
    with pytest.raises(ValueError, match=told):
        replace(ALGO, **wrong)
