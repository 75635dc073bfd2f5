"""Logs to chunks, in this process or in several: ``python -m offline_lm.ingest workers=8``.

The chunks come in the order of the log whatever the number of workers, so the store that they make is the same.
"""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs._labels import Labels
from offline_lm.store import Store
from offline_lm.store.ingest import Chunk, chunks
from offline_lm.store.media import Media
from offline_lm.store.redact import Redactor
from offline_lm.types import Episode, Rejected

AHEAD = 4
"""Parts that are handed to each worker before the oldest is done, and chunks that wait in each: what bounds memory."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to know to turn a part of a log into chunks; it can be sent to another process."""

    source: str
    path: Path
    store: str
    ingest_id: str
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Labels | None = None
    patterns: Mapping[str, str] | None = None
    """for `Redactor`; None redacts nothing"""
    keep_media: bool = True

    def parts(self) -> Iterator[logs.Part | Rejected]:
        return logs.parts(self.source, self.path)

    def chunks(self, part: logs.Part | Rejected) -> Iterator[Chunk]:
        """The chunks of one part; at least one."""
        records = self._labelled(logs.read_part(part, **self.options))
        return chunks(records, self.ingest_id, Redactor(self.patterns), Media(Store(self.store), keep=self.keep_media))

    def _labelled(self, records: Iterator[Episode | Rejected]) -> Iterator[Episode | Rejected]:
        if self.labels is None:
            return records
        return (self.labels.apply(one) if isinstance(one, Episode) else one for one in records)


class Done(NamedTuple):
    """A chunk, and the bytes of log that are done with it (those of a part come with its last chunk)."""

    chunk: Chunk
    size: int


def run(job: Job, workers: int) -> Iterator[Done]:
    """The chunks of a log; with more than one worker from that many processes.

    Raises:
        UserError: as reading does; a worker that died (out of memory, most likely).
    """
    if workers <= 1:
        for part in job.parts():
            yield from sized(job.chunks(part), part)
        return
    with _started(job, workers) as started:
        parts = iter(job.parts())
        waiting: deque[tuple[_Worker, logs.Part | Rejected]] = deque()
        count = 0
        while True:
            while len(waiting) < AHEAD * workers and (part := next(parts, None)) is not None:
                worker = started[count % workers]
                worker.tasks.put(part)
                waiting.append((worker, part))
                count += 1
            if not waiting:
                return
            worker, part = waiting.popleft()
            yield from sized(worker.results(part), part)


def sized(made: Iterator[Chunk], part: logs.Part | Rejected) -> Iterator[Done]:
    """The chunks of ``part``; the last carries its size."""
    last: Chunk | None = None
    for chunk in made:
        if last is not None:
            yield Done(last, 0)
        last = chunk
    if last is not None:
        yield Done(last, part.size if isinstance(part, logs.Part) else 0)


class _Worker(NamedTuple):
    process: Any
    tasks: Any
    made: Any

    def results(self, part: logs.Part | Rejected) -> Iterator[Chunk]:
        """The chunks of the oldest part that this worker was given."""
        while True:
            try:
                item = self.made.get(timeout=1)
            except queue.Empty:
                if self.process.is_alive():
                    continue
                where = part.path if isinstance(part, logs.Part) else part.uri
                raise UserError(
                    f"the worker that read {where} died (exit code {self.process.exitcode}), most likely for want of "
                    "memory: run the same command with fewer workers=; what was accepted stays"
                ) from None
            if item is None:
                return
            if isinstance(item, UserError):
                raise item
            if isinstance(item, str):
                raise RuntimeError(f"a worker failed:\n{item}")
            yield item


@contextmanager
def _started(job: Job, count: int) -> Iterator[list[_Worker]]:
    context = multiprocessing.get_context("spawn")  # a forked process would share deltalake's and DuckDB's threads
    workers = []
    try:
        for _ in range(count):
            tasks, made = context.SimpleQueue(), context.Queue(AHEAD)
            process = context.Process(target=_work, args=(job, tasks, made), daemon=True)
            process.start()
            workers.append(_Worker(process, tasks, made))
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


def _work(job: Job, tasks: Any, made: Any) -> None:
    """A worker: chunks of each part, then None; an exception instead of what it cannot make."""
    while True:
        part = tasks.get()
        try:
            for chunk in job.chunks(part):
                made.put(chunk)
            made.put(None)
        except UserError as error:
            made.put(error)
        except Exception:  # told to the parent, which raises it
            made.put(traceback.format_exc())
