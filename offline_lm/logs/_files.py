"""Opening logs: which files a path means, decompression, and lines with their byte offsets."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow as pa

from offline_lm.errors import UserError

MAX_BYTES = 64 << 20
"""Longest record that is read, decompressed: a bound on memory, and on what a compression bomb can do."""
EXCERPT = 200
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Damaged(Exception):
    """The compressed stream cannot be read further."""


class Line(NamedTuple):
    """A raw line without its end; `data` is cut at MAX_BYTES when `too_long`."""

    offset: int
    """bytes from the start of the (decompressed) file"""
    data: bytes
    sha256: str
    too_long: bool


def find(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file `path` itself, or every file under the folder `path` whose name ends in one of `suffixes`,
    sorted.

    Raises UserError if there is none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.name.endswith(suffixes) and p.is_file())
    if not files:
        raise UserError(f"{path} holds no file that ends in {', '.join(suffixes)}; name another path")
    return files


def open_log(path: Path) -> IO[bytes]:
    """A buffered stream of the bytes of `path`, decompressed if the name ends in .gz or .zst.

    Raises UserError if the file cannot be opened.
    """
    try:
        if path.suffix == ".gz":
            return io.BufferedReader(gzip.GzipFile(path, "rb"), _CHUNK)
        if path.suffix == ".zst":
            return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), _CHUNK)  # type: ignore[arg-type]
        return path.open("rb", buffering=_CHUNK)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror or error}") from None


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


def lines(path: Path, limit: int = MAX_BYTES) -> Iterator[Line | Damaged]:
    """Every line of the file that is not blank; a damaged stream ends with a Damaged."""
    offset = 0
    with open_log(path) as stream:
        while True:
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
            start = offset
            offset += length
            if start == 0 and data.startswith(_BOM):
                data, start = data[len(_BOM) :], len(_BOM)
            data = data.rstrip(b"\r\n")
            if data.strip():
                sha256 = (digest or hashlib.sha256(data)).hexdigest()
                yield Line(start, data, sha256, too_long)


def excerpt(data: bytes) -> str:
    """The first characters of a record, made printable."""
    text = data[: 4 * EXCERPT].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:EXCERPT])
