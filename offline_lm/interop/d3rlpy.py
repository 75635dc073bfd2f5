"""d3rlpy: our transitions as its data set, and its IQL with our networks. Nothing else here imports it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from d3rlpy.algos import IQL, IQLConfig
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import MDPDataset
from d3rlpy.models.encoders import EncoderFactory, register_encoder_factory
from d3rlpy.models.torch.encoders import Encoder, EncoderWithAction
from torch import Tensor, nn

from offline_lm.errors import UserError
from offline_lm.types import Batch


def dataset(batch: Batch) -> MDPDataset:
    """Whole episodes on cached features: observation = features of s_t, action = features of a_t, a vector.

    d3rlpy has no masks, and bootstraps every transition of an episode but the last of one that timed out. So its
    episodes are our runs of usable transitions: a terminal ends one, and so does, as a timeout, the first row that
    has no target (the final observation of a truncated episode, a step with no action or no known reward). That
    row serves as the last next state; rows behind a terminal, or with nothing usable on either side, are left out.
    The number of its transitions is the number of rows that our bootstrapped losses count.

    Raises:
        UserError: no transition is usable.
    """
    usable = (batch.acted & batch.bootstrap_mask).cpu().numpy()
    ended = batch.continues.cpu().numpy() == 0
    if not usable.any():
        raise UserError("no step has a known reward and a known next state: d3rlpy would have nothing to learn from")
    leads_on = np.r_[False, (usable & ~ended)[:-1]]
    rows = np.flatnonzero(usable | leads_on)
    at = torch.from_numpy(rows).to(batch.states.device)
    return MDPDataset(
        batch.states[at].cpu().numpy(),
        batch.actions[at].cpu().numpy(),
        batch.reward[at].cpu().numpy(),
        (usable & ended)[rows].astype(np.float32),
        (~usable)[rows].astype(np.float32),
        action_space=ActionSpace.CONTINUOUS,
        action_size=batch.actions.shape[1],
    )


def iql(
    *,
    gamma: float = 0.95,
    tau: float = 0.8,
    polyak: float = 0.01,
    lr: float = 5e-4,
    batch_size: int = 512,
    hidden: int = 256,
    ensemble: int = 2,
    device: str = "cpu",
) -> IQL:
    """d3rlpy's IQL with the networks of `offline_lm.models.heads`; names as in `offline_lm.algos.iql_lm`.

    What stays its own: a Gaussian actor over action features beside the critics, V(s') of the online network as
    the bootstrap (ours is the target's), Adam without weight decay, and no clipping of gradients. Its names differ:
    its `expectile` is our tau, its `tau` our polyak.
    """
    encoder = HeadEncoder(hidden)
    config = IQLConfig(
        batch_size=batch_size,
        gamma=gamma,
        expectile=tau,
        tau=polyak,
        n_critics=ensemble,
        actor_learning_rate=lr,
        critic_learning_rate=lr,
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        value_encoder_factory=encoder,
    )
    return config.create(device=device)


@dataclass()
class HeadEncoder(EncoderFactory):
    """The hidden layers of `models.heads.Head`: LayerNorm, then two of `hidden` with GELU.

    Q reads the features of the action alone: they were read behind the state, and hold it.
    """

    hidden: int = 256

    def create(self, observation_shape: tuple[int, ...]) -> Encoder:
        return _OfState(observation_shape[0], self.hidden)

    def create_with_action(
        self, observation_shape: tuple[int, ...], action_size: int, discrete_action: bool = False
    ) -> EncoderWithAction:
        return _OfAction(action_size, self.hidden)

    @staticmethod
    def get_type() -> str:
        return "offline_lm_head"


register_encoder_factory(HeadEncoder)


class _OfState(Encoder):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = _layers(width, hidden)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.layers(x)


class _OfAction(EncoderWithAction):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = _layers(width, hidden)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:  # type: ignore[override]
        return self.layers(action)


def _layers(width: int, hidden: int) -> nn.Sequential:
    norm = nn.LayerNorm(width, elementwise_affine=False)
    return nn.Sequential(norm, nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
