"""Scoring in SQL, beside a Python loop over the rows and beside bulk `score`.

    python analysis/benchmarks/sql_score.py [json=true] [rows=64] [repeats=2] [threads=2] [width=128] [layers=4]

Rows a second with a critic of `model=tiny`'s size, random weights. Three tables of `rows` rows each:

    candidates   16 actions at each of rows/16 pages of about 600 tokens: which one is best?
    short        distinct states of about 60 tokens, an action each
    long         distinct states of about 600 tokens, an action each

and for each of them

    loop         `for row in rows: critic.score([row])`
    bulk         `critic.score(rows)`, as the command `score` does
    features     `features.compute` on their tokens: no tokenising, no heads, and every row written to disk
    q_value      SELECT q_value(run, goal, observation, action) FROM table: V of the state is computed besides
    v_value      SELECT v_value(run, goal, observation) FROM table

Connections are opened anew, unmeasured, so that none remembers; the critic is loaded already. `ratio` is q_value / loop
over `candidates`. Where all rows are distinct and long the loop does the same arithmetic: little is to be gained there
on a CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import _measure
import numpy as np
import pyarrow as pa
import torch

import offline_lm
from offline_lm.batches.tokens import tokenize
from offline_lm.models import backbone, features
from offline_lm.models.critic import Critic
from offline_lm.models.heads import Heads
from offline_lm.store import Store

GOAL, GOAL_BULK, ACTIONS = 10.0, 0.9, 16
WORDS = [f"{a}{b}" for a in ("red", "blue", "cup", "mug", "shop", "cart", "page") for b in ("", "s", "er", "ing", "ly")]


_EMPTY = dict.fromkeys((
    "start_url", "url", "messages", "observation_error", "response", "candidates", "tokenizer_id", "prompt_token_ids",
    "response_token_ids",
))  # fmt: skip


def tables(rows: int) -> dict[str, list[dict[str, str]]]:
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS, words))

    def state(words: int) -> dict[str, str]:
        return {"goal": text(5), "observation": text(int(words * rng.uniform(0.7, 1.3)))}

    pages = [state(270) for _ in range(rows // ACTIONS)]
    actions = [f"click[{text(3)} {i}]" for i in range(ACTIONS)]
    return {
        "candidates": [{**page, "action": action} for page in pages for action in actions],
        "short": [{**state(12), "action": f"click[{text(3)}]"} for _ in range(rows)],
        "long": [{**state(270), "action": f"click[{text(3)}]"} for _ in range(rows)],
    }


def save_critic(folder: Path, texts: list[str], width: int, layers: int) -> Critic:
    model, tokenizer = backbone.tiny(texts, vocab_size=2048, width=width, layers=layers, heads=4)
    settings = {"max_tokens": 1024, "history": 4, "dtype": "float32", "has_q": True}
    Critic(model, tokenizer, Heads(width), settings).save(folder, backbone_path=None)
    return Critic.from_pretrained(folder)


def main(argv: list[str]) -> None:
    given = _measure.arguments(argv, rows="64", repeats="2", threads="2", width="128", layers="4")
    torch.set_num_threads(int(given["threads"]))
    work = tables(int(given["rows"]))
    seen: dict[str, list[Any]] = {}
    count = iter(range(10**6))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        texts = [row["observation"] for rows in work.values() for row in rows]
        critic = save_critic(folder, texts, int(given["width"]), int(given["layers"]))
        store = Store.create(Path(temporary, "store"))

        def timed(name: str, work: Callable[[], list[Any]]) -> Callable[[], float]:
            def run() -> float:
                started = time.perf_counter()
                seen[name] = work()
                return time.perf_counter() - started

            return run

        def asked(name: str, sql: str, rows: pa.Table) -> Callable[[], float]:
            def run() -> float:
                with offline_lm.connect(store.url) as db:
                    db.register("asked", rows)
                    return timed(name, lambda: db.execute(sql, {"run": str(folder)}).fetchall())()

            return run

        def rows_of(name: str, rows: list[dict[str, str]]) -> dict[str, Callable[[], float]]:
            arrow = pa.Table.from_pylist(rows)
            steps = [{**_EMPTY, **row, "episode_id": str(i)} for i, row in enumerate(rows)]
            tokens = tokenize(steps, critic.tokenizer, max_tokens=1024, history=4)
            q = "SELECT q_value($run, goal, observation, action) FROM asked"
            v = "SELECT v_value($run, goal, observation) FROM asked"
            ways = {
                "loop": lambda: [score for row in rows for score in critic.score([row])],
                "bulk": lambda: list(critic.score(rows)),
                "features": lambda: [features.compute(critic.model, tokens, Path(temporary, str(next(count))))],
            }
            timed_ways = {f"{name} {way}": timed(f"{name} {way}", run) for way, run in ways.items()}
            return {**timed_ways, f"{name} q_value": asked(f"{name} q_value", q, arrow),
                    f"{name} v_value": asked(f"{name} v_value", v, arrow)}  # fmt: skip

        all_rows = {name: run for table, rows in work.items() for name, run in rows_of(table, rows).items()}
        took = _measure.medians(_measure.repeat(all_rows, int(given["repeats"])))
    for table in work:
        loop, bulk, q, v = (seen[f"{table} {way}"] for way in ("loop", "bulk", "q_value", "v_value"))
        for other in ([s.q[0] for s in bulk], [x for (x,) in q]):
            np.testing.assert_allclose(other, [s.q[0] for s in loop], atol=1e-5)
        np.testing.assert_allclose([x for (x,) in v], [s.v for s in loop], atol=1e-5)
    speed = {name: len(work[name.split()[0]]) / s for name, s in took.items()}
    table = [
        {
            "table": name.split()[0], "way": name.split()[1], "rows_per_s": round(speed[name], 1),
            "to_loop": round(speed[name] / speed[f"{name.split()[0]} loop"], 2),
            "to_bulk": round(speed[name] / speed[f"{name.split()[0]} bulk"], 2),
        }
        for name in took
    ]  # fmt: skip
    ours, peer = speed["candidates q_value"], speed["candidates loop"]
    result = {
        "ours": ours, "peer": peer, "ratio": ours / peer, "goal": GOAL,
        "unit": "rows/s", "of_bulk": {t: round(speed[f"{t} q_value"] / speed[f"{t} bulk"], 2) for t in work},
        "of_bulk_goal": GOAL_BULK,
        "versions": _measure.versions("torch", "duckdb", **given),
    }  # fmt: skip
    _measure.report(result, table, given, __file__)


if __name__ == "__main__":
    main(sys.argv[1:])
