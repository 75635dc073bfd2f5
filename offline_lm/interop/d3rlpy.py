"""d3rlpy: our transitions as its data set, its algorithms with our networks. Nothing else here imports it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import d3rlpy.algos
import numpy as np
import torch
from d3rlpy.algos import IQL, QLearningAlgoBase
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import MDPDataset
from d3rlpy.models.encoders import EncoderFactory, register_encoder_factory
from d3rlpy.models.torch.encoders import Encoder, EncoderWithAction
from d3rlpy.torch_utility import TorchMiniBatch
from torch import Tensor, nn

from offline_lm.errors import UserError
from offline_lm.models.heads import Heads
from offline_lm.types import Batch

Algorithm = QLearningAlgoBase[Any, Any]


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


def create(
    name: str,
    *,
    gamma: float = 0.95,
    tau: float = 0.8,
    polyak: float = 0.01,
    lr: float = 5e-4,
    batch_size: int = 512,
    hidden: int = 256,
    ensemble: int = 2,
    device: str = "cpu",
    width: int | None = None,
    **options: Any,
) -> Algorithm:
    """An algorithm of d3rlpy for continuous actions, with the networks of `offline_lm.models.heads`.

    Names are as in `offline_lm.algos`. What stays its own: an actor over action features beside the critics, within
    [-1, 1] of each; its targets (IQL bootstraps from V of the online network, where ours takes the target's); Adam
    without weight decay, and no clipping of gradients. Its names differ: its `expectile` is our tau, its `tau` our
    polyak.

    Args:
        name: of the class in `d3rlpy.algos`.
        width: size of the features, for `update` without `fit`; None: what `fit` finds.
        options: further fields of its configuration.

    Raises:
        UserError: an option is no field of its configuration, or one that is set here, or has a value that it refuses.
    """
    encoder = HeadEncoder(hidden)
    kind = getattr(d3rlpy.algos, f"{name}Config")
    known = {field.name for field in dataclasses.fields(kind)}
    wanted = {
        "batch_size": batch_size, "gamma": gamma, "expectile": tau, "tau": polyak, "n_critics": ensemble,
        "actor_learning_rate": lr, "critic_learning_rate": lr, "actor_encoder_factory": encoder,
        "critic_encoder_factory": encoder, "value_encoder_factory": encoder,
    }  # fmt: skip
    free = known - wanted.keys()
    if unknown := sorted(options.keys() - free):
        raise UserError(f"{name} of d3rlpy takes no option {', '.join(unknown)}: there are {', '.join(sorted(free))}")
    config = kind(**{key: value for key, value in wanted.items() if key in known}, **options)
    algorithm = config.create(device=device)
    if width is not None:
        try:
            algorithm.create_impl((width,), width)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} of d3rlpy refuses {options}: {error}") from error
    return algorithm


def update(algorithm: Algorithm, batch: Batch, step: int) -> dict[str, float]:
    """One update on the transitions of `batch` that have a target; its losses, none if no transition has one."""
    usable = (batch.acted & batch.bootstrap_mask).nonzero()[:, 0]
    if not len(usable):
        return {}
    following = (usable + 1).clamp_max(len(batch.acted) - 1)  # behind a terminal it does not count
    column = batch.reward[usable, None]
    mini_batch = TorchMiniBatch(
        observations=batch.states[usable], actions=batch.actions[usable], rewards=column,
        next_observations=batch.states[following], next_actions=batch.actions[following],
        returns_to_go=batch.returns[usable, None], terminals=1 - batch.continues[usable, None],
        intervals=torch.ones_like(column), device=str(batch.states.device),
    )  # fmt: skip
    return _impl(algorithm).update(mini_batch, step)


@torch.no_grad()
def q_values(algorithm: Algorithm, actions: Tensor) -> Tensor:
    """Q [k, n] of action features [n, d]; they hold the state."""
    return torch.stack([q(actions, actions).q_value[:, 0] for q in _impl(algorithm).modules.q_funcs])


def has_v(algorithm: Algorithm) -> bool:
    """Whether it learns a V: IQL alone does."""
    return isinstance(algorithm, IQL)


@torch.no_grad()
def read(algorithm: Algorithm, heads: Heads) -> None:
    """Copy the networks of a trained algorithm into heads of the same sizes: Q, and V where it has one."""
    modules = _impl(algorithm).modules
    pairs = [(heads.q, list(modules.q_funcs))]
    if has_v(algorithm):
        pairs.append((heads.v, [modules.value_func]))
    for head, networks in pairs:
        for k, network in enumerate(networks):
            linears = [m for m in network._encoder.layers if isinstance(m, nn.Linear)] + [network._fc]
            for weight, bias, linear in zip(head.weights, head.biases, linears, strict=True):
                weight[k].copy_(linear.weight.T)
                bias[k, 0].copy_(linear.bias)


def _impl(algorithm: Algorithm) -> Any:
    """Its networks, which `create` with a width, or `fit`, has made."""
    if algorithm.impl is None:
        raise ValueError("no networks yet: create it with the width of the features")
    return algorithm.impl


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
