"""Low-rank adapters (Hu et al. 2021): W + alpha / rank * U D on linear layers of a backbone that is itself frozen.

Why not `peft`: a target of our own is needed beside the online adapters, on the same frozen weights and trained by no
gradient, which its switching of active adapters makes harder than the adapters themselves; and a critic saved merged
needs no second library, nor a file that names code, to be read again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from offline_lm.errors import UserError

Linear = nn.Linear | Conv1D


class Adapted(nn.Module):
    """A frozen linear layer with an adapter beside it; the sum starts equal to the layer, since U starts at 0."""

    def __init__(self, base: Linear, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = matrix(base).shape
        self.base, self.scale = base, alpha / rank
        # float32 whatever the layer is kept in: bfloat16 would lose small updates
        self.down = nn.Parameter(torch.empty(rank, inputs, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        out = self.base(x)
        low = linear(x, self.down).flatten(0, -2)
        # one product that adds to the layer's output, no matrix of that size beside it
        return torch.addmm(out.flatten(0, -2), low, self.up.T, alpha=self.scale).view_as(out)


def adapt(model: Any, rank: int, alpha: float, layers: str | Sequence[str] = "all") -> None:
    """Freeze `model` and put an adapter on linear layers of its body, in place.

    Args:
        layers: `all`, or names of layers as they end, such as q_proj, v_proj.

    Raises:
        UserError: a name that no linear layer has.
    """
    model.requires_grad_(False)
    found = {name: m for name, m in model.base_model.named_modules() if isinstance(m, Linear)}
    endings = {name.rpartition(".")[2] for name in found}
    wanted = endings if layers == "all" else set(layers)
    if unknown := wanted - endings:
        raise UserError(
            f"model.lora.layers: no linear layer is called {', '.join(sorted(unknown))};"
            f" this model has {', '.join(sorted(endings))}"
        )
    for name, module in found.items():
        parent, _, ending = name.rpartition(".")
        if ending in wanted:
            setattr(model.base_model.get_submodule(parent), ending, Adapted(module, rank, alpha))


@torch.no_grad()
def merge(model: Any) -> None:
    """Add every adapter to its layer's weights and take it away: a plain model again, in the dtype it was kept in."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            weight = matrix(module.base)
            weight.copy_(weight.float() + module.scale * module.up @ module.down)
            parent, _, ending = name.rpartition(".")
            setattr(model.get_submodule(parent), ending, module.base)


def target_of(model: nn.Module) -> Any:
    """A copy that is never trained by gradients, equal at step 0; it shares the weights of `model` that are frozen.

    So the target of an adapted backbone costs a second set of adapters and no second backbone.
    """
    frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen).requires_grad_(False)


def matrix(layer: Linear) -> Tensor:
    """The weights as [outputs, inputs]; GPT-2's `Conv1D` keeps them transposed."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight
