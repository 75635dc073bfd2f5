"""WebArena-Verified results: ``TASK/{agent_response.json, eval_result.json, network.har}``, with no step of the run.

The agent's answer, what the evaluator said of it, and the network traffic: what the agent saw and did at each step is
not there, and requests are not read as actions. Each folder is refused as ``outcome_only`` with the outcome in the
message, which ``labels=`` takes; without ``eval_result.json`` there is no outcome either (``no_steps``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, contents, need, rejected, take
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected

SOURCE = "webarena_verified"
_FILES = frozenset({"agent_response.json", "eval_result.json", "network.har"})
MAX_RESULT = 8 << 20


def detect(sample: Sample) -> str | None:
    found = sorted(_FILES & sample.names)
    return " and ".join(found) if len(found) > 1 else None


def find(path: Path) -> Iterator[Path]:
    return _files.find_folders(
        path,
        lambda folder: sum((folder / name).is_file() for name in _FILES) > 1,
        "folder with agent_response.json and eval_result.json",
    )


def read(path: Path) -> Iterator[Episode | Rejected]:
    """One Rejected for each task's folder at or below `path`: ``outcome_only``, or why there is no outcome.

    Raises:
        UserError: a path without such folders.
    """
    return map(_read_folder, find(path))


def _read_folder(folder: Path) -> Rejected:
    file = folder / "eval_result.json"
    data = b""
    try:
        if not file.is_file():
            raise Bad("no_steps", "neither steps nor eval_result.json: the run has no outcome; evaluate it first")
        data = contents(file, MAX_RESULT)
        result = parse(data)
        task, score = need(result, "task_id", (int, str)), need(result, "score", float)
        status = take(result, "status", str) or "unknown"
        raise Bad(
            "outcome_only",
            f"webarena task {task}: {status[:40]}, score {score:g}, no step was logged (network.har is not read as "
            "steps); give the outcome to a log of the same run with labels=",
        )
    except Bad as bad:
        return rejected(SOURCE, folder, bad, 0, data, hashlib.sha256(data).hexdigest() if data else None)
