"""A random batch of 64 steps, from disk to ids that a model can take: ours, beside tokenising it, beside `datasets`.

    python analysis/benchmarks/sampling.py [json=true] [batch=64] [steps=8192] [tokens=1024] [repeats=5]

CPU-milliseconds a batch (all threads together), files in the page cache. Pages are of about 12 KB; prompts are cut to
`tokens`, as `data.max_tokens` does, and a response follows each. Every row ends in one int64 array of all ids end to
end, and the positions and last tokens of prompts and responses.

    peer         tokenise each batch: what ArCHer, ILQL and trlx do (their `tokenizer(texts, truncation, padding)` in
                 the training step), with the Rust tokenizer in one call on all cores
    datasets     Hugging Face `datasets`, rows tokenised beforehand, saved, memory-mapped: the faster of its formats
                 `numpy` and `arrow`, rows asked for in one call
    ours         `Tokens.load` and `pack`, steps drawn one by one over all the logs
    episodes     the same, but whole episodes as `fit` draws them
    floor        the copying of the ids alone, by a loop over slices of memory-mapped NumPy arrays

`ratio` is peer / ours, with the goal 1,000; `datasets` has the goal 2; ours itself 0.3 ms.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _measure import arguments, medians, repeat, report, versions

from datasets import Dataset, load_from_disk
from offline_lm.batches.pack import pack
from offline_lm.batches.token_cache import write
from offline_lm.batches.tokens import Tokens
from offline_lm.models.backbone import train_tokenizer

GOAL = 1000
PAGE, RESPONSE, TURNS = 12_000, 25, 16


def pages(n: int, rng: np.random.Generator) -> list[str]:
    """Texts like pages: words of a few thousand kinds, markers, numbers."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(rng.choice(letters, k)) for k in rng.integers(2, 10, 4000)]
    weights = 1 / np.arange(1, 4001)
    weights /= weights.sum()
    out = []
    for _ in range(n):
        text = " ".join(
            f"[{i}] {w}" if i % 7 == 0 else w for i, w in enumerate(rng.choice(words, PAGE // 6, p=weights))
        )
        out.append(text[:PAGE])
    return out


def stored(folder: Path, n: int, length: int, rng: np.random.Generator) -> Tokens:
    """n steps on disk."""
    prompts = rng.integers(length * 3 // 4, length + 1, n)
    responses = rng.integers(RESPONSE // 2, 2 * RESPONSE, n)
    one = np.arange(n + 1)
    ids, said = (rng.integers(0, 2048, lengths.sum()).astype(np.uint16) for lengths in (prompts, responses))
    tokens = Tokens(
        ids, np.r_[0, np.cumsum(prompts)], said, np.r_[0, np.cumsum(responses)], one,
        np.ones(n, bool), np.ones(n, bool), np.zeros(n + 1, np.int64), np.zeros(0, np.int64),
        np.zeros(n, np.int64), np.zeros((n, 2), np.int64), np.zeros((n, 4), np.int32),
    )  # fmt: skip
    write(folder, [tokens])
    return Tokens.load(folder)


def laid_out(prompts: list[np.ndarray], responses: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """What a batch ends in, from rows of ids."""
    ids = np.concatenate([x for pair in zip(prompts, responses, strict=True) for x in pair], dtype=np.int64)
    lengths = np.array([[len(p), len(r)] for p, r in zip(prompts, responses, strict=True)])
    ends = np.cumsum(lengths).reshape(-1, 2)
    whole = lengths.sum(axis=1)
    return ids, np.arange(len(ids)) - np.repeat(ends[:, 1] - whole, whole), ends - 1


def main() -> None:
    given = arguments(sys.argv[1:], batch="64", steps="8192", tokens="1024", repeats="5")
    size, n, length, repeats = (int(given[name]) for name in ("batch", "steps", "tokens", "repeats"))
    rng = np.random.default_rng(0)
    texts = pages(256, rng)
    tokenizer = train_tokenizer(texts[:64], 2048)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = stored(Path(scratch) / "tokens", n, length, rng)
        columns = {
            "prompt": [tokens.prompt(i) for i in range(n)],
            "response": [tokens.response(i) for i in range(n)],
        }
        Dataset.from_dict(columns).save_to_disk(Path(scratch) / "datasets")
        table = load_from_disk(Path(scratch) / "datasets")
        as_numpy: Any = table.with_format("numpy")
        as_arrow: Any = table.with_format("arrow")

        def drawn() -> np.ndarray:
            return rng.integers(0, n, size)

        def tokenised() -> tuple[np.ndarray, ...]:
            some = [texts[i] for i in rng.integers(0, len(texts), size)]
            prompts = tokenizer(some, truncation=True, max_length=length)["input_ids"]
            responses = tokenizer(["click[12] and go on"] * size)["input_ids"]
            return laid_out(*([np.asarray(x) for x in ids] for ids in (prompts, responses)))

        def numpy_rows() -> tuple[np.ndarray, ...]:
            rows = as_numpy[drawn()]
            return laid_out(list(rows["prompt"]), list(rows["response"]))

        def arrow_rows() -> tuple[np.ndarray, ...]:
            rows = as_arrow[drawn()]
            lists = (rows[name].combine_chunks() for name in ("prompt", "response"))
            parts = (
                np.split(column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())[:-1])
                for column in lists
            )
            return laid_out(*parts)

        def ours(states: np.ndarray) -> tuple:
            ids, layout = pack(tokens, states, tokens.branch_ptr[states][:, None].tolist())
            return ids, layout.positions(), *layout.readouts()

        def episodes() -> tuple:
            starts = rng.integers(0, n // TURNS, size // TURNS) * TURNS
            return ours((starts[:, None] + np.arange(TURNS)).ravel())

        def copied() -> np.ndarray:
            return np.concatenate(
                [x for i in drawn().tolist() for x in (tokens.prompt(i), tokens.response(i))], dtype=np.int64
            )

        states = drawn()
        flat = laid_out([tokens.prompt(i) for i in states], [tokens.response(i) for i in states])
        got = ours(states)
        assert all((a.numpy() == b).all() for a, b in zip(got, (*flat[:2], *flat[2].T), strict=True))

        calls: dict[str, tuple[Callable[[], object], int]] = {
            "peer": (tokenised, 2), "datasets numpy": (numpy_rows, 10), "datasets arrow": (arrow_rows, 10),
            "ours": (lambda: ours(drawn()), 100), "episodes": (episodes, 100), "floor": (copied, 100),
        }  # fmt: skip
        ms = medians(repeat({name: lambda c=call: timed(*c) for name, call in calls.items()}, repeats))
    rows = [{"row": name, "CPU-ms": taken, "ratio": taken / ms["ours"]} for name, taken in ms.items()]
    result = {
        "ours": ms["ours"], "peer": ms["peer"], "ratio": ms["peer"] / ms["ours"],
        "goal": GOAL, "unit": f"CPU-ms a batch of {size} steps",
        "versions": versions("numpy", "datasets", "tokenizers", tokens=length),
    }  # fmt: skip
    report(result, rows, given, __file__)


def timed(call: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times * 1e3


if __name__ == "__main__":
    main()
