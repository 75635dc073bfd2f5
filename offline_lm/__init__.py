"""offline_lm: from logs of language-model web agents to value functions, and back into SQL."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_lm import udf
from offline_lm.store import Store

if TYPE_CHECKING:
    import duckdb

    from offline_lm.models.critic import Critic

__all__ = ["Critic", "connect"]

try:
    __version__ = version("offline_lm")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def connect(url: str | Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection to the store at ``url``: every view and macro, and the critics as functions (`udf`).

    Raises:
        UserError: no store there, or one of its Parquet files cannot be read.
    """
    store = Store.open(url)
    db = store.connect()
    udf.register(db, store)
    return db


def __getattr__(name: str) -> Any:
    """`Critic` needs torch, which takes seconds to import: only who asks for it pays."""
    if name == "Critic":
        from offline_lm.models.critic import Critic

        return Critic
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
