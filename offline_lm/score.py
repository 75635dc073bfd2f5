"""``python -m offline_lm.score``: V(s) and Q(s, a) beside the rows of a file of texts."""

from __future__ import annotations

import codecs
import gzip
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from offline_lm import cli
from offline_lm.errors import UserError
from offline_lm.models import devices
from offline_lm.models.critic import Critic, Score, find_run

CHUNK = 1024
"""Rows that are read, scored and written at a time; fewer are scored together where their texts are long."""
_READ = 64
"""Rows that are taken out of a Parquet file at a time."""
ADDED = ("v", "q", "advantage")

State = dict[str, Any]
ScoreAll = Callable[[Iterable[State]], Iterator[Score]]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("score", score, argv)


def score(cfg: DictConfig) -> dict[str, Any]:
    source, output = Path(cfg.input), Path(cfg.output)
    kind = _kind("input", source)
    if _kind("output", output) != kind:
        raise UserError(f"output={output}: input is {kind}, so output must be {kind} too")
    if not source.is_file():
        raise UserError(f"input={source}: no such file")
    if cfg.batch_tokens is not None and (type(cfg.batch_tokens) is not int or cfg.batch_tokens < 1):
        raise UserError(f"batch_tokens={cfg.batch_tokens}: null or a whole number from 1 is wanted")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    critic = Critic.from_pretrained(find_run(cfg.run, cfg.store))
    device = devices.device(cfg.device)
    critic.model.to(device)
    critic.heads.to(device)

    def scores(states: Iterable[State]) -> Iterator[Score]:
        return critic.score(states, chunk=CHUNK, token_budget=cfg.batch_tokens)

    work = score_parquet if kind == "Parquet" else score_jsonl
    started = time.monotonic()
    with (
        cli.replacing(output) as beside,
        _naming(source),
        tqdm(desc="score", unit=" rows", file=sys.stderr, disable=None, mininterval=0.5) as bar,
    ):
        rows = work(source, beside, scores, critic.config["has_q"], bar)
    seconds = time.monotonic() - started
    per_s = rows / seconds
    print(f"{rows} rows scored into {output} in {seconds:.1f} s ({per_s:.1f} a second)")
    return {"rows": rows, "seconds": round(seconds, 3), "states_per_s": round(per_s, 1), "output": str(output)}


def score_parquet(source: Path, beside: Path, scores: ScoreAll, has_q: bool, bar: tqdm) -> int:
    """Scores the rows of a Parquet file into the file ``beside``; returns how many there were."""
    with _reading():
        # without pre_buffer a row group, however large, is read page by page
        opened = pq.ParquetFile(source, pre_buffer=False, buffer_size=2**20)
    with opened as file:
        schema = file.schema_arrow
        _check_columns(schema.names, has_q)
        if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
            raise UserError(f"column {', '.join(repeated)} stands there more than once: rename all but one")
        number = pa.list_(pa.float64()) if "candidates" in schema.names else pa.float64()
        for name, kind in zip(ADDED, (pa.float64(), number, number), strict=True):
            schema = schema.append(pa.field(name, kind))
        bar.total = file.metadata.num_rows
        ahead: deque[tuple[pa.RecordBatch, list[State]]] = deque()

        def states() -> Iterator[State]:
            with _reading():
                for batch in file.iter_batches(_READ):
                    ahead.append((batch, batch.to_pylist()))
                    yield from ahead[-1][1]

        with pq.ParquetWriter(beside, schema, compression="zstd") as writer:
            scored = scores(states())
            for first in scored:
                batch, rows = ahead.popleft()
                both = zip(rows, [first, *islice(scored, len(rows) - 1)], strict=True)
                added = [_added(row, score, lists="candidates" in row) for row, score in both]
                columns = [pa.array([row[name] for row in added], schema.field(name).type) for name in ADDED]
                writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, *columns], schema=schema))
                bar.update(len(rows))
        return file.metadata.num_rows


def score_jsonl(source: Path, beside: Path, scores: ScoreAll, has_q: bool, bar: tqdm) -> int:
    """Scores the objects of a JSONL file, a line each, into the file ``beside``; returns how many there were.

    A line stays as it is, byte for byte, and the new keys come behind its own.
    """
    ahead: deque[tuple[bytes, State]] = deque()
    written = 0

    def states() -> Iterator[State]:
        for place, line in _lines(source):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UserError(f"line {place} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"line {place} is no JSON object")
            try:
                _check_columns(list(row), has_q)
            except UserError as error:
                raise UserError(f"line {place}: {error}") from error
            ahead.append((line, row))
            yield row

    with _opened(beside, "wb") as file:
        for score in scores(states()):
            line, row = ahead.popleft()
            added = orjson.dumps(_added(row, score, lists=row.get("candidates") is not None))
            file.write(line[:-1].rstrip() + b"," + added[1:] + b"\n")
            written += 1
            bar.update()
    return written


def _added(row: State, score: Score, *, lists: bool) -> dict[str, Any]:
    """v, q and advantage = q - v of one row."""
    if lists:
        named = row["candidates"] is not None and score.q is not None
        q = (score.q if row["candidates"] else []) if named else None
        return {"v": score.v, "q": q, "advantage": None if q is None else [x - score.v for x in q]}
    q = score.q[0] if score.q else None
    return {"v": score.v, "q": q, "advantage": None if q is None else q - score.v}


def _check_columns(names: Sequence[str], has_q: bool) -> None:
    if taken := [name for name in ADDED if name in names]:
        raise UserError(f"it has {', '.join(taken)} already, which the scores would be named: rename them first")
    if "observation" not in names and "messages" not in names:
        raise UserError(f"it has no observation and no messages (what the agent saw), but {_listed(names)}")
    if "goal" not in names and "start_url" not in names:
        raise UserError(f"it has no goal (nor a start_url to stand for it), but {_listed(names)}")
    if has_q and not {"action", "response", "candidates"} & set(names):
        raise UserError(f"it has no action, response or candidates to give q of, but {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names) or 'nothing'}: rename a column, or add it"


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, stripped bytes) of every line that is not blank."""
    with _reading(), _opened(source, "rb") as file:
        for place, line in enumerate(file, 1):
            if stripped := line.removeprefix(codecs.BOM_UTF8 if place == 1 else b"").strip():
                yield place, stripped


def _opened(file: Path, mode: str) -> IO[bytes]:
    return gzip.open(file, mode) if file.suffix == ".gz" else file.open(mode)  # type: ignore[return-value]


def _kind(key: str, file: Path) -> str:
    name = file.name.lower()
    if name.endswith(".parquet"):
        return "Parquet"
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "JSONL"
    raise UserError(f"{key}={file}: its name must end in .parquet, .jsonl or .jsonl.gz")


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Puts the input's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


@contextmanager
def _reading() -> Iterator[None]:
    """Around what reads the input: a file that cannot be opened, or is damaged, is the user's to mend."""
    try:
        yield
    except (OSError, pa.ArrowException, zlib.error, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"it cannot be read ({reason}): restore it, or write it again") from error


if __name__ == "__main__":
    sys.exit(main())
