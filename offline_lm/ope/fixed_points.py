"""Every critic on tables: trained on random processes by its own loss, held against the fixed point of its equation.

With a table in place of a network nothing approximates: what a loss converges to is its equation's solution, or the
loss is wrong. Solutions are found without the losses: by linear algebra, dynamic programming and Newton's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import root
from scipy.special import softmax
from torch import Tensor, nn

from offline_lm.algos.cql_lm import CQL
from offline_lm.algos.critic_mc import CriticMC
from offline_lm.algos.critic_td import CriticTD
from offline_lm.algos.digi_q import DigiQ
from offline_lm.algos.iql_lm import IQL
from offline_lm.algos.q_learning import QLearning
from offline_lm.algos.q_mc import QMC
from offline_lm.algos.sarsa import Sarsa
from offline_lm.algos.weighted_iql import WeightedIQL
from offline_lm.envs.exact import TextMDP, expectile
from offline_lm.models.heads import Head, Heads, polyak, target_of
from offline_lm.types import Batch

Array = np.ndarray

GAMMA, TAU, ALPHA, WEIGHT = 0.9, 0.8, 0.3, 0.5
ALGOS: dict[str, Any] = {
    "critic_mc": CriticMC(GAMMA, 1.0),
    "critic_td": CriticTD(GAMMA, 0.7, None, 1.0),
    "critic_td n_step=2": CriticTD(GAMMA, 0.0, 2, 1.0),
    "q_mc": QMC(GAMMA, 1.0),
    "sarsa": Sarsa(GAMMA, 1, 1.0),
    "sarsa n_step=2": Sarsa(GAMMA, 2, 1.0),
    "q_learning": QLearning(GAMMA, 1.0),
    "iql_lm": IQL(GAMMA, TAU, 1.0),
    "weighted_iql": WeightedIQL(GAMMA, TAU, WEIGHT, 1.0),
    "cql_lm base=iql": CQL("iql", ALPHA, GAMMA, TAU, 1.0),
    "cql_lm base=q_learning": CQL("q_learning", ALPHA, GAMMA, TAU, 1.0),
    "digi_q": DigiQ(GAMMA, 1.0),
}


class Table(Head):
    """k values for each of n entries; a feature is the number of an entry."""

    def __init__(self, k: int, n: int) -> None:
        nn.Module.__init__(self)
        self.k, self.support = k, None
        self.table = nn.Parameter(torch.zeros(k, n, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return self.table[:, features[:, 0].long()]


class Tables(Heads):
    """V and two Q as tables, in place of heads."""

    def __init__(self, states: int, pairs: int) -> None:
        nn.Module.__init__(self)
        self.v, self.q = Table(1, states), Table(2, pairs)


@dataclass(frozen=True)
class Data:
    """All windows of three steps in M processes of S states and A actions, each as often as the behaviour takes it.

    Attributes:
        batch: its features are numbers of entries, s of M * S and s * A + a of M * S * A.
        policy: float64 [M, S, A], the behaviour that the windows are of.
    """

    batch: Batch
    policy: Array


def windows(tasks: Sequence[TextMDP], seed: int) -> Data:
    """Every way on of three steps from every state, under a random behaviour whose chances are quarters.

    The last step of a window has no target. Returns are the behaviour's Q, which is their mean in an endless log.
    """
    rng = np.random.default_rng(seed)
    n_states, n_actions = tasks[0].next.shape
    policies, q_mu, episodes = [], [], []
    for m, task in enumerate(tasks):
        times = 1 + rng.multinomial(4 - n_actions, np.full(n_actions, 1 / n_actions), size=n_states)
        policies.append(times / 4)
        q_mu.append(task.evaluate(policies[-1], GAMMA)[1])
        chosen = [np.repeat(np.arange(n_actions), own).tolist() for own in times]
        for s in range(n_states):
            episodes += [[(m, *step) for step in way] for way in _ways(task, chosen, s, 3)]
    sizes = [len(episode) for episode in episodes]
    m, s, a = np.array([step for episode in episodes for step in episode]).T
    state = m * n_states + s
    after = np.array([task.next for task in tasks])[m, s, a]
    last = np.cumsum(sizes) - 1
    cut = np.zeros(len(s), bool)
    cut[last] = np.array(sizes) == 3  # also where it ends the process, or ends would be too many among the targets
    owner = np.repeat(np.arange(len(s)), n_actions)
    features = [
        torch.from_numpy(x).double()[:, None]
        for x in (state, state * n_actions + a, (state[:, None] * n_actions + np.arange(n_actions)).ravel())
    ]
    states, actions, candidates = features
    every = torch.ones(len(s), dtype=torch.bool)
    batch = Batch(
        states, actions, states, actions,
        offsets=torch.from_numpy(np.r_[0, np.cumsum(sizes)]),
        reward=torch.from_numpy(np.array([task.reward for task in tasks])[m, s, a]),
        continues=torch.from_numpy((after >= 0).astype(np.float64)),
        returns=torch.from_numpy(np.array(q_mu)[m, s, a]),
        candidates=candidates, target_candidates=candidates, candidate_of=torch.from_numpy(owner),
        acted=every, return_mask=torch.from_numpy(~cut), bootstrap_mask=torch.from_numpy(~cut),
    )  # fmt: skip
    return Data(batch, np.array(policies))


def _ways(task: TextMDP, chosen: list[list[int]], s: int, steps: int) -> list[list[tuple[int, int]]]:
    """Every way on of `steps` steps; one that ends before stands as often as if it went on."""
    ways = []
    for a in chosen[s]:
        after = int(task.next[s, a])
        if steps == 1:
            ways.append([(s, a)])
        elif after < 0:
            ways += [[(s, a)]] * 4 ** (steps - 1)
        else:
            ways += [[(s, a), *way] for way in _ways(task, chosen, after, steps - 1)]
    return ways


def trained(algo: Any, batch: Batch, states: int, pairs: int, *, updates: int = 20_000) -> tuple[Array, Array]:
    """V [states] and the first member's Q [pairs] where an update no longer changes them by more than 1e-7.

    An update is half of Newton's step for the squared error of each entry: its gradient over its weight in the batch.

    Raises:
        FloatingPointError: so many `updates` were not enough.
    """
    critic = Tables(states, pairs)
    target = target_of(critic)
    weight = batch.bootstrap_mask.double()
    if isinstance(algo, WeightedIQL):
        weight = weight * (1 + algo.weight * batch.returns.clamp_min(0))
    v_weight, q_weight = (
        torch.bincount(x[:, 0].long(), weight, minlength=n).clamp_min(1)
        for x, n in ((batch.states, states), (batch.actions, pairs))
    )
    scale = 0.25 * float(weight.sum())  # half of Newton's step: some means are over more rows than have a target
    for _ in range(updates):
        losses = algo.loss(critic, target, batch)
        critic.zero_grad()
        cast(Tensor, sum(losses.values())).backward()
        moved = 0.0
        for table, own in ((critic.v.table, v_weight), (critic.q.table, q_weight)):
            if table.grad is not None:
                step = scale / own * table.grad
                table.data -= step
                moved = max(moved, float(step.abs().max()))
        polyak(target, critic, cast(float, algo.polyak))
        if moved < 1e-7:
            return critic.v.table[0].detach().numpy(), critic.q.table[0].detach().numpy()
    raise FloatingPointError(f"{type(algo).__name__} still moves by {moved:.1g} an update after {updates}")


def solution(name: str, task: TextMDP, policy: Array, counts: tuple[Array, Array]) -> tuple[Array, Array | None]:
    """V [S] and Q [S, A] that solve the equations of `ALGOS[name]`; Q is None for critics of states alone.

    Args:
        policy: float64 [S, A], the behaviour.
        counts: float64 [S, A] each, shares of the batch's steps with a target, and of all of them, that are (s, a).
    """
    v_mu, q_mu = _behaviour(task, policy)
    if name.startswith("critic"):
        return v_mu, None
    if name.split()[0] in ("q_mc", "sarsa", "digi_q"):
        return v_mu, q_mu
    if name == "q_learning":
        return task.optimal(GAMMA)
    if name == "iql_lm":
        return task.expectile(policy, GAMMA, TAU)
    if name == "weighted_iql":
        weighted = policy * (1 + WEIGHT * np.maximum(q_mu, 0))
        return task.expectile(weighted / weighted.sum(axis=1, keepdims=True), GAMMA, TAU)
    return _conservative(task, policy, counts, base=name.partition("base=")[2])


def _behaviour(task: TextMDP, policy: Array) -> tuple[Array, Array]:
    """V and Q of the behaviour from the linear system (I - gamma P) V = r."""
    n = len(policy)
    move = np.zeros((n, n))
    for s, a in zip(*np.nonzero(task.next >= 0), strict=True):
        move[s, task.next[s, a]] += policy[s, a]
    v = np.linalg.solve(np.eye(n) - GAMMA * move, (policy * task.reward).sum(axis=1))
    return v, task.backup(v, GAMMA)


def _conservative(task: TextMDP, policy: Array, counts: tuple[Array, Array], *, base: str) -> tuple[Array, Array]:
    """Where CQL's gradient is 0: 2 d (Q - y) + alpha (D softmax(Q) - e) = 0, of shares d, e and D = sum_a e."""
    targets, every = counts
    whole = every.sum(axis=1, keepdims=True)

    def value(q: Array) -> Array:
        return q.max(axis=1) if base == "q_learning" else expectile(q, policy, TAU)

    def gradient(flat: Array) -> Array:
        q = flat.reshape(policy.shape)
        y = task.backup(value(q), GAMMA)
        return (2 * targets * (q - y) + ALPHA * (whole * softmax(q, axis=1) - every)).ravel() / targets.ravel()

    _, start = task.optimal(GAMMA) if base == "q_learning" else task.expectile(policy, GAMMA, TAU)
    found: Any = root(gradient, start.ravel(), tol=1e-12)
    q = found.x.reshape(policy.shape)
    return value(q), q


def errors(tasks: Sequence[TextMDP], seed: int = 0) -> dict[str, float]:
    """Per algorithm, the largest distance of any V or Q on any of `tasks` from its solution.

    Args:
        tasks: processes of one shape, without chance, in which every state has every action, three at most.
    """
    data = windows(tasks, seed)
    m, n, k = data.policy.shape
    pairs = data.batch.actions[:, 0].long()
    shares = []
    for rows in (data.batch.bootstrap_mask, data.batch.acted):
        shares.append(torch.bincount(pairs[rows], minlength=m * n * k).numpy().reshape(m, n, k) / int(rows.sum()))
    worst = {}
    for name, algo in ALGOS.items():
        v, q = trained(algo, data.batch, m * n, m * n * k)
        apart = 0.0
        for task, policy, mine, own, *counts in zip(
            tasks, data.policy, v.reshape(m, n), q.reshape(m, n, k), *shares, strict=True
        ):
            v_true, q_true = solution(name, task, policy, (counts[0], counts[1]))
            apart = max(apart, np.abs(mine - v_true).max(), 0.0 if q_true is None else np.abs(own - q_true).max())
        worst[name] = float(apart)
    return worst
