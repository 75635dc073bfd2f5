"""Logs to chunks with Ray Data: ``python -m offline_lm.ingest engine=ray workers=64``.

Ray is started on this machine, or joined where RAY_ADDRESS names a cluster; every node needs offline_lm, the log
(``path=s3://...``, or a shared folder) and, for pictures, the store. The chunks come in the order of the log, and
Ray Data starts no new task while results wait (`DataContext` sets how many).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pyarrow as pa

from offline_lm.errors import UserError
from offline_lm.interop import _tasks
from offline_lm.interop.processes import Done, Job

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report home
try:
    import ray
    import ray.data
except ImportError as error:
    raise UserError("engine=ray needs the package: pip install 'offline_lm[ray]'") from error


def run(job: Job, workers: int) -> Iterator[Done]:
    """The chunks of a log, read by at most ``workers`` tasks at a time.

    Raises:
        UserError: as reading does.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # there is one already
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def read(block: pa.Table) -> Iterator[pa.Table]:
        for task in block["task"].to_pylist():
            for done in _tasks.work(job, task):
                yield pa.table({"done": pa.array([done], pa.large_binary())})

    blocks = [pa.table({"task": [task]}) for task in _tasks.tasks(job)]
    results = ray.data.from_arrow(blocks).map_batches(
        read, batch_size=None, batch_format="pyarrow", compute=ray.data.TaskPoolStrategy(size=workers)
    )
    for block in results.iter_batches(batch_size=1, batch_format="pyarrow"):
        for done in block["done"]:
            yield _tasks.result(done.as_py())
