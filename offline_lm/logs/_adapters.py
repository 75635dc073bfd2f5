"""What the adapters share: one loop over records, typed access to what a log holds, and the common shapes of steps.

An adapter is a module of this package (or of another, see `offline_lm.logs`) with

- ``SOURCE``: its name
- ``detect(sample) -> str | None``: why the file or folder looks like this format, in a few words, or None
- ``find(path) -> Iterator[Path]``: the parts of a log that can be read apart, files or folders
- ``read(path, **options) -> Iterator[Episode | Rejected]``: everything of one part, or of all of them
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from offline_lm.logs._files import MAX_BYTES, Damaged, Record, excerpt, lines, records, whole
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected, Step

_HEAD = 64 << 10
_MAX_NAMES = 10_000


class Sample:
    """What ``detect`` may look at: a path and the beginning of what it holds, read once for all formats."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.is_dir = path.is_dir()

    @cached_property
    def names(self) -> frozenset[str]:
        """Names in the folder (the first 10,000); empty for a file."""
        if not self.is_dir:
            return frozenset()
        return frozenset(entry.name for entry, _ in zip(self.path.iterdir(), range(_MAX_NAMES), strict=False))

    @cached_property
    def head(self) -> bytes:
        """The first 64 KB of the file, decompressed; empty for a folder, or a file that cannot be read."""
        if self.is_dir:
            return b""
        try:
            return whole(self.path, _HEAD)[0]
        except Damaged:
            return b""

    @cached_property
    def value(self) -> Any:
        """The first record of a JSON or JSONL file (of an array: its first element); None if there is none."""
        if self.head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"["):
            return None
        record = next(iter(records(self.path)), None)
        if not isinstance(record, Record) or record.too_long:
            return None
        try:
            return parse(record.data, refuse_duplicates=False)
        except Bad:
            return None

    @property
    def keys(self) -> frozenset[str]:
        """Keys of `value` if it is an object, else nothing."""
        return frozenset(self.value) if isinstance(self.value, dict) else frozenset()


def each(
    source: str, path: Path, to_episodes: Callable[[Any, Record], Episode | Rejected | Iterable[Episode | Rejected]]
) -> Iterator[Episode | Rejected]:
    """Every record of a JSON file through `to_episodes(value, record)`, which raises Bad for what it cannot use.

    Records that are no JSON, too long or refused become a Rejected with their byte offset; so does a file without
    any record (``empty_file``).
    """
    end = count = 0
    for record in records(path):
        if isinstance(record, Damaged):
            yield damaged(source, path, record, end)
            return
        count += 1
        end = record.offset + len(record.data)
        try:
            if record.too_long:
                raise Bad("too_large", f"the record is longer than {MAX_BYTES} bytes; shorten its pages")
            made = to_episodes(parse(record.data), record)
            if isinstance(made, Episode | Rejected):
                yield made
            else:
                yield from made
        except Bad as bad:
            yield rejected(source, path, bad, record.offset, record.data, record.sha256)
    if not count:
        yield rejected(source, path, Bad("empty_file", "the file holds no record; was it written to the end?"))


def from_lines(
    source: str,
    path: Path,
    check: Callable[[Any, int], object],
    to_episode: Callable[[list[dict[str, Any]], str], Episode],
    most: int,
) -> Episode | Rejected:
    """A file whose lines, at most `most`, are together one episode: ``to_episode(lines, sha256)``.

    `check(value, number)` raises Bad for a line that is not an object it knows; each line gets its ``offset``. One
    line refused refuses the file: without it, it is not the episode that took place.
    """
    values: list[dict[str, Any]] = []
    digest, offset, data = hashlib.sha256(), 0, b""
    try:
        for line in lines(path):
            if isinstance(line, Damaged):
                return damaged(source, path, line, offset)
            offset, data = line.offset, line.data
            digest.update(data + b"\n")
            if line.too_long or len(values) == most:
                raise Bad("too_large", f"a line over {MAX_BYTES} bytes, or over {most} lines; split it")
            value = parse(data)
            check(value, len(values))
            values.append(value | {"offset": offset})
        offset = 0
        if not values:
            raise Bad("empty_file", "the file holds no line; was it written to the end?")
        return to_episode(values, digest.hexdigest())
    except Bad as bad:
        return rejected(source, path, bad, offset, data)


