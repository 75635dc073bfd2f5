"""The critics' losses on numbers worked out by hand, in float64; and IQL on a chain with a known fixed point."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from offline_lm.algos.cql_lm import CQL
from offline_lm.algos.critic_mc import CriticMC
from offline_lm.algos.critic_td import CriticTD
from offline_lm.algos.digi_q import DigiQ
from offline_lm.algos.iql_lm import IQL
from offline_lm.algos.q_learning import QLearning
from offline_lm.algos.q_mc import QMC
from offline_lm.algos.sarsa import Sarsa
from offline_lm.algos.weighted_iql import WeightedIQL
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
    candidates = tensor(1, 4, 1, 2, 1, 2, 5, 3)[:, None]
    values = dict(
        states=states, actions=actions, target_states=10 * states, target_actions=10 * actions,
        offsets=torch.tensor([0, 3, 5]), reward=tensor(0, 0.5, 1, 0, 0), continues=tensor(1, 1, 0, 1, 1),
        candidates=candidates, target_candidates=10 * candidates, candidate_of=torch.tensor([0, 0, 1, 2, 2, 3, 3, 4]),
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


def squares(values, targets):
    """Mean of the squared differences, summed over an ensemble."""
    return sum(np.mean((np.array(v[: len(targets)]) - targets) ** 2) for v in values)


V = [[0.1, 0.2, 0.3, 0.4, 0.5]]  # of ONLINE; V̄ is the same
Q = [[0.2, 0.2, 0.4, 0.4, 0.6], [0.3, 0.3, 0.6, 0.6, 0.9]]
Q_BAR = [0.15, 0.15, 0.3, 0.3, 0.45]  # the least of the target's, at the logged actions


@pytest.mark.parametrize(
    ("lam", "n_step", "targets"),
    [
        (0.0, None, [0.5 * 0.2, 0.5 + 0.5 * 0.3, 1, 0.5 * 0.5]),
        (1.0, None, [0.5, 1, 1, 0.5 * 0.5]),  # the cut episode ends in V̄ of its last row
        (0.5, None, [0.5 * (0.5 * 0.2 + 0.5 * 0.825), 0.5 + 0.5 * (0.5 * 0.3 + 0.5 * 1), 1, 0.25]),
        (1.0, 1, [0.1, 0.65, 1, 0.25]),
        (0.0, 2, [0.5 * (0.5 + 0.5 * 0.3), 0.5 + 0.5 * 1, 1, 0.25]),
        (0.0, 3, [0.5 * (0.5 + 0.5 * 1), 0.5 + 0.5 * 1, 1, 0.25]),
    ],
)
def test_critic_td(lam, n_step, targets):
    got = CriticTD(gamma=0.5, lam=lam, n_step=n_step, polyak=0.0).loss(ONLINE, TARGET, batch())
    assert set(got) == {"v"}
    assert got["v"].item() == pytest.approx(squares(V, targets))


def test_critic_td_of_an_episode_with_its_final_observation_ends_in_its_value():
    final = batch(acted=torch.tensor([True, True, True, True, False]))
    got = CriticTD(gamma=0.5, lam=1.0, n_step=None, polyak=0.0).loss(ONLINE, TARGET, final)
    assert got["v"].item() == pytest.approx(squares(V, [0.5, 1, 1, 0.5 * 0.5]))


def test_an_unknown_reward_on_the_way_ends_the_returns_before_it():
    torn = batch(bootstrap_mask=torch.tensor([True, False, True, True, False]), reward=tensor(0, float("nan"), 1, 0, 0))
    got = CriticTD(gamma=0.5, lam=1.0, n_step=None, polyak=0.0).loss(ONLINE, TARGET, torn)
    v = [[0.1, 0.3, 0.4]]
    assert got["v"].item() == pytest.approx(squares(v, [0.5 * 0.2, 1, 0.25]))


@pytest.mark.parametrize(
    ("n_step", "targets"),
    [
        (1, [0.5 * 0.15, 0.5 + 0.5 * 0.3, 1, 0.5 * 0.45]),
        (2, [0.5 * (0.5 + 0.5 * 0.3), 0.5 + 0.5 * 1, 1, 0.5 * 0.45]),
    ],
)
def test_sarsa(n_step, targets):
    got = Sarsa(gamma=0.5, n_step=n_step, polyak=0.0).loss(ONLINE, TARGET, batch())
    assert got["q"].item() == pytest.approx(squares(Q, targets))
    assert got["v"].item() == pytest.approx(squares(V, Q_BAR))


def test_sarsa_has_no_target_where_no_action_follows():
    """Features of a final observation's action are zeros: a Q of them would be a value of nothing."""
    final = batch(acted=torch.tensor([True, True, True, True, False]))
    got = Sarsa(gamma=0.5, n_step=1, polyak=0.0).loss(ONLINE, TARGET, final)
    assert got["q"].item() == pytest.approx(squares(Q, [0.5 * 0.15, 0.5 + 0.5 * 0.3, 1]))


def test_q_learning():
    got = QLearning(gamma=0.5, polyak=0.0).loss(ONLINE, TARGET, batch())
    # the best of 1 and 4, 1, 2 and 1, 2 and 5, 3: by the least of the target's Q
    assert got["q"].item() == pytest.approx(squares(Q, [0.5 * 0.15, 0.5 + 0.5 * 0.3, 1, 0.5 * 0.45]))
    assert got["v"].item() == pytest.approx(squares(V, [0.6, 0.15, 0.3, 0.75, 0.45]))


