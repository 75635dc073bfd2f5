"""How far advantage estimates lie from the true advantages: their bias and variance over logs that were drawn anew.

The tasks are finite (`envs.exact.TextMDP`), the logs many: each *resample* is a log of its own, on which value tables
are fitted and advantages estimated as a user would. Steps of all resamples lie end to end in one axis ``n``.

The truth. Episodes are drawn from one Markov policy mu per task; what is estimated is A(s, a) = Q(s, a) - V(s) of mu
*under the step limit*, at the turn where it was logged: V_t(s) = E[r + gamma V_{t+1}(s')], V_limit = 0. An episode that
the limit cuts has failed, as a labelled log says, so the Monte Carlo return is an unbiased estimate of Q. No page shows
the clock, so a table over pages can be wrong about it, and bootstraps at the limit like any critic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_array, diags_array
from scipy.sparse.linalg import spsolve

from offline_lm.envs.exact import TextMDP, expectile
from offline_lm.losses.groups import group_advantages
from offline_lm.losses.returns import discounted_returns, gae, next_values

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks of one step limit as one table, their states numbered one after another.

    Attributes:
        next, reward: [S, A] as in `TextMDP`, with -1 for the end.
        policy: float64 [S, A], mu; 0 where there is no action.
        start: int64 [m], the first state of each task.
        limit: steps after which an episode is cut off.
    """

    next: Array
    reward: Array
    policy: Array
    start: Array
    limit: int

    @classmethod
    def stack(cls, tasks: Sequence[TextMDP], policies: Sequence[Array]) -> Tasks:
        """Raises ValueError: the tasks have different step limits, or leave something to chance."""
        if len({task.limit for task in tasks}) != 1:
            raise ValueError("tasks of one step limit are wanted")
        if any((task.next == -3).any() or task.start[0] != 1 for task in tasks):
            raise ValueError("tasks without chance are wanted: one start, and one outcome of each action")
        start = np.cumsum([0, *(len(task.states) for task in tasks)])
        shape = (start[-1], max(task.next.shape[1] for task in tasks))
        following, reward, policy = np.full(shape, -1), np.zeros(shape), np.zeros(shape)
        for first, task, mu in zip(start, tasks, policies, strict=False):
            part = np.s_[first : first + len(task.states), : task.next.shape[1]]
            following[part] = np.where(task.next >= 0, task.next + first, -1)
            reward[part], policy[part] = task.reward, mu
        return cls(following, reward, policy, start[:-1], tasks[0].limit)

    def values(self, gamma: float, tau: float | None = None) -> Array:
        """V [limit + 1, S] by backward induction: of mu, or with `tau` the tau-expectile over mu (IQL's V)."""
        v = np.zeros((self.limit + 1, len(self.next)))
        for t in reversed(range(self.limit)):
            q = self.reward + gamma * np.where(self.next >= 0, v[t + 1][self.next], 0.0)
            v[t] = (self.policy * q).sum(axis=1) if tau is None else expectile(q, self.policy, tau)
        return v


@dataclass(frozen=True, eq=False)
class Logs:
    """Episodes of all resamples; `sample` orders them by resample, then by task.

    Attributes:
        state, action, turn, resample: int64 [n].
        following: int64 [n], the state after the step; -1 after the end. At the limit it is the final observation's.
        reward, continues: float64 [n]; continues is 0 where the episode terminated.
        offsets: int64 [e + 1].
    """

    state: Array
    action: Array
    turn: Array
    resample: Array
    following: Array
    reward: Array
    continues: Array
    offsets: Array

    @property
    def ends(self) -> Array:
        """int64 [e]: the last step of each episode."""
        return self.offsets[1:] - 1


