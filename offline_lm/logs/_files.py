"""Opening logs: which files a path means, decompression, and records with their byte offsets.

A path is a `pathlib.Path`, or one that behaves so (`universal_pathlib`, for object stores): nothing here or in an
adapter may ask more of it than ``iterdir``, ``is_dir``, ``is_file``, ``exists``, ``stat``, ``open("rb")``, ``name``,
``suffix``, ``parent``, ``/`` and ``str``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson
import pyarrow as pa

from offline_lm.errors import UserError

MAX_BYTES = 64 << 20
"""Longest record that is read, decompressed: a bound on memory, and on what a compression bomb can do."""
TOTAL_BYTES = 512 << 20
"""Longest file of many records that is held whole (a JSON array; lines are streamed)."""
EXCERPT = 200
_CHUNK = 1 << 20
_PIECE = 16 << 10
_BOM = b"\xef\xbb\xbf"


class Damaged(Exception):
    """The file cannot be read, or not further: ``reason`` is a stable code."""

    reason = "damaged_file"


class Unreadable(Damaged):
    """The file cannot be opened: it is not ours to read, is gone, or is no file (a pipe would wait for ever)."""

    reason = "unreadable_file"


class TooLarge(Damaged):
    """One value is longer than what is held in memory."""

    reason = "too_large"


class Record(NamedTuple):
    """The bytes of one record (a line without its end, say); `data` is cut at MAX_BYTES when `too_long`."""

    offset: int
    """bytes from the start of the (decompressed) file"""
    data: bytes
    sha256: str
    too_long: bool


def walk(path: Path) -> Iterator[Path]:
    """The file `path` itself, or every file below the folder `path` in sorted order, one folder held at a time.

    Names that begin with a dot are left out, as are links to folders (a loop would never end).
    """
    if not path.is_dir():
        yield path
        return
    for entry in sorted(path.iterdir(), key=lambda p: p.name):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield entry
        elif not entry.is_symlink():
            yield from walk(entry)


def find(path: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The file `path` itself, or every file under the folder `path` whose name ends in one of `suffixes`, sorted.

    Raises UserError if there is none.
    """
    return _some(
        path,
        (p for p in walk(path) if p == path or p.name.endswith(suffixes)),
        f"file that ends in {', '.join(suffixes)}",
    )


def find_folders(path: Path, is_one: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """The outermost folders at or below `path` for which `is_one`, sorted; `what` names them in the error.

    Raises UserError if there is none.
    """

    def below(folder: Path) -> Iterator[Path]:
        if is_one(folder):
            yield folder
            return
        for entry in sorted(folder.iterdir(), key=lambda p: p.name):
            if entry.is_dir() and not entry.name.startswith(".") and not entry.is_symlink():
                yield from below(entry)

    return _some(path, below(path) if path.is_dir() else iter(()), what)


def _some(path: Path, found: Iterator[Path], what: str) -> Iterator[Path]:
    nothing = True
    for item in found:
        nothing = False
        yield item
    if nothing:
        raise UserError(f"{path} holds no {what}; name another path")


def open_log(path: Path) -> IO[bytes]:
    """A buffered stream of the bytes of `path`, decompressed if the name ends in .gz or .zst.

    Raises Unreadable if the file cannot be opened.
    """
    if path.suffix == ".gz":
        return io.BufferedReader(_Gzip(open_file(path)), _CHUNK)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path), _CHUNK)
    stream = open_file(path)
    if not isinstance(stream, io.BufferedReader):  # from an object store: its readline takes no limit
        return io.BufferedReader(stream, _CHUNK)  # type: ignore[arg-type]
    return stream


def open_file(path: Path) -> IO[bytes]:
    """A buffered stream of the bytes of `path` as they are. Raises Unreadable if it cannot be opened."""
    try:
        if path.exists() and not path.is_file():
            raise Unreadable("it is no regular file")
        return path.open("rb", buffering=_CHUNK)  # type: ignore[return-value]
    except OSError as error:
        raise Unreadable(f"it cannot be opened: {error.strerror or error}") from None


