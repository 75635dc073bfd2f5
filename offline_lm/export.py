"""``python -m offline_lm.export``: episodes of the store in the formats of others."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
from omegaconf import DictConfig
from tqdm import tqdm

from offline_lm import cli
from offline_lm.errors import UserError
from offline_lm.logs import _exact
from offline_lm.store import Store
from offline_lm.store.episodes import read_episodes
from offline_lm.types import Episode

Lost = list[str]
_FOLDERS = {"minari": "offline_lm.interop.minari", "datasets": "offline_lm.interop.hf_datasets"}
_LINES = ("jsonl", "chat", "adp")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("export", export, argv)


@dataclass(slots=True)
class Counts:
    """What was written, and for how many episodes each thing was not (or was made up)."""

    episodes: int = 0
    steps: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    filled: Counter[str] = field(default_factory=Counter)


def export(cfg: DictConfig) -> dict[str, Any]:
    """Writes the selected episodes, and counts them; ``lost`` are values that the format cannot say, ``filled``
    values that it demands and the log lacks."""
    if cfg.format not in (*_LINES, *_FOLDERS):
        raise UserError(f"format={cfg.format}: there are {', '.join((*_LINES, *_FOLDERS))}")
    output, counts = Path(cfg.output), Counts()
    if cfg.format in _FOLDERS and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise UserError(f"output={output} exists: name a new folder")
    if cfg.format in _LINES and output.is_dir():
        raise UserError(f"output={output} is a folder: name a file")
    if not output.absolute().parent.is_dir():
        raise UserError(f"output={output}: its folder does not exist; make it first")
    selected = _some(read_episodes(Store.open(cfg.store), _where(cfg)), cfg.store)
    with tqdm(desc="export", unit=" episodes", file=sys.stderr, disable=None, mininterval=0.5) as bar:
        episodes = _counted(selected, counts, bar.update)
        if cfg.format in _LINES:
            _write_lines(cfg.format, episodes, output, counts)
        else:
            _write_folder(cfg.format, episodes, output, counts)
    result = {
        "format": cfg.format,
        "episodes": counts.episodes,
        "steps": counts.steps,
        "output": str(output),
        "lost": dict(counts.lost.most_common()),
        "filled": dict(counts.filled.most_common()),
    }
    print(summary(result))
    return result


def summary(result: dict[str, Any]) -> str:
    """The counts in words."""
    words = f"{result['steps']} steps of {result['episodes']} episodes written to {result['output']}"
    for name, told in (("lost", "what this format cannot say"), ("filled", "what it demands and the log lacks")):
        if items := ", ".join(f"{key} {count}" for key, count in result[name].items()):
            words += f". {name}, by episodes ({told}): {items}"
    return words


def _where(cfg: DictConfig) -> str | None:
    """``where=`` and ``sql=`` as one condition on episodes."""
    if cfg.sql is None:
        return None if cfg.where is None else str(cfg.where)
    chosen = f"episode_id IN (\n{str(cfg.sql).rstrip().removesuffix(';')}\n)"
    return chosen if cfg.where is None else f"({cfg.where}\n) AND {chosen}"


def _some(episodes: Iterator[Episode], store: str) -> Iterator[Episode]:
    """Mistakes in the selection are told here, before anything is written."""
    first = next(episodes, None)
    if first is None:
        raise UserError(f"no episode of {store} is selected; change where= or sql=")
    return chain((first,), episodes)


def _counted(episodes: Iterable[Episode], counts: Counts, progress: Callable[[], object]) -> Iterator[Episode]:
    for episode in episodes:
        counts.episodes += 1
        counts.steps += sum(not step.is_final_observation for step in episode.steps)
        progress()
        yield episode


def _write_lines(format_: str, episodes: Iterable[Episode], output: Path, counts: Counts) -> None:
    write = _jsonl if format_ == "jsonl" else import_module(f"offline_lm.logs.{format_}").write
    with cli.replacing(output) as beside, beside.open("wb") as file:
        for episode in episodes:
            row, lost = write(episode)
            counts.lost.update(set(lost))
            file.write(orjson.dumps(row) + b"\n")


def _jsonl(episode: Episode) -> tuple[dict[str, Any], Lost]:
    return _exact.write(episode), _pictures(episode)


def _pictures(episode: Episode) -> Lost:
    """Pictures lie in the store beside its tables; an export has their hashes."""
    shots = [step.screenshot for step in episode.steps if step.screenshot is not None]
    gone = any(shot.get("status") in ("stored", "referenced") for shot in shots)
    return ["steps.screenshot (the picture; its hash is kept)"] if gone else []


def _write_folder(format_: str, episodes: Iterable[Episode], output: Path, counts: Counts) -> None:
    interop = import_module(_FOLDERS[format_])

    def seen() -> Iterator[Episode]:
        for episode in episodes:
            counts.lost.update(_pictures(episode))
            counts.filled.update(interop.filled(episode))
            yield episode

    with _replacing_folder(output) as beside:
        interop.write(seen(), beside)


@contextmanager
def _replacing_folder(output: Path) -> Iterator[Path]:
    """A folder of the same name to write, which then becomes ``output``: it shows whole or not at all."""
    beside = output.with_name(f".{os.getpid()}.{output.name}")
    try:
        beside.mkdir()
        yield beside / output.name
        (beside / output.name).replace(output)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
