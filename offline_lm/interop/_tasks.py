"""What a task of Ray or Daft does: one part of a log to chunks. Job, parts and results travel pickled.

Only what these engines carry between our own processes is unpickled here, never anything of a log.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator

from offline_lm.errors import UserError
from offline_lm.interop.processes import Done, Job, sized


def parts(job: Job) -> list[bytes]:
    """The parts of the log, one for each task."""
    return [pickle.dumps(part) for part in job.parts()]


def read(job: Job, part: bytes) -> Iterator[bytes]:
    """The task: the results of one part, for `result`."""
    given = pickle.loads(part)
    try:
        for done in sized(job.chunks(given), given):
            yield pickle.dumps(done, protocol=5)
    except UserError as error:  # an engine would bury the sentence in its own traceback
        yield pickle.dumps(error)


def result(data: bytes) -> Done:
    """What `read` sent. Raises the UserError that it met."""
    done = pickle.loads(data)
    if isinstance(done, UserError):
        raise done
    return done
