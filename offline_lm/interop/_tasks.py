"""What a task of Ray or Daft does: a bundle of parts of a log to chunks. Bundles and results travel pickled.

Only what these engines carry between our own processes is unpickled here, never anything of a log.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator

from offline_lm.errors import UserError
from offline_lm.interop.processes import Done, Job, sized


def tasks(job: Job) -> list[bytes]:
    """The bundles of the log, one for each task."""
    return [pickle.dumps(bundle) for bundle in job.bundles()]


def work(job: Job, task: bytes) -> Iterator[bytes]:
    """A task: its results, for `result`."""
    bundle = pickle.loads(task)
    try:
        for done in sized(job.chunks(bundle), bundle):
            yield pickle.dumps(done, protocol=5)
    except UserError as error:  # an engine would bury the sentence in its own traceback
        yield pickle.dumps(error)


def result(data: bytes) -> Done:
    """What `work` sent. Raises the UserError that it met."""
    done = pickle.loads(data)
    if isinstance(done, UserError):
        raise done
    return done
