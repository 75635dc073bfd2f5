"""What hyperparameters may be: an algorithm checks its own when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def check_share(name: str, value: Any, *, ends: bool = True) -> None:
    """A number from 0 to 1, or between them where `ends` is false.

    Raises:
        ValueError: anything else; the message begins with `name=value`, for the command to put the group before it.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (not ends and value in (0, 1)):
        raise ValueError(f"{name}={value}: a number {'from 0 to 1' if ends else 'between 0 and 1'} is wanted")


def check_rate(name: str, value: Any) -> None:
    """A number from 0 to 1, or None, which leaves it to `fit`.

    Raises:
        ValueError: as for `check_share`.
    """
    if value is not None:
        check_share(name, value)


def check_at_least_0(name: str, value: Any) -> None:
    """A finite number from 0.

    Raises:
        ValueError: as for `check_share`.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"{name}={value}: a number from 0 is wanted")


def check_above_0(name: str, value: Any) -> None:
    """A finite number above 0.

    Raises:
        ValueError: as for `check_share`.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: a number above 0 is wanted")


def check_one_of(name: str, value: Any, wanted: Sequence[str]) -> None:
    """One of these words.

    Raises:
        ValueError: as for `check_share`.
    """
    if value not in wanted:
        raise ValueError(f"{name}={value}: one of {', '.join(wanted)} is wanted")


def check_count(name: str, value: Any) -> None:
    """A whole number from 1.

    Raises:
        ValueError: as for `check_share`.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value}: a whole number from 1 is wanted")