def test_q_learning_takes_the_largest_of_the_least():
    """max_a min_i, not min_i max_a: members disagree on the best action."""
    target = Critic([[0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
    states = torch.zeros(2, 2, dtype=torch.float64)
    candidates = torch.tensor([[0.0, 0.0], [0.9, 0.2], [0.3, 0.8]], dtype=torch.float64)
    two = batch(
        states=states, actions=states, target_states=states, target_actions=states, candidates=candidates,
        target_candidates=candidates, candidate_of=torch.tensor([0, 1, 1]), offsets=torch.tensor([0, 2]),
        reward=tensor(0, 0), continues=tensor(1, 0), acted=torch.tensor([True, True]),
        bootstrap_mask=torch.tensor([True, True]),
    )  # fmt: skip
    got = QLearning(gamma=1.0, polyak=0.0).loss(Critic([[0.0, 0.0]], [[0.0, 0.0]]), target, two)
    assert got["q"].item() == pytest.approx(0.3**2 / 2)


def test_q_learning_has_no_target_where_no_action_is_known():
    kept = batch()
    has = kept.candidate_of != 4
    final = batch(
        acted=torch.tensor([True, True, True, True, False]), candidates=kept.candidates[has],
        target_candidates=kept.target_candidates[has], candidate_of=kept.candidate_of[has],
    )  # fmt: skip
    got = QLearning(gamma=0.5, polyak=0.0).loss(ONLINE, TARGET, final)
    assert got["q"].item() == pytest.approx(squares(Q, [0.5 * 0.15, 0.5 + 0.5 * 0.3, 1]))


@pytest.mark.parametrize("base", ["iql", "q_learning"])
def test_cql(base):
    plain = {"iql": IQL(gamma=0.5, tau=0.9, polyak=0.0), "q_learning": QLearning(gamma=0.5, polyak=0.0)}[base]
    want = plain.loss(ONLINE, TARGET, batch())
    got = CQL(base=base, alpha=0.5, gamma=0.5, tau=0.9, polyak=0.0).loss(ONLINE, TARGET, batch())
    options = [(1, 4), (1,), (2, 1), (2, 5), (3,)]
    penalty = sum(np.mean([np.log(sum(np.exp(w * a) for a in c)) - w * c[0] for c in options]) for w in (0.2, 0.3))
    assert got.pop("cql").item() == pytest.approx(0.5 * penalty)
    assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in want.items()}


def test_weighted_iql():
    got = WeightedIQL(gamma=0.5, tau=0.9, weight=2.0, polyak=0.0).loss(ONLINE, TARGET, batch())
    w = np.array([2, 3, 3, 1])  # 1 + 2 G, and 1 where it is not known
    assert got["v"].item() == pytest.approx((w * [0.9 * 0.05**2, 0.1 * 0.05**2, 0, 0.1 * 0.1**2]).sum() / 9)
    y = np.array([0.5 * 0.2, 0.5 + 0.5 * 0.3, 1, 0.5 * 0.5])
    assert got["q"].item() == pytest.approx(sum((w * (np.array(m[:4]) - y) ** 2).sum() / 9 for m in Q))


def test_weighted_iql_without_weight_is_iql_and_a_lost_step_weighs_no_less():
    same = IQL(gamma=0.5, tau=0.9, polyak=0.0).loss(ONLINE, TARGET, batch())
    for data, weight in ((batch(), 0.0), (batch(returns=-batch().returns), 2.0)):
        got = WeightedIQL(gamma=0.5, tau=0.9, weight=weight, polyak=0.0).loss(ONLINE, TARGET, data)
        assert {k: v.item() for k, v in got.items()} == pytest.approx({k: v.item() for k, v in same.items()})


def test_digi_q():
    got = DigiQ(gamma=0.5, polyak=0.0).loss(ONLINE, TARGET, batch())
    assert got["q"].item() == IQL(gamma=0.5, tau=0.9, polyak=0.0).loss(ONLINE, TARGET, batch())["q"].item()
    assert got["v"].item() == pytest.approx(squares(V, Q_BAR[:4]))


ALL = [
    IQL(gamma=0.5, tau=0.9, polyak=0.0),
    QMC(gamma=0.5, polyak=0.0),
    CriticMC(gamma=0.5, polyak=0.0),
    CriticTD(gamma=0.5, lam=0.7, n_step=None, polyak=0.0),
    Sarsa(gamma=0.5, n_step=2, polyak=0.0),
    QLearning(gamma=0.5, polyak=0.0),
    CQL(base="q_learning", alpha=0.5, gamma=0.5, tau=0.9, polyak=0.0),
    WeightedIQL(gamma=0.5, tau=0.9, weight=2.0, polyak=0.0),
    DigiQ(gamma=0.5, polyak=0.0),
]


@pytest.mark.parametrize("algo", ALL)
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
        states[:0],
        states[:0],
        torch.zeros(0, dtype=torch.long),
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
        polyak(target, critic, algo.polyak or 0.0)
    v, forward = fixed_point()
    assert critic.v.weight[0].tolist() == pytest.approx(v.tolist(), abs=0.02)
    for q in critic.q.weight:
        assert q[1::2].tolist() == pytest.approx(forward.tolist(), abs=0.02)
        assert q[0::2].tolist() == pytest.approx([0.1] * LENGTH, abs=0.02)
    behaviour = 0.0
    for _ in range(LENGTH):  # what an expectile of one half would find at the start
        behaviour = 0.6 * (GAMMA * behaviour if behaviour else 1.0) + 0.04
    assert v[0] > behaviour + 0.05
