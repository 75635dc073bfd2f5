"""An episode as one JSON object that says all of it, and back: what an export of a store is made of.

The object has the fields of `Episode` under their own names, and ``"exact": true``: so a reader takes it as it
stands, source and identity included, and infers neither rewards nor ends. Null is left out.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from typing import Any

from offline_lm.logs._records import record
from offline_lm.types import Candidate, Episode, Label, Step

EXACT = "exact"

_from_object = record(Episode)


def is_exact(value: dict[str, Any]) -> bool:
    return value.get(EXACT) is True


def write(episode: Episode) -> dict[str, Any]:
    """The object; its values are what JSON knows."""
    return {EXACT: True} | _fields(episode)


def read(value: dict[str, Any]) -> Episode:
    """The episode that `write` was given. Raises Bad for an object that `write` cannot have made."""
    return _from_object({key: item for key, item in value.items() if key != EXACT}, "the record")


def _fields(item: Episode | Step | Candidate | Label) -> dict[str, Any]:
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Step | Candidate | Label):
        return _fields(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value