def sample(tasks: Tasks, episodes: int, resamples: int, seed: int) -> Logs:
    """Draw `resamples` logs of `episodes` episodes for each task from its policy, cut off at the step limit."""
    rng = np.random.default_rng(seed)
    chances = tasks.policy.cumsum(axis=1)
    chances /= chances[:, -1:]  # to exactly 1, so that no rounding picks an action that is not there
    at = np.tile(np.repeat(tasks.start, episodes), resamples)
    n = len(at)
    state, action = np.full((n, tasks.limit), -1), np.zeros((n, tasks.limit), np.int64)
    for t in range(tasks.limit):
        here = np.flatnonzero(at >= 0)
        u = rng.random(len(here))
        state[here, t] = at[here]
        action[here, t] = (u[:, None] >= chances[at[here]]).sum(axis=1)
        at[here] = tasks.next[at[here], action[here, t]]
    episode, turn = np.nonzero(state >= 0)
    state, action = state[episode, turn], action[episode, turn]
    following = tasks.next[state, action]
    return Logs(
        state=state,
        action=action,
        turn=turn,
        resample=episode // (n // resamples),
        following=following,
        reward=tasks.reward[state, action],
        continues=(following >= 0).astype(np.float64),
        offsets=np.r_[0, np.cumsum(np.bincount(episode, minlength=n))],
    )


# -- tables fitted on logs --------------------------------------------------------------------------------------


def mean_table(index: Array, target: Array, size: int) -> Array:
    """[size]: the mean of `target` [n] over the steps of each `index` [n]; 0 where there is none."""
    return np.bincount(index, target, size) / np.maximum(np.bincount(index, minlength=size), 1)


def td_table(
    index: Array,
    following: Array,
    reward: Array,
    continues: Array,
    size: int,
    *,
    gamma: float,
    weight: Array | None = None,
) -> Array:
    """[size]: the fixed point of batch TD(0), V(s) = mean of r + gamma continue V(s') over the steps logged at s.

    It is the certainty-equivalence estimate (Sutton & Barto 2018, section 6.3). 0 where no step was logged.

    Args:
        index, following: int64 [n], a step's state and the next one (any number where continues is 0).
        weight: float64 [n], positive, of each step in the mean; 1 if not given.
    """
    w = np.ones(len(index)) if weight is None else weight
    total = np.bincount(index, w, size)
    onward = continues != 0
    flow = csc_array((gamma * w[onward], (index[onward], following[onward])), shape=(size, size))
    seen = np.where(total > 0, total, 1.0)
    return np.asarray(spsolve(csc_array(diags_array(seen) - flow), np.bincount(index, w * reward, size)))


def iql_table(
    index: Array,
    pair: Array,
    following: Array,
    reward: Array,
    continues: Array,
    sizes: tuple[int, int],
    *,
    gamma: float,
    tau: float,
) -> tuple[Array, Array]:
    """The fixed point of IQL on a log (Kostrikov et al. 2021, eq. 5-6): V [sizes[0]] and Q [sizes[1]].

    Q(s, a) is the mean of r + gamma continue V(s') over the logged (s, a), V(s) the tau-expectile of Q over the actions
    logged at s. Twins have the same fixed point, so min Q is Q. An expectile is a mean under weights, with tau >= 1/2
    the greatest over the weights allowed: that is policy iteration (Howard 1960), which ends after a few solves.

    Args:
        index, pair, following: int64 [n], the state, the state with its action, and the next state.

    Raises:
        ValueError: there is no such fixed point, as with gamma = 1 where episodes go round for ever.
    """
    v = np.zeros(sizes[0])
    for _ in range(100):
        q = mean_table(pair, reward + gamma * np.where(continues != 0, v[following], 0.0), sizes[1])
        weight = np.where(q[pair] < v[index], 1 - tau, tau)
        new = td_table(index, following, reward, continues, sizes[0], gamma=gamma, weight=weight)
        if np.abs(new - v).max() < 1e-11 * max(1.0, np.abs(new).max()):
            return new, q
        v = new
    raise ValueError(f"no fixed point with gamma={gamma} and tau={tau}")


# -- estimators -------------------------------------------------------------------------------------------------


class Estimator(NamedTuple):
    """What a row of the table is about; `critic` and `lam` are None where there is none."""

    method: str
    critic: str | None = None
    lam: float | None = None


def estimates(
    logs: Logs, tasks: Tasks, *, gamma: float, lambdas: Sequence[float], tau: float, group: int
) -> Iterator[tuple[Estimator, Array]]:
    """Each estimator's advantages [n] of all logged steps.

    Methods: `reinforce` G_t; `reinforce_mean` G_t less its mean over the log; `mc` G_t - V; `td` r + gamma V' - V;
    `gae` (Schulman et al. 2016); `archer` Q - V with Q and V of the behaviour (Zhou et al. 2024); `iql` Q - V of the
    expectile fixed point; `grpo` and `dr_grpo` from undiscounted returns of `group` episodes of a task.

    Critics: `exact` knows V_t(s); `td_table` and `mc_table` are fitted on the log itself, one entry a state;
    `position` is the mean return at a turn over all tasks of the log, systematically wrong. With `exact`, Q - V is the
    truth, and so is `td`, as pages follow from actions without chance.

    Raises:
        ValueError: the episodes of a task in a log are not a multiple of `group`.
    """
    n_states, n_actions = tasks.next.shape
    n_logs = int(logs.resample[-1]) + 1
    per_task = (len(logs.offsets) - 1) // (n_logs * len(tasks.start))
    if per_task % group:
        raise ValueError(f"{per_task} episodes a task are no multiple of a group of {group}")
    reward, continues, offsets = map(torch.from_numpy, (logs.reward, logs.continues, logs.offsets))
    returns = discounted_returns(reward, continues, offsets, gamma=gamma).numpy()
    yield Estimator("reinforce"), returns
    yield Estimator("reinforce_mean"), returns - mean_table(logs.resample, returns, n_logs)[logs.resample]

    outcome, groups = outcomes(logs, group)
    for method in ("grpo", "dr_grpo"):
        relative, _ = group_advantages(outcome, groups, divide_by_std=method == "grpo")
        yield Estimator(method), np.repeat(relative.numpy(), np.diff(logs.offsets))

    # Each log has tables of its own: its states are numbered apart from those of the others.
    state = logs.resample * n_states + logs.state
    following = logs.resample * n_states + logs.following
    pair = state * n_actions + logs.action
    moment = logs.resample * (tasks.limit + 1) + logs.turn
    sizes = (n_logs * n_states, n_logs * n_states * n_actions)
    steps = (following, logs.reward, logs.continues)

    def onward(v: Array, index: Array) -> Array:
        """V(s') where the episode continues; what stands elsewhere is not read."""
        return np.where(logs.continues != 0, v[index], 0.0)

    v_td, v_mc = td_table(state, *steps, sizes[0], gamma=gamma), mean_table(state, returns, sizes[0])
    v_turn = mean_table(moment, returns, n_logs * (tasks.limit + 1))
    v_exact, clock = tasks.values(gamma), np.s_[logs.turn, logs.state]
    after = onward(v_exact.ravel(), (logs.turn + 1) * n_states + logs.following)
    critics = {
        "exact": (v_exact[clock], after),
        "td_table": (v_td[state], onward(v_td, following)),
        "mc_table": (v_mc[state], onward(v_mc, following)),
        "position": (v_turn[moment], onward(v_turn, moment + 1)),
    }
    for name, (v, v_next) in critics.items():
        values = torch.from_numpy(v)
        later = next_values(values, offsets, final_values=torch.from_numpy(v_next[logs.ends]))
        yield Estimator("mc", name), returns - v
        for lam in (0.0, *lambdas):
            advantage = gae(reward, continues, values, later, offsets, gamma=gamma, lam=lam)
            yield Estimator("gae" if lam else "td", name, lam), advantage.numpy()
    for name, target in (("td_table", logs.reward + gamma * critics["td_table"][1]), ("mc_table", returns)):
        yield Estimator("archer", name), mean_table(pair, target, sizes[1])[pair] - critics[name][0]

    v_tau = tasks.values(gamma, tau)
    after = onward(v_tau.ravel(), (logs.turn + 1) * n_states + logs.following)
    yield Estimator("iql", "exact"), logs.reward + gamma * after - v_tau[clock]
    v, q = iql_table(state, pair, *steps, sizes, gamma=gamma, tau=tau)
    yield Estimator("iql", "td_table"), q[pair] - v[state]


