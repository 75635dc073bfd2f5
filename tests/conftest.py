"""Shared fixtures. One thread for torch: contended small matrix products are many times slower with two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings

if TYPE_CHECKING:
    from offline_lm.batches.replay import Replay
    from offline_lm.batches.tokens import Tokens

CHECKOUT = Path(__file__).resolve().parent.parent

# For `pytest --hypothesis-profile=...`: as many cases as an evening allows, or as few as each of 500 mutants can have.
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.register_profile(
    "quick", max_examples=20, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real logs kept beside the checkout; the project never needs it, so its tests skip without it."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real logs at {folder}")
    return folder


@dataclass(frozen=True)
class Shop:
    store: Any
    rows: list[dict[str, Any]]
    replay: Replay
    model: Any
    tokenizer: Any
    tokens: Tokens


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Shop:
    """Logs of three tasks, one of them held out, and a tiny backbone. Do not train its model: copy it."""
    import orjson
    import torch

    from offline_lm.batches.replay import select, steps
    from offline_lm.batches.tokens import tokenize
    from offline_lm.envs.shop import Site, Task, record
    from offline_lm.logs.jsonl import read
    from offline_lm.models import backbone
    from offline_lm.store import Store
    from offline_lm.store.ingest import add

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shop")
    tasks = [Task(Site.draw(0), n) for n in range(3)]
    (folder / "log.jsonl").write_bytes(b"\n".join(map(orjson.dumps, record(tasks, 4))))
    store = Store.create(folder / "store")
    add(store, read(folder / "log.jsonl"))
    with store.connect() as db:
        replay = select(db, where="true", gamma=0.9, truncated="outcome", held_out=0.3, seed=0)
        rows = list(steps(db, "true"))
    texts = [row["observation"] for row in rows] + [row["goal"] for row in rows]
    model, tokenizer = backbone.tiny(texts, vocab_size=400, width=16, layers=2, heads=2)
    return Shop(store, rows, replay, model.eval(), tokenizer, tokenize(rows, tokenizer, max_tokens=400, history=2))
