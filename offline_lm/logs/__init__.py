"""Log formats, one module each: ``read(path) -> Iterator[Episode | Rejected]``.

A module of this package whose name has no leading underscore is a format; `offline_lm.logs._adapters` says what it
holds. A third party adds one by an entry point of the group ``offline_lm.logs`` that names such a module, or only a
``read`` function: ``mine = "my_package.mine"`` or ``mine = "my_package.mine:read"``.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from offline_lm.errors import UserError
from offline_lm.logs._adapters import Sample
from offline_lm.logs._files import walk
from offline_lm.types import Episode, Rejected

GROUP = "offline_lm.logs"
AUTO = "auto"
RANGE_BYTES = 8 << 20
"""A file of lines is read apart in ranges of this many bytes: few enough that workers, whose results are taken in
order, do not wait for each other."""
_LOGS = (".json", ".jsonl", ".ndjson", ".traj", ".parquet", ".arrow", ".hdf5", ".zip", ".pkl", ".pt", ".har", ".log")
"""Suffixes (.gz, .zst left off) of files that `auto` reports where no format knows them; others are no logs."""

Reader = Callable[..., Iterator[Episode | Rejected]]


@dataclass(frozen=True, slots=True)
class Format:
    """A log format: see `offline_lm.logs._adapters` for what the functions do."""

    name: str
    read: Reader
    find: Callable[[Path], Iterator[Path]]
    detect: Callable[[Sample], str | None]
    general: bool
    """It recognises much: `auto` asks it only where no other format claims the path."""
    by_line: bool
    """``read`` takes ``start`` and ``stop``, bytes of a file that is not compressed."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a log that can be read apart from the others, by another process or machine."""

    source: str
    path: Path
    size: int
    """bytes, for progress; 0 for what is no file"""
    start: int = 0
    stop: int | None = None


def _built_in() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def sources() -> list[str]:
    """The names that `read` takes as `source`: the built-in formats and those of installed packages."""
    return sorted({*_built_in(), *entry_points(group=GROUP).names})


@cache
def format_of(source: str) -> Format:
    """The format named `source`. Raises UserError if there is none, or two."""
    built_in = source in _built_in()
    installed = list(entry_points(group=GROUP, name=source))
    if built_in + len(installed) > 1:
        owners = ["offline_lm"] * built_in + [point.value for point in installed]
        raise UserError(f"source={source} is defined twice, by {', '.join(owners)}; uninstall one")
    if built_in:
        found: Any = import_module(f"{__name__}.{source}")
    elif installed:
        found = installed[0].load()
    else:
        raise UserError(f"source={source} is not a known log format; take one of: {', '.join([AUTO, *sources()])}")
    if inspect.isfunction(found):
        return Format(source, found, lambda path: iter((path,)), lambda sample: None, False, False)
    return Format(
        name=source,
        read=found.read,
        find=getattr(found, "find", lambda path: iter((path,))),
        detect=getattr(found, "detect", lambda sample: None),
        general=getattr(found, "GENERAL", False),
        by_line=getattr(found, "BY_LINE", False),
    )


def read(source: str, path: Path, **options: object) -> Iterator[Episode | Rejected]:
    """Yield every record of the log at `path`, a file or a folder, as an Episode or a Rejected.

    Files are read in sorted order and one record is held at a time. With ``source="auto"`` each folder and file goes
    to the format that recognises it. `options` go to the format's own ``read``.

    Raises:
        UserError: at once, for an unknown source, a path that does not exist, or an option that the format lacks;
        with ``auto`` while reading, for a path that no format recognises, or more than one.
    """
    _check_options(source, options)
    if not path.exists():
        raise UserError(f"{path} does not exist; path= must name a log file or a folder of them")
    return chain.from_iterable(read_part(part, **options) for part in parts(source, path))


def parts(source: str, path: Path) -> Iterator[Part | Rejected]:
    """The parts of the log at `path`, in the order in which `read` reads them. A Rejected: no format knows the file.

    Raises UserError as `read` does.
    """
    if source == AUTO:
        yield from _recognised(path)
    else:
        yield from _parts(format_of(source), path)


