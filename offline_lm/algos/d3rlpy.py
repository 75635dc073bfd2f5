"""d3rlpy's own algorithms on the same features, batches and tables: peers to hold ours against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from offline_lm.algos.checks import check_share
from offline_lm.types import Estimand

NAMES = ("IQL", "CQL", "AWAC", "CRR", "TD3PlusBC", "BCQ", "BEAR", "PLAS", "SAC", "TD3", "DDPG")


@dataclass(frozen=True)
class D3rlpy:
    """An algorithm of d3rlpy for continuous actions; an action is the features of its text.

    Args:
        name: one of `NAMES`.
        gamma: discount per turn.
        tau: expectile, of name=IQL.
        polyak: rate at which targets follow; d3rlpy's `tau`.
        options: further fields of d3rlpy's configuration, by their names there.
    """

    name: str
    gamma: float
    tau: float
    polyak: float
    options: Mapping[str, Any]

    trains_q: ClassVar[bool] = True
    needs_candidates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name={self.name}: one of {', '.join(NAMES)} is wanted")
        check_share("gamma", self.gamma)
        check_share("tau", self.tau, ends=False)
        check_share("polyak", self.polyak)

    @property
    def estimand(self) -> Estimand:
        """IQL's expectile; Q of the others is that of an actor which seeks the best action that the logs allow."""
        return "expectile" if self.name == "IQL" else "optimum"