def contents(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The (decompressed) bytes of a file. Raises Bad if it cannot be read, or holds more than `limit` bytes."""
    try:
        data, more = whole(path, limit)
    except Damaged as why:
        raise Bad(why.reason, f"{path.name} cannot be read ({why}); mend or fetch it again") from None
    if more:
        raise Bad("too_large", f"{path.name} holds more than {limit} bytes; shorten or split it")
    return data


def damaged(source: str, path: Path, why: Damaged, offset: int = 0) -> Rejected:
    message = f"the file cannot be read further ({why}); mend or fetch it again"
    return Rejected(source=source, uri=str(path), offset=offset, reason=why.reason, message=message)


def rejected(
    source: str, path: Path, bad: Bad, offset: int = 0, data: bytes = b"", sha256: str | None = None
) -> Rejected:
    """The Rejected that a Bad becomes; `data` are the bytes of the record, for an excerpt."""
    return Rejected(
        source=source,
        uri=str(path),
        offset=offset,
        reason=bad.reason,
        message=bad.message,
        sha256=sha256 or (hashlib.sha256(data).hexdigest() if data else None),
        excerpt=excerpt(data) or None,
    )


# --- typed access -------------------------------------------------------------------------------------------

_KINDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def take(value: Any, key: str, kind: type | tuple[type, ...], place: str = "") -> Any:
    """``value[key]`` if it is of `kind`, None if it is null or absent. `place` is where `value` stands, for messages.

    A whole number is also a float (and is returned as one if only floats are wanted); true and false are no numbers.

    Raises Bad (``wrong_type``), also if `value` is no object.
    """
    if type(value) is not dict:
        raise Bad("wrong_type", f"{place or 'the record'} is not an object")
    item = value.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if item is None or type(item) in kinds:
        return item
    if type(item) is int and float in kinds:
        return float(item)
    wanted = " or ".join(_KINDS[k] for k in kinds)
    here = f"{place}.{key}" if place else key
    raise Bad("wrong_type", f"{here} is {_KINDS.get(type(item), type(item).__name__)}; it must be {wanted}")


def need(value: Any, key: str, kind: type | tuple[type, ...], place: str = "") -> Any:
    """As `take`, but null or absent raises Bad (``missing_key``)."""
    item = take(value, key, kind, place)
    if item is None:
        raise Bad("missing_key", f"{f'{place}.' if place else ''}{key} is missing; it must be logged")
    return item


# --- steps --------------------------------------------------------------------------------------------------


def numbered(steps: Iterable[dict[str, Any]]) -> tuple[Step, ...]:
    """Steps from their fields, numbered from 0. Raises Bad (``no_steps``) if none acts."""
    made = tuple([Step(step=i, **fields) for i, fields in enumerate(steps)])
    if all(step.is_final_observation for step in made):
        raise Bad("no_steps", "the episode holds no action; leave it out, or give its outcome with labels=")
    return made


def give_outcome(steps: list[dict[str, Any]], reward: float | None) -> None:
    """Writes an episode's one outcome as the reward of its last action (``reward_source=outcome``), 0 before.

    None writes nothing: the episode is unlabelled, and its rewards stay null.
    """
    acting = [step for step in steps if not step.get("is_final_observation")]
    if reward is None or not acting:
        return
    for step in acting:
        step["reward"], step["reward_source"] = 0.0, "outcome"
    acting[-1]["reward"] = float(reward)


def call_text(name: str, args: Any) -> str:
    """A tool call as one command: ``search(query="red mug", page=2)``; arguments that are no object stand as JSON."""
    if isinstance(args, dict):
        return f"{name}({', '.join(f'{key}={to_json(item)}' for key, item in args.items())})"
    return f"{name}({'' if args is None else to_json(args)})"


def to_json(value: Any) -> str:
    """Compact JSON, keys in their order. Raises Bad for what JSON cannot say (an integer over 64 bits)."""
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise Bad("out_of_range", f"a value cannot be written as JSON: {error}") from None
