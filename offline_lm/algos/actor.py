"""What an algorithm that trains an actor gives: advantages of logged responses, and one loss."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from offline_lm.losses.policy import Aggregate
from offline_lm.types import Logged, Responses


@runtime_checkable
class Actor(Protocol):
    """An algorithm that trains an actor on logged responses."""

    @property
    def gamma(self) -> float:
        """Discount per turn of the returns that it is given."""
        ...

    @property
    def critic(self) -> Any:
        """The algorithm of the critic that it asks; None: it asks none."""
        ...

    @property
    def aggregate(self) -> Aggregate:
        """How the terms of tokens are brought together (`losses.policy.token_weights`)."""
        ...

    @property
    def needs(self) -> Literal["nothing", "v", "q"]:
        """What of a critic."""
        ...

    @property
    def candidates(self) -> bool:
        """Whether it trains on every known response of a step, or on the logged one alone."""
        ...

    @property
    def ratios(self) -> Literal["none", "token", "response"]:
        """Of what its loss takes ratios to `Responses.old`, kept within `clip_low` and `clip_high`."""
        ...

    def advantages(self, logged: Logged) -> tuple[Tensor, dict[str, float]]:
        """Of the logged response to each step, float64 [n], or of every known response [m]; NaN leaves one out.

        And what was counted on the way, for the run's metrics.
        """
        ...

    def loss(self, batch: Responses) -> dict[str, Tensor]: ...