class _Gzip(gzip.GzipFile):
    """A GzipFile that closes its stream, and gives what it has before it says that the rest is damaged."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(fileobj=stream, mode="rb")
        self._stream = stream

    def close(self) -> None:
        super().close()
        self._stream.close()

    def readinto(
        self, buffer: Any
    ) -> int:  # GzipFile's own reads on until the buffer is full, and loses it if it fails
        return self.readinto1(buffer)


class _Zstd(io.RawIOBase):
    """A zstd file, which also gives everything before the damage.

    Arrow fills a request or fails, and what it had is gone. So on failure the file is read again up to there, and from
    there byte by byte.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._piece = path, 0, _PIECE
        self._open()

    def _open(self) -> None:
        self._file = open_file(self._path)
        self._stream = pa.CompressedInputStream(self._file, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(min(len(buffer), self._piece))
        except OSError as error:
            if self._piece == 1 or error.errno is not None:
                raise
            self._again()
            return self.readinto(buffer)
        self._at += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _again(self) -> None:
        self._file.close()
        self._open()
        left, self._piece = self._at, 1
        while left:
            left -= len(self._stream.read(min(left, _PIECE)))

    def close(self) -> None:
        self._file.close()
        super().close()


def _read(stream: IO[bytes], path: Path, size: int, *, line: bool) -> bytes:
    try:
        return stream.readline(size) if line else stream.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(str(error)) from None
    except OSError as error:  # pyarrow reports a bad zstd frame so; an OSError of the disk itself has an errno
        if error.errno is not None or path.suffix != ".zst":
            raise
        raise Damaged(str(error)) from None


def whole(path: Path, limit: int = MAX_BYTES) -> tuple[bytes, bool]:
    """The (decompressed) bytes of a file, at most `limit`, and whether there were more. Raises Damaged."""
    with open_log(path) as stream:
        data = _read(stream, path, limit + 1, line=False)
    return data[:limit], len(data) > limit


def lines(path: Path, limit: int = MAX_BYTES, *, start: int = 0, stop: int | None = None) -> Iterator[Record | Damaged]:
    """Every line of the file that is not blank; a stream that cannot be read (further) ends with a Damaged.

    With `start` and `stop` only the lines that begin at or after byte `start` and before `stop`: ranges that meet
    share no line and lose none. Only for files that are not compressed.
    """
    try:
        stream = open_log(path)
    except Damaged as error:
        yield error
        return
    with stream:
        offset = start
        if start:
            stream.seek(start - 1)
            offset, rest = start - 1, b""
            while not rest.endswith(b"\n") and (stop is None or offset < stop):  # a line that began before
                if not (rest := stream.readline(_CHUNK)):
                    return
                offset += len(rest)
        while stop is None or offset < stop:
            try:
                data = _read(stream, path, limit + 1, line=True)
                digest, length, too_long = None, len(data), len(data) > limit and not data.endswith(b"\n")
                if too_long:  # hash and drop the rest, chunk by chunk
                    digest, chunk = hashlib.sha256(data), data
                    while chunk and not chunk.endswith(b"\n"):
                        chunk = _read(stream, path, _CHUNK, line=True)
                        digest.update(chunk.rstrip(b"\r\n"))
                        length += len(chunk)
                    data = data[:limit]
            except Damaged as error:
                yield error
                return
            if not length:
                return
            begin = offset
            offset += length
            if begin == 0 and data.startswith(_BOM):
                data, begin = data[len(_BOM) :], len(_BOM)
            data = data.rstrip(b"\r\n")
            if data and not data.isspace():
                sha256 = (digest or hashlib.sha256(data)).hexdigest()
                yield Record(begin, data, sha256, too_long)


# A string, or a bracket outside strings. Possessive, so that a quote without an end costs no backtracking.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_GAP = re.compile(rb"[^\s,]")
_TOO_DEEP = 4096


def records(path: Path, limit: int = MAX_BYTES, total: int = TOTAL_BYTES) -> Iterator[Record | Damaged]:
    """The records of a JSON file, whichever way it holds them: lines, one array of them, or values one after another.

    A name that ends in .jsonl (.gz, .zst), or a first line that is JSON by itself, means lines, read as a stream. A
    file that begins with ``[`` is an array, and each element a record; everything else is one JSON value or several
    that follow each other. These two are held in memory, up to `total` bytes.
    """
    stem = path.name.removesuffix(".gz").removesuffix(".zst")
    try:
        by_line = stem.endswith((".jsonl", ".ndjson")) or _first_line_is_json(path, limit)
        if not by_line:
            data, more = whole(path, total)
    except Damaged as damaged:
        yield damaged
        return
    if by_line:
        yield from lines(path, limit)
        return
    if more:
        yield TooLarge(f"it is one JSON value of more than {total} bytes; write one episode a line")
        return
    for begin, end in _values(data):
        part = data[begin:end]
        yield Record(begin, part[:limit], hashlib.sha256(part).hexdigest(), len(part) > limit)


def _first_line_is_json(path: Path, limit: int) -> bool:
    with open_log(path) as stream:
        line = _read(stream, path, limit, line=True).removeprefix(_BOM).strip()
        if not line.startswith(b"{"):
            return False
        if not _read(stream, path, 1, line=False):
            return True  # one line is one value, whichever way it is read
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _values(data: bytes) -> Iterator[tuple[int, int]]:
    """(begin, end) of each element of the array that `data` begins with, else of each value."""
    first = _GAP.search(data, len(_BOM) if data.startswith(_BOM) else 0)
    if first is None:
        return
    inside = first[0] == b"["
    at = first.end() if inside else first.start()
    depth, begin = 0, at
    for token in _TOKEN.finditer(data, at):
        kind = token[0][:1]
        if kind in b"{[":
            if depth == 0:
                if gap := _GAP.search(data, at, token.start()):  # neither object nor array: kept, to be refused
                    yield gap.start(), token.start()
                begin = token.start()
            depth += 1
            if depth > _TOO_DEEP:  # whatever follows: no parser takes it, and half a gigabyte of brackets takes minutes
                break
        elif kind in b"}]":
            depth -= 1
            if depth == 0:
                at = token.end()
                yield begin, at
            elif depth < 0:  # the array ends, or one bracket too many
                if gap := _GAP.search(data, at, token.start()):
                    yield gap.start(), token.start()
                if rest := _GAP.search(data, token.end()):
                    yield rest.start(), len(data)
                return
    if depth > 0:  # cut short
        yield begin, len(data)
    elif gap := _GAP.search(data, at):
        yield gap.start(), len(data)


def excerpt(data: bytes) -> str:
    """The first characters of a record, made printable."""
    text = data[: 4 * EXCERPT].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:EXCERPT])
