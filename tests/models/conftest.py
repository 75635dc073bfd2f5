"""A tiny backbone on a few shop logs, shared by the tests of `models` (a second is spent on it once)."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from offline_lm.batches.replay import Replay, select, steps
from offline_lm.batches.tokens import Tokens, tokenize
from offline_lm.envs.shop import Site, Task, record
from offline_lm.logs.jsonl import read
from offline_lm.models import backbone
from offline_lm.store import Store
from offline_lm.store.ingest import add

torch.set_num_threads(1)


@dataclass(frozen=True)
class Shop:
    rows: list[dict[str, Any]]
    replay: Replay
    model: Any
    tokenizer: Any
    tokens: Tokens


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """Logs of three tasks, one of them held out; episodes of every ending. Do not train its model: copy it."""
    import orjson

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
    return Shop(rows, replay, model.eval(), tokenizer, tokenize(rows, tokenizer, max_tokens=400, history=2))
