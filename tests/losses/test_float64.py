"""Every critic's loss in float32 within 1e-6 of plain Python in float64; `--hypothesis-profile=thorough`: 10,000 cases.

The numbers are the same in both (float32, and exact in float64), so that what differs is the computation alone. An
error is held against the sum of what is added up, without signs: a difference of large numbers can be no better.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm.losses.candidates import candidate_logsumexp, candidate_max
from offline_lm.losses.conservative import cql_penalty
from offline_lm.losses.expectile import iql_value_loss
from offline_lm.losses.hl_gauss import hl_gauss_expectile_loss, hl_gauss_loss, hl_gauss_mean, make_support
from offline_lm.losses.returns import discounted_returns, gae, lambda_returns, n_step_returns
from offline_lm.losses.td import ensemble_min, mc_loss, squared_loss, td_error, td_target

torch.set_num_threads(1)
CLOSE = 1e-6


class Draw:
    """Steps with values of a drawn size, k members, a mask that may hold nowhere, and weights."""

    def __init__(self, seed, n, k, size):
        self.rng = np.random.default_rng(seed)
        self.n, self.k, self.size = n, k, 10.0**size
        self.values = self.floats(n)
        self.members = self.floats(k, n)
        self.target = self.floats(n)
        self.mask = torch.from_numpy(self.rng.random(n) < self.rng.choice([0.0, 0.7, 1.0]))
        self.weight = self.floats(n).abs()
        self.tau = float(self.rng.uniform(0.01, 0.99))
        self.gamma = float(self.rng.uniform(0, 1))

    def floats(self, *shape):
        return torch.from_numpy((self.rng.normal(size=shape) * self.size).astype(np.float32))


steps = st.builds(Draw, st.integers(0, 2**63), st.integers(1, 30), st.integers(1, 4), st.integers(-3, 3))


def mean(x, draw, weight=None):
    """The masked and weighted mean of lists x [k][n], summed over members."""
    used = [i for i in range(draw.n) if draw.mask[i]]
    w = [1.0 if weight is None else weight[i].item() for i in used]
    total = math.fsum(w)
    if total <= 0:
        return 0.0
    return math.fsum(w[j] * row[i] for row in x for j, i in enumerate(used)) / total


def near(got, want, scale=None):
    assert got.item() == pytest.approx(want, rel=0 if scale else CLOSE, abs=CLOSE * (scale or 0) + 1e-30)


@settings(deadline=None)
@given(steps)
def test_squared_and_monte_carlo_loss(draw):
    y, q = draw.target.tolist(), draw.members.tolist()
    squares = [[(y[i] - row[i]) ** 2 for i in range(draw.n)] for row in q]
    scale = mean([[y[i] ** 2 + row[i] ** 2 for i in range(draw.n)] for row in q], draw)
    weighted = mean([[y[i] ** 2 + row[i] ** 2 for i in range(draw.n)] for row in q], draw, draw.weight)
    near(squared_loss(draw.members, draw.target, draw.mask), mean(squares, draw), scale)
    near(squared_loss(draw.members, draw.target, draw.mask, draw.weight), mean(squares, draw, draw.weight), weighted)
    near(mc_loss(draw.members, draw.target, draw.mask), mean(squares, draw) / 2, scale)
    assert ensemble_min(draw.members).tolist() == [min(column) for column in zip(*q, strict=True)]
    errors = td_error(draw.members, draw.target)
    for m, i in itertools.product(range(draw.k), range(draw.n)):
        near(errors[m, i], y[i] - q[m][i], abs(y[i]) + abs(q[m][i]))


@settings(deadline=None)
@given(steps)
def test_expectile_loss(draw):
    def one(u):
        return abs(draw.tau - (u < 0)) * u * u

    y, v = draw.target.tolist(), draw.values.tolist()
    want = [[one(y[i] - v[i]) for i in range(draw.n)]]
    scale = [[y[i] ** 2 + v[i] ** 2 for i in range(draw.n)]]
    near(iql_value_loss(draw.values, draw.target, draw.tau, draw.mask), mean(want, draw), mean(scale, draw))
    weighted = iql_value_loss(draw.values, draw.target, draw.tau, draw.mask, draw.weight)
    near(weighted, mean(want, draw, draw.weight), mean(scale, draw, draw.weight))


@settings(deadline=None)
@given(steps, st.integers(1, 6))
def test_candidates_and_the_conservative_penalty(draw, most):
    sizes = draw.rng.integers(0, most, draw.n)
    owner = torch.from_numpy(draw.rng.permutation(np.repeat(np.arange(draw.n), sizes)))
    q = draw.floats(draw.k, len(owner))
    best, total = candidate_max(q[0], owner, draw.n), candidate_logsumexp(q, owner, draw.n)
    want, scale = [[0.0] * draw.n for _ in range(draw.k)], [[0.0] * draw.n for _ in range(draw.k)]
    for m, s in itertools.product(range(draw.k), range(draw.n)):
        own = q[m, owner == s].tolist()
        if own:
            top = max(own)
            exact = top + math.log(math.fsum(math.exp(x - top) for x in own))
            near(total[m, s], exact, abs(top) + 1 + math.log(len(own)))
            assert m > 0 or best[s].item() == top
        else:
            exact, top = 0.0, 0.0
            assert total[m, s].item() == 0.0
            assert m > 0 or best[s].isnan()
        want[m][s] = exact - draw.members[m, s].item()
        scale[m][s] = abs(top) + abs(draw.members[m, s].item()) + 1 + math.log(max(len(own), 1))
    near(cql_penalty(q, owner, draw.members, draw.mask), mean(want, draw), mean(scale, draw))


@settings(deadline=None)
@given(steps, st.integers(8, 40), st.floats(0.5, 1.0))
def test_hl_gauss(draw, bins, spread):
    low, high = -2.0, 3.0
    margin = math.ceil(4 * spread)
    if bins < 2 * margin + 2:
        return
    support = make_support(low, high, bins, sigma_to_width=spread)
    width = (high - low) / (bins - 2 * margin)
    edges = [low + width * (i - margin) for i in range(bins + 1)]
    logits = torch.from_numpy(draw.rng.normal(size=(draw.k, draw.n, bins)).astype(np.float32) * 3)
    y = torch.from_numpy(draw.rng.uniform(low - 0.5, high + 0.5, draw.n).astype(np.float32))
    entropy = [[0.0] * draw.n for _ in range(draw.k)]
    scale = [[0.0] * draw.n for _ in range(draw.k)]
    shares = []
    for i in range(draw.n):
        at = min(max(y[i].item(), low), high)
        cdf = [0.5 * math.erfc((at - edge) / (spread * width * math.sqrt(2))) for edge in edges]
        mass = [(b - a) / (cdf[-1] - cdf[0]) for a, b in itertools.pairwise(cdf)]
        for m in range(draw.k):
            row = logits[m, i].tolist()
            top = max(row)
            norm = top + math.log(math.fsum(math.exp(x - top) for x in row))
            entropy[m][i] = -math.fsum(p * (x - norm) for p, x in zip(mass, row, strict=True))
            scale[m][i] = max(norm - x for x in row)
            if m == 0:
                shares.append([math.exp(x - norm) for x in row])
    near(hl_gauss_loss(logits, y, support, draw.mask), mean(entropy, draw), mean(scale, draw))
    means = hl_gauss_mean(logits[0], support)
    factors = []
    for i in range(draw.n):
        v = math.fsum(p * (a + b) / 2 for p, (a, b) in zip(shares[i], itertools.pairwise(edges), strict=True))
        near(means[i], v, edges[-1] - edges[0])
        factors.append(abs(draw.tau - (y[i].item() < v)))
    if all(abs(y[i].item() - means[i].item()) > 1e-4 for i in range(draw.n)):
        loss = hl_gauss_expectile_loss(logits[0], y, support, draw.tau, draw.mask, draw.weight)
        weighted = [[f * x for f, x in zip(factors, entropy[0], strict=True)]]
        near(loss, mean(weighted, draw, draw.weight), mean(scale[:1], draw, draw.weight))


def recurrence(a, b, ends, after):
    """x_t = b_t + a_t x_{t+1} within episodes that end before `ends`; `after` their last steps."""
    x, following = [0.0] * len(b), 0.0
    for t in reversed(range(len(b))):
        if t + 1 in ends:
            following = after[ends.index(t + 1)]
        x[t] = following = b[t] + a[t] * following
    return x


@settings(deadline=None)
@given(steps, st.integers(1, 5))
def test_targets_and_returns(draw, n_steps):
    n, gamma, lam = draw.n, draw.gamma, draw.tau
    ends = sorted({*draw.rng.integers(1, n + 1, 3).tolist(), n})
    offsets = torch.tensor([0, *ends])
    reward, values, following = draw.floats(n), draw.values, draw.target
    continues = torch.from_numpy((draw.rng.random(n) < 0.8).astype(np.float32))
    last = draw.floats(len(ends))
    r, c, v, f, z = (x.tolist() for x in (reward, continues, values, following, last))
    size = [abs(a) + abs(b) + abs(w) for a, b, w in zip(r, f, v, strict=True)]

    def check(got, want, scale):
        for t in range(n):
            near(got[t], want[t], scale[t])

    y = [r[t] + gamma * c[t] * f[t] for t in range(n)]
    check(td_target(reward, continues, following, gamma=gamma), y, size)
    a = [gamma * x for x in c]
    got = discounted_returns(reward, continues, offsets, gamma=gamma, bootstrap=last)
    check(got, recurrence(a, r, ends, z), recurrence(a, list(map(abs, r)), ends, list(map(abs, z))))
    b = [gamma * lam * x for x in c]
    nothing = [0.0] * len(ends)
    advantage = gae(reward, continues, values, following, offsets, gamma=gamma, lam=lam)
    check(advantage, recurrence(b, [y[t] - v[t] for t in range(n)], ends, nothing), recurrence(b, size, ends, nothing))
    share = [1.0 if t + 1 in ends else 1 - lam for t in range(n)]
    mixed = [r[t] + gamma * c[t] * share[t] * f[t] for t in range(n)]
    returns = lambda_returns(reward, continues, following, offsets, gamma=gamma, lam=lam)
    check(returns, recurrence(b, mixed, ends, nothing), recurrence(b, size, ends, nothing))
    got = n_step_returns(reward, continues, following, offsets, gamma=gamma, steps=n_steps)
    for t in range(n):
        stop = min(t + n_steps, next(end for end in ends if end > t))
        want, scale, discount = 0.0, 0.0, 1.0
        for i in range(t, stop):
            want, scale, discount = want + discount * r[i], scale + size[i], discount * a[i]
        near(got[t], want + discount * f[stop - 1], scale)
