"""Logs to chunks with Daft: ``python -m offline_lm.ingest engine=daft workers=8``.

Daft runs on this machine, or on Ray where it was told to (DAFT_RUNNER=ray). The chunks come in the order of the log.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import os
from collections.abc import Iterator

from offline_lm.errors import UserError
from offline_lm.interop import _tasks
from offline_lm.interop.processes import Done, Job

os.environ.setdefault("DO_NOT_TRACK", "true")  # importing it would report home
try:
    import daft
except ImportError as error:
    raise UserError("engine=daft needs the package: pip install 'offline_lm[daft]'") from error


class Reader:
    """What each of Daft's processes holds; see `_tasks.work`."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @daft.method(return_dtype=daft.DataType.binary())
    def __call__(self, task: bytes) -> Iterator[bytes]:
        yield from _tasks.work(self.job, task)


def run(job: Job, workers: int) -> Iterator[Done]:
    """The chunks of a log, read by ``workers`` processes.

    Raises:
        UserError: as reading does.
    """
    reader = daft.cls(Reader, max_concurrency=workers, use_process=True)(job)
    tasks = daft.from_pydict({"task": _tasks.tasks(job)}).into_batches(1)
    results = tasks.select(reader(daft.col("task")).alias("done"))
    for row in results.iter_rows(results_buffer_size=1):
        yield _tasks.result(row["done"])
