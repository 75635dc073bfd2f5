"""Logs to chunks, in this process or in several: ``python -m offline_lm.ingest workers=8``.

The chunks come in the order of the log whatever the number of workers, so the store that they make is the same.
"""

from __future__ import annotations

import gc
import multiprocessing
import queue
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
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

BUNDLE_BYTES = 8 << 20
BUNDLE_PARTS = 256
AHEAD = 4
"""Bundles that are handed to each worker before the oldest is done, and chunks that wait in each: it bounds memory."""


class Bundle(NamedTuple):
    """Parts of a log that are read by one worker, one after the other."""

    parts: tuple[logs.Part | Rejected, ...]
    size: int


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

    def bundles(self) -> Iterator[Bundle]:
        """The parts of the log in order, small ones together: a part by itself is often one episode."""
        bundle: list[logs.Part | Rejected] = []
        size = 0
        for part in logs.parts(self.source, self.path):
            bundle.append(part)
            size += part.size if isinstance(part, logs.Part) else 0
            if size >= BUNDLE_BYTES or len(bundle) >= BUNDLE_PARTS:
                yield Bundle(tuple(bundle), size)
                bundle, size = [], 0
        if bundle:
            yield Bundle(tuple(bundle), size)

    def chunks(self, bundle: Bundle) -> Iterator[Chunk]:
        """The chunks of some parts; at least one."""
        records = chain.from_iterable(logs.read_part(part, **self.options) for part in bundle.parts)
        redactor = _redactor(tuple((self.patterns or {}).items()))
        media = Media(Store(self.store), keep=self.keep_media)
        for chunk in chunks(self._labelled(records), self.ingest_id, redactor, media):
            yield chunk if self.labels is None else replace(chunk, labels_used=frozenset(self.labels.used))

    def _labelled(self, records: Iterator[Episode | Rejected]) -> Iterator[Episode | Rejected]:
        if self.labels is None:
            return records
        return (self.labels.apply(one) if isinstance(one, Episode) else one for one in records)


@cache
def _redactor(patterns: tuple[tuple[str, str], ...]) -> Redactor:
    """One for a process: compiling the patterns takes longer than reading a small part."""
    return Redactor(dict(patterns))


class Done(NamedTuple):
    """A chunk, and the bytes of log that are done with it (those of a bundle come with its last chunk)."""

    chunk: Chunk
    size: int


def run(job: Job, workers: int) -> Iterator[Done]:
    """The chunks of a log; with more than one worker from that many processes.

    Raises:
        UserError: as reading does; a worker that died (out of memory, most likely).
    """
    if workers <= 1:
        for bundle in job.bundles():
            yield from sized(job.chunks(bundle), bundle)
        return
    with _started(job, workers) as started:
        bundles = job.bundles()
        waiting: deque[tuple[_Worker, Bundle]] = deque()
        count = 0
        while True:
            while len(waiting) < AHEAD * workers and (bundle := next(bundles, None)) is not None:
                worker = started[count % workers]
                worker.give(bundle)
                waiting.append((worker, bundle))
                count += 1
            if not waiting:
                return
            worker, bundle = waiting.popleft()
            yield from sized(worker.results(bundle), bundle)


def sized(made: Iterator[Chunk], bundle: Bundle) -> Iterator[Done]:
    """The chunks of a bundle; the last carries its size."""
    last: Chunk | None = None
    for chunk in made:
        if last is not None:
            yield Done(last, 0)
        last = chunk
    if last is not None:
        yield Done(last, bundle.size)


class _Worker(NamedTuple):
    process: Any
    tasks: Any
    made: Any

    def give(self, bundle: Bundle) -> None:
        try:
            self.tasks.put(bundle)
        except BrokenPipeError:
            raise self.died(bundle) from None

    def died(self, bundle: Bundle) -> UserError:
        self.process.join()
        first = bundle.parts[0]
        where = first.path if isinstance(first, logs.Part) else first.uri
        return UserError(
            f"the worker that read {where} or what follows died (exit code {self.process.exitcode}), most likely for "
            "want of memory: run the same command with fewer workers=; what was accepted stays"
        )

    def results(self, bundle: Bundle) -> Iterator[Chunk]:
        """The chunks of the oldest bundle that this worker was given."""
        while True:
            try:
                item = self.made.get(timeout=1)
            except (queue.Empty, EOFError, OSError) as error:  # the end of the pipe, maybe within a chunk
                if isinstance(error, queue.Empty) and self.process.is_alive():
                    continue
                raise self.died(bundle) from None
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
            tasks: Any = context.SimpleQueue()
            made: Any = context.Queue(AHEAD)
            process = context.Process(target=_work, args=(job, tasks, made), daemon=True)
            process.start()
            # Now the worker alone holds these ends, so that its death ends a chunk it was sending or a wait to give.
            made._writer.close()
            tasks._reader.close()
            workers.append(_Worker(process, tasks, made))
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


def _work(job: Job, tasks: Any, made: Any) -> None:
    """A worker: chunks of each bundle, then None; an exception instead of what it cannot make."""
    gc.set_threshold(100_000, 20)  # it holds many objects for a moment and makes no cycles
    while True:
        bundle = tasks.get()
        try:
            for chunk in job.chunks(bundle):
                made.put(chunk)
            made.put(None)
        except UserError as error:
            made.put(error)
        except Exception:  # told to the parent, which raises it
            made.put(traceback.format_exc())
