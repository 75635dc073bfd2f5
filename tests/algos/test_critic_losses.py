"""The critics' losses on numbers worked out by hand, in float64; and IQL on a chain with a known fixed point."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from offline_lm.algos.critic_mc import CriticMC
from offline_lm.algos.iql_lm import IQL
from offline_lm.algos.q_mc import QMC
from offline_lm.models.heads import Head, Heads, polyak
from offline_lm.types import Batch

torch.set_num_threads(1)


class Linear(Head):
    """k linear values in place of networks, so that a feature is read with a known weight."""

    def __init__(self, weight):
        nn.Module.__init__(self)
        self.support = None
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.k = len(weight)

    def forward(self, features):
        return self.weight @ features.T


class Critic(Heads):
    def __init__(self, v, q):
        nn.Module.__init__(self)
        self.v, self.q = Linear(v), Linear(q)


def tensor(*x):
    return torch.tensor(x, dtype=torch.float64)


def batch(**changes):
    """Two episodes: three steps that end in a reward, and two that were cut without a final observation."""
    states, actions = tensor(1, 2, 3, 4, 5)[:, None], tensor(1, 1, 2, 2, 3)[:, None]
    values = dict(
        states=states, actions=actions, target_states=10 * states, target_actions=10 * actions,
        offsets=torch.tensor([0, 3, 5]), reward=tensor(0, 0.5, 1, 0, 0), continues=tensor(1, 1, 0, 1, 1),
        returns=tensor(0.5, 1, 1, 7, 7), acted=torch.tensor([True] * 5),
        return_mask=torch.tensor([True, True, True, False, False]),
        bootstrap_mask=torch.tensor([True, True, True, True, False]),
    )  # fmt: skip
    return Batch(**{**values, **changes})


ONLINE = Critic([[0.1]], [[0.2], [0.3]])
TARGET = Critic([[0.01]], [[0.02], [0.015]])


def test_q_mc():
    got = QMC(gamma=0.5, polyak=0.0).loss(ONLINE, TARGET, batch())
    v = [0.1, 0.2, 0.3]
    assert got["v"].item() == pytest.approx(np.mean([(a - g) ** 2 for a, g in zip(v, (0.5, 1, 1), strict=True)]))
    q = [[0.2, 0.2, 0.4], [0.3, 0.3, 0.6]]
    assert got["q"].item() == pytest.approx(
        sum(np.mean([(a - g) ** 2 for a, g in zip(m, (0.5, 1, 1), strict=True)]) for m in q)
    )
    assert set(got) == {"v", "q"}


def test_critic_mc_is_half_the_squared_error_and_leaves_q_alone():
    got = CriticMC(gamma=0.5, polyak=0.0).loss(ONLINE, TARGET, batch())
    assert got["v"].item() == pytest.approx(0.5 * np.mean([0.4**2, 0.8**2, 0.7**2]))
    assert set(got) == {"v"}
    assert CriticMC.trains_q is False


def test_iql():
    got = IQL(gamma=0.5, tau=0.9, polyak=0.0).loss(ONLINE, TARGET, batch())
    # V to the least of the target's Q: 0.15, 0.15, 0.3, 0.3 against 0.1, 0.2, 0.3, 0.4
    assert got["v"].item() == pytest.approx((0.9 * 0.05**2 + 0.1 * 0.05**2 + 0 + 0.1 * 0.1**2) / 4)
    # Q to r + 0.5 continue V_target(s'): the third step is the end; the last step of all has no target
    y = [0 + 0.5 * 0.2, 0.5 + 0.5 * 0.3, 1, 0 + 0.5 * 0.5]
    q = [[0.2, 0.2, 0.4, 0.4], [0.3, 0.3, 0.6, 0.6]]
    assert got["q"].item() == pytest.approx(sum(np.mean([(a - b) ** 2 for a, b in zip(m, y, strict=True)]) for m in q))


@pytest.mark.parametrize(
    "algo", [IQL(gamma=0.5, tau=0.9, polyak=0.0), QMC(gamma=0.5, polyak=0.0), CriticMC(gamma=0.5, polyak=0.0)]
)
def test_what_was_not_logged_reaches_no_loss_and_no_gradient(algo):
    known = algo.loss(ONLINE, TARGET, batch())
    hidden = batch()
    hidden.returns[3:] = float("nan")
    hidden.reward[4] = float("nan")
    got = algo.loss(ONLINE, TARGET, hidden)
    assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in known.items()}
    ONLINE.zero_grad()
    torch.stack(list(got.values())).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ONLINE.parameters())
    assert all(p.grad is None for p in TARGET.parameters())


@pytest.mark.parametrize(
    "algo", [IQL(gamma=0.5, tau=0.9, polyak=0.0), QMC(gamma=0.5, polyak=0.0), CriticMC(gamma=0.5, polyak=0.0)]
)
def test_steps_without_an_action_do_not_count(algo):
    one = batch(acted=torch.tensor([True, False, False, False, False]))
    got = algo.loss(ONLINE, TARGET, one)
    want = {"v": 0.9 * 0.05**2, "q": 0.1**2 + 0.2**2} if isinstance(algo, IQL) else {"v": 0.4**2, "q": 0.3**2 + 0.2**2}
    if isinstance(algo, CriticMC):
        want = {"v": 0.5 * 0.4**2}
    assert {k: v.item() for k, v in got.items()} == pytest.approx(want)


# -- a chain ---------------------------------------------------------------------------------------------------

LENGTH, GAMMA, TAU = 4, 0.9, 0.8


def fixed_point():
    """V and Q of IQL: "forward" (0.6 of the time) moves on, the last one pays 1; "quit" ends and pays 0.1."""
    v = np.zeros(LENGTH + 1)
    for _ in range(200):
        forward = np.array([(1.0 if s == LENGTH - 1 else GAMMA * v[s + 1]) for s in range(LENGTH)])
        for s in range(LENGTH):
            # V = sum w q / sum w with w = p * (tau above V, 1 - tau below), iterated
            for _ in range(50):
                w_f = 0.6 * (TAU if forward[s] > v[s] else 1 - TAU)
                w_q = 0.4 * (TAU if v[s] < 0.1 else 1 - TAU)
                v[s] = (w_f * forward[s] + w_q * 0.1) / (w_f + w_q)
    return v[:LENGTH], forward


def chain_log(episodes=4000):
    rng = np.random.default_rng(0)
    state, action, reward, ends, offsets = [], [], [], [], [0]
    for _ in range(episodes):
        for s in range(LENGTH):
            forward = rng.random() < 0.6
            last = s == LENGTH - 1
            state.append(s)
            action.append(2 * s + forward)
            reward.append(1.0 if last and forward else 0.0 if forward else 0.1)
            ends.append(last or not forward)
            if ends[-1]:
                break
        offsets.append(len(state))
    states, actions = (torch.eye(n, dtype=torch.float64)[x] for n, x in ((LENGTH, state), (2 * LENGTH, action)))
    mask = torch.ones(len(state), dtype=torch.bool)
    return Batch(
        states,
        actions,
        states,
        actions,
        torch.tensor(offsets),
        tensor(*reward),
        1 - tensor(*ends),
        tensor(*reward),
        mask,
        mask,
        mask,
    )


def test_iql_finds_the_expectile_of_the_chain():
    data = chain_log()
    critic = Critic(np.zeros((1, LENGTH)), np.random.default_rng(1).normal(size=(2, 2 * LENGTH)))
    target = copy.deepcopy(critic)
    algo = IQL(gamma=GAMMA, tau=TAU, polyak=0.1)
    optimizer = torch.optim.Adam(critic.parameters(), 0.02)
    for _ in range(700):
        optimizer.zero_grad()
        torch.stack(list(algo.loss(critic, target, data).values())).sum().backward()
        optimizer.step()
        polyak(target, critic, algo.polyak)
    v, forward = fixed_point()
    assert critic.v.weight[0].tolist() == pytest.approx(v.tolist(), abs=0.02)
    for q in critic.q.weight:
        assert q[1::2].tolist() == pytest.approx(forward.tolist(), abs=0.02)
        assert q[0::2].tolist() == pytest.approx([0.1] * LENGTH, abs=0.02)
    behaviour = 0.0
    for _ in range(LENGTH):  # what an expectile of one half would find at the start
        behaviour = 0.6 * (GAMMA * behaviour if behaviour else 1.0) + 0.04
    assert v[0] > behaviour + 0.05
