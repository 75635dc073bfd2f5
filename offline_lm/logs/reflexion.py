"""Outcomes of Reflexion (Shinn et al. 2023): ``env_results_trial_N.json``, with no step of any run.

A list of ``{name, memory[], is_success}`` (or an object of these by name), one for each environment. Nothing can be
learned from them here but the outcome, so each is refused as ``outcome_only`` with the outcome in the message, which
``labels=`` takes. ``is_success`` is sticky: once an environment is solved, later trials repeat true without a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, each, need, rejected, take
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad
from offline_lm.types import Episode, Rejected

SOURCE = "reflexion"
_NAME = re.compile(r"env_results_trial_(\d{1,6})\.json\Z")


def detect(sample: Sample) -> str | None:
    if not sample.is_dir and _NAME.match(sample.name):
        return "the name env_results_trial_N.json"
    return "outcomes and reflections" if {"name", "memory", "is_success"} <= sample.keys else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, (".json",))


def read(path: Path) -> Iterator[Episode | Rejected]:
    """One Rejected (``outcome_only``) for each environment of a file, or of the files under a folder."""
    return chain.from_iterable(_read_file(file) for file in find(path))


def _read_file(path: Path) -> Iterator[Episode | Rejected]:
    def outcomes(value: Any, record: Record) -> Iterator[Rejected]:
        if type(value) is dict and value and all(type(env) is dict for env in value.values()):
            for name in value:
                yield _outcome(need(value, name, dict), name, path, record)
        else:
            yield _outcome(value, take(value, "name", str), path, record)

    return each(SOURCE, path, outcomes)


def _outcome(env: dict[str, Any], name: str | None, path: Path, record: Record) -> Rejected:
    success = need(env, "is_success", bool)
    reflections = len(take(env, "memory", list) or ())
    trial = _NAME.search(path.name)
    where = f"trial {trial[1]}, in it or in an earlier one" if trial else "this trial or an earlier one"
    told = f"solved by {where}" if success else "not solved"
    message = (
        f"{name or 'an environment'}: {told}, {reflections} reflections, no step was logged; "
        "give the outcome to the logs of its runs with labels="
    )
    return rejected(SOURCE, path, Bad("outcome_only", message), record.offset, record.data, record.sha256)
