"""The weights of a batch, for every critic: an episode of weight 2 is an episode that stands there twice."""

from dataclasses import replace

import pytest
import torch

from offline_lm.algos.cql_lm import CQL
from offline_lm.algos.critic_mc import CriticMC
from offline_lm.algos.critic_td import CriticTD
from offline_lm.algos.digi_q import DigiQ
from offline_lm.algos.iql_lm import IQL
from offline_lm.algos.q_learning import QLearning
from offline_lm.algos.q_mc import QMC
from offline_lm.algos.sarsa import Sarsa
from offline_lm.algos.weighted_iql import WeightedIQL
from offline_lm.models.heads import Heads, target_of
from offline_lm.types import Batch

torch.set_num_threads(1)
CRITICS = {
    "critic_mc": CriticMC(0.5, 0.0),
    "critic_td": CriticTD(0.5, 0.7, None, 0.0),
    "q_mc": QMC(0.5, 0.0),
    "sarsa": Sarsa(0.5, 2, 0.0),
    "q_learning": QLearning(0.5, 0.0),
    "iql_lm": IQL(0.5, 0.9, 0.0),
    "digi_q": DigiQ(0.5, 0.0),
    "weighted_iql": WeightedIQL(0.5, 0.9, 2.0, 0.0),
    "cql_iql": CQL("iql", 0.5, 0.5, 0.9, 0.0),
    "cql_q_learning": CQL("q_learning", 0.5, 0.5, 0.9, 0.0),
}
LENGTHS = (3, 2)
WIDTH = 4


def batch_of(*episodes):
    """These of two episodes, end to end, whose second was cut; every state has two candidates."""
    drawn = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    states, actions, other = (torch.randn(n, WIDTH, generator=drawn) for _ in range(3))
    returns, reward = torch.rand(n, generator=drawn), torch.rand(n, generator=drawn)
    rows = torch.cat([torch.arange(n).split(LENGTHS)[e] for e in episodes])
    whole, terminal, last = torch.ones(len(rows), dtype=torch.bool), rows == 2, rows == 4
    candidates = torch.stack([actions, other], dim=1)[rows].flatten(0, 1)
    return Batch(
        states[rows], actions[rows], states[rows], actions[rows],
        offsets=torch.tensor([0, *(LENGTHS[e] for e in episodes)]).cumsum(0), reward=reward[rows],
        continues=1.0 - terminal.float(), returns=returns[rows], candidates=candidates, target_candidates=candidates,
        candidate_of=torch.arange(len(rows)).repeat_interleave(2), acted=whole, return_mask=whole, bootstrap_mask=~last,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["mse", "hl_gauss"])
@pytest.mark.parametrize("name", CRITICS)
def test_an_episode_of_weight_2_is_one_that_stands_there_twice(name, loss):
    torch.manual_seed(0)
    heads = Heads(WIDTH, hidden=8, loss=loss, low=0.0, high=1.0)
    with torch.no_grad():
        heads.q.weights[-1].mul_(10)  # or all actions are alike, and every penalty is log 2
    target = target_of(heads)
    once, twice = batch_of(0, 1), batch_of(0, 1, 1)
    weighted = replace(once, weight=torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0]))
    want, got, plain = (CRITICS[name].loss(heads, target, b) for b in (twice, weighted, once))
    for part in want:
        assert got[part].item() == pytest.approx(want[part].item(), rel=1e-5)
        if loss == "mse":  # a cross-entropy that starts alike everywhere hardly tells
            assert abs(plain[part].item() - want[part].item()) > 1e-4 * abs(want[part].item())