def outcomes(logs: Logs, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The undiscounted return [e] of each episode and its group [e]: runs of one task in one log, in order."""
    total = torch.from_numpy(np.add.reduceat(logs.reward, logs.offsets[:-1]))
    return total, torch.arange(len(total)) // group


def true_advantages(logs: Logs, tasks: Tasks, *, gamma: float) -> Array:
    """A_t(s, a) [n] of the behaviour under the step limit, in float64."""
    v = tasks.values(gamma)
    q = logs.reward + gamma * np.where(logs.continues != 0, v[logs.turn + 1, logs.following], 0.0)
    return q - v[logs.turn, logs.state]


# -- measurement ------------------------------------------------------------------------------------------------


def measure(estimate: Array, truth: Array, state: Array, action: Array, resample: Array) -> dict[str, float]:
    """Errors of advantages [n] in each state and action, weighted by visits.

    The bias of a state and action is the mean of its error over logs. What differs between logs, the error of a fitted
    table included, is variance. Part of the bias is the same for all actions of a state: it is that of a baseline, and
    the expected policy gradient does not change with it (Williams 1992). The rest, `action_bias_squared`, does turn it.

    Args:
        state, action, resample: int64 [n]. A state with an action that was seen in one resample alone is left out.

    Returns:
        bias_squared, action_bias_squared, variance, and rmse: the root of bias_squared + variance;
        scale: root mean square of the true advantages, which is the rmse of an estimate of 0;
        sign_accuracy: share of right signs, mean of that among positive and that among negative true advantages, so
            that chance and any constant have 0.5; an estimate of 0 is half right; NaN where either kind is missing;
        correlation: Pearson's over steps; NaN where either side is constant.
    """
    cell = np.unique(state * (action.max() + 1) + action, return_inverse=True)[1]
    n_cells, n_logs = int(cell.max()) + 1, int(resample.max()) + 1
    logs_of = np.bincount(np.unique(cell * n_logs + resample) // n_logs, minlength=n_cells)
    kept = (logs_of > 1)[cell]
    estimate, truth, resample = estimate[kept], truth[kept], resample[kept]
    error = estimate - truth
    bias = squared_bias(error, cell[kept], resample)
    squared = float(np.mean(error**2))
    agree = (1 + np.sign(estimate) * np.sign(truth)) / 2
    sides = [agree[side] for side in (truth > 1e-9, truth < -1e-9)]  # rounding has no sign
    constant = np.ptp(estimate) == 0 or np.ptp(truth) == 0
    return {
        "bias_squared": bias,
        "action_bias_squared": bias - squared_bias(error, state[kept], resample),
        "variance": squared - bias,
        "rmse": squared**0.5,
        "scale": float(np.mean(truth**2)) ** 0.5,
        "sign_accuracy": float(np.mean([side.mean() for side in sides])) if all(map(len, sides)) else float("nan"),
        "correlation": float("nan") if constant else float(np.corrcoef(estimate, truth)[0, 1]),
    }


def squared_bias(error: Array, cell: Array, resample: Array) -> float:
    """The square of the mean error [n] of each cell, averaged over cells by their visits.

    Estimated without bias from products of errors in *different* resamples, which are independent: the square of a mean
    would count its noise as bias. Near 0 it may therefore be slightly negative. Cells of one resample count as 0.
    """
    n_cells, n_logs = int(cell.max()) + 1, int(resample.max()) + 1
    shape, where = (n_cells, n_logs), cell * n_logs + resample

    def pairs(x: Array) -> Array:
        """Sum of x_i x_j over resamples i != j of each cell."""
        x = x.reshape(shape).astype(np.float64)
        return x.sum(axis=1) ** 2 - (x**2).sum(axis=1)

    visits = np.bincount(where, minlength=n_cells * n_logs)
    across = pairs(visits)
    square = np.divide(
        pairs(np.bincount(where, error, n_cells * n_logs)), across, out=np.zeros(n_cells), where=across > 0
    )
    return float((visits.reshape(shape).sum(axis=1) * square).sum() / len(error))
