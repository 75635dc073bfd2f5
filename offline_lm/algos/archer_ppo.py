"""PPO as ArCHer has it: the critic learns first, and gives every token of a turn the turn's one-step advantage."""

from __future__ import annotations

from dataclasses import dataclass

from offline_lm.algos.ppo import PPO


@dataclass(frozen=True)
class ArcherPPO(PPO):
    """A_t = r_t + gamma * continue_t * V(s_{t+1}) - V(s_t) on every token of a_t, clipped per token (Zhou et al. 2024).

    It is `PPO` with lambda 0 by default, and a critic of returns: V is regressed on G before the actor moves at all,
    and A is computed with the critic that came of it.
    """