def read_part(part: Part | Rejected, **options: object) -> Iterator[Episode | Rejected]:
    """The records of one of the `parts`; `options` that its format does not know are those of another one."""
    if isinstance(part, Rejected):
        return iter((part,))
    form = format_of(part.source)
    known = {name: options[name] for name in _options(form) if name in options}
    if form.by_line:
        known |= {"start": part.start, "stop": part.stop}
    return form.read(part.path, **known)


def _options(form: Format) -> list[str]:
    return [name for name in inspect.signature(form.read).parameters if name not in ("path", "start", "stop")]


def _check_options(source: str, options: dict[str, Any]) -> None:
    """Raises UserError for an option that the format, or with ``auto`` every format, lacks."""
    formats = [format_of(name) for name in (sources() if source == AUTO else [source])]
    known = sorted({name for form in formats for name in _options(form)})
    if unknown := [name for name in options if name not in known]:
        takes = f"its options are {', '.join(known)}" if known else "it has no options"
        raise UserError(f"source={source} does not know {', '.join(unknown)}; {takes}")


def _parts(form: Format, path: Path) -> Iterator[Part]:
    for found in form.find(path):
        size = sum(file.stat().st_size for file in walk(found) if file.is_file())
        if form.by_line and size > RANGE_BYTES and found.suffix not in (".gz", ".zst"):
            starts = [*range(0, size, RANGE_BYTES), size]
            yield from (Part(form.name, found, b - a, a, b) for a, b in pairwise(starts))
        else:
            yield Part(form.name, found, size)


# --- source=auto --------------------------------------------------------------------------------------------


def _recognised(path: Path) -> Iterator[Part | Rejected]:
    """A folder goes whole to the format that claims it, else its entries are asked one by one."""
    formats = [format_of(name) for name in sources()]
    claimed = 0
    for item in _claims(path, formats, {}):
        claimed += isinstance(item, Part)
        yield item
    if not claimed:
        raise UserError(
            f"source=auto recognises no log in {path}: it looked for {', '.join(form.name for form in formats)}. "
            "Name the format with source=, or convert the log to source=jsonl"
        )


def _claims(path: Path, formats: list[Format], last: dict[str, Format]) -> Iterator[Part | Rejected]:
    """`last`: the format of the last file of each suffix in the folder, the likeliest for its neighbours."""
    sample = Sample(path)
    is_log = path.name.removesuffix(".gz").removesuffix(".zst").endswith(_LOGS)
    if not sample.is_dir and not path.is_file():  # a pipe would wait for ever
        if is_log:
            yield _refused(path, "unreadable_file", "it is no regular file, or a link to nothing; copy the file itself")
        return
    likely = last.get(path.suffix)
    if form := likely if likely and not sample.is_dir and likely.detect(sample) else recognise(sample, formats):
        if not form.general:
            last[path.suffix] = form
        yield from _parts(form, path)
    elif sample.is_dir:
        neighbours: dict[str, Format] = {}
        for entry in sorted(path.iterdir(), key=lambda p: p.name):
            if not entry.name.startswith(".") and not (entry.is_dir() and entry.is_symlink()):
                yield from _claims(entry, formats, neighbours)
    elif is_log:
        told = f"no format recognises the file; name one with source=: {', '.join(sources())}"
        yield _refused(path, "unknown_format", told)


def _refused(path: Path, reason: str, message: str) -> Rejected:
    return Rejected(source=AUTO, uri=str(path), offset=0, reason=reason, message=message)


def recognise(sample: Sample, formats: list[Format]) -> Format | None:
    """The one of `formats` that claims the path. Raises UserError if two do."""
    for general in (False, True):
        claims = {form: why for form in formats if form.general == general and (why := form.detect(sample))}
        if len(claims) > 1:
            told = "; ".join(f"{form.name} ({why})" for form, why in claims.items())
            raise UserError(f"{sample.path} looks like more than one format: {told}. Name one with source=")
        if claims:
            return next(iter(claims))
    return None


__all__ = ["AUTO", "GROUP", "Format", "Part", "format_of", "parts", "read", "read_part", "recognise", "sources"]
