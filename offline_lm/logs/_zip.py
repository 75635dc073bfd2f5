"""Zip files from strangers: members are read into memory under bounds, and nothing is ever written to disk.

`Archive` looks at every entry of the directory before anything is decompressed and refuses the whole file (Bad) for

- ``path_traversal``: a name that is absolute, has a drive letter, a ``..`` or a NUL
- ``duplicate_member``: two entries of one name (readers differ in which they take)
- ``zip_link``: a symbolic link
- ``zip_encrypted``: an entry that needs a password
- ``zip_method``: a compression other than stored and deflate, whose readers cannot be bounded
- ``zip_bomb``: entries that share bytes; and, while reading, more bytes or a greater ratio than a log has
- ``too_large``: a directory or a member beyond the bounds
- ``unreadable_file``: it cannot be opened
- ``damaged_file``: anything that is no whole zip, or whose bytes do not match its checksum
"""

from __future__ import annotations

import errno
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO

from offline_lm.logs._files import Damaged, open_file
from offline_lm.logs._records import Bad

MAX_MEMBER = 256 << 20
MAX_TOTAL = 512 << 20
"""Decompressed bytes of one member, and of all that are read of one archive."""
MAX_RATIO = 200
"""Decompressed bytes for each compressed one, once a member is longer than `_RATIO_FROM`; deflate can give 1,032."""
_RATIO_FROM = 8 << 20
_MAX_DIRECTORY = 16 << 20
_CHUNK = 1 << 20
_END, _END64 = b"PK\x05\x06", b"PK\x06\x06"
_END_BYTES, _MAX_COMMENT = 22, 65_535
_LOCAL_HEADER = 30
_LINK, _KIND = 0o120000, 0o170000
_DRIVE = re.compile(r"[A-Za-z]:")
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OverflowError, RuntimeError, struct.error)
"""What zipfile raises for bytes that are no zip: its checks are spread over all of these."""


@contextmanager
def _as_bad(name: str = "") -> Iterator[None]:
    try:
        yield
    except _ZIP_ERRORS as error:
        raise _damaged(error, name) from None
    except OSError as error:  # a seek to before the start, which a false offset leads to; others are the disk's
        if error.errno != errno.EINVAL:
            raise
        raise _damaged(error, name) from None


class Archive:
    """A zip file opened for bounded reading; use it as a context manager. See the module for what raises Bad."""

    def __init__(self, path: Path) -> None:
        try:
            self._stream: IO[bytes] = open_file(path)
        except Damaged as why:
            raise Bad(why.reason, f"{path.name}: {why}; mend it or fetch it again") from None
        try:
            _check_directory(self._stream)
            with _as_bad():
                self._zip = zipfile.ZipFile(self._stream)
            self._members = {info.filename: info for info in self._zip.infolist()}
            _check_members(self._zip.infolist())
        except Bad:
            self._stream.close()
            raise
        self._left = MAX_TOTAL

    @property
    def names(self) -> list[str]:
        """Names of the members, in the order of the directory."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str, limit: int = MAX_MEMBER) -> bytes:
        """The bytes of a member, at most `limit`; KeyError for a name that is not in `names`."""
        info = self._members[name]
        if info.file_size > limit:
            raise Bad("too_large", f"{name[:80]} holds {info.file_size} bytes; at most {limit} are read")
        chunks: list[bytes] = []
        length = 0
        with _as_bad(name), self._zip.open(info) as stream:
            while chunk := stream.read(_CHUNK):
                length += len(chunk)
                self._left -= len(chunk)
                self._check_growth(info, length, limit)
                chunks.append(chunk)
        if length != info.file_size:
            raise Bad("damaged_file", f"{name[:80]} holds {length} bytes and not {info.file_size}; fetch it again")
        return b"".join(chunks)

    def _check_growth(self, info: zipfile.ZipInfo, length: int, limit: int) -> None:
        ratio = length / max(info.compress_size, 1)
        if length > limit or self._left < 0:
            raise Bad("zip_bomb", f"{info.filename[:80]} decompresses to more than it declares or than is read")
        if length > _RATIO_FROM and ratio > MAX_RATIO:
            raise Bad("zip_bomb", f"{info.filename[:80]} grows more than {MAX_RATIO} times as it is decompressed")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()
        self._stream.close()


def _damaged(error: Exception, name: str = "") -> Bad:
    where = f"{name[:80]}: " if name else ""
    return Bad("damaged_file", f"{where}not a whole zip file ({str(error)[:100]}); fetch it again")


def _check_directory(stream: IO[bytes]) -> None:
    """The directory is read whole by zipfile, so its size is checked first, by the end record that zipfile takes."""
    size = stream.seek(0, 2)
    stream.seek(max(0, size - _END_BYTES - _MAX_COMMENT))
    tail = stream.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_BYTES:
        raise Bad("damaged_file", "not a whole zip file (it has no directory); was it cut?")
    (length,) = struct.unpack_from("<L", tail, at + 12)
    at64 = tail.rfind(_END64, 0, at)
    if at64 >= 0 and len(tail) - at64 >= 56:
        length = max(length if length < 0xFFFFFFFF else 0, struct.unpack_from("<Q", tail, at64 + 40)[0])
    if length > min(_MAX_DIRECTORY, size):
        if length > size:
            raise Bad("damaged_file", "not a whole zip file (its directory is longer than the file); was it cut?")
        raise Bad("too_large", f"the directory of the zip holds {length} bytes; at most {_MAX_DIRECTORY} are read")


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for info in members:
        name = info.filename.replace("\\", "/")
        shown = repr(info.orig_filename[:80])
        hidden = "\0" in info.orig_filename or name.startswith("/") or _DRIVE.match(name)
        if hidden or ".." in name.split("/"):
            raise Bad("path_traversal", f"the zip holds {shown}, a name that leads out of it; do not trust the file")
        if name in seen:
            raise Bad("duplicate_member", f"the zip holds {shown} twice; which one is meant cannot be told")
        seen.add(name)
        if (info.external_attr >> 16) & _KIND == _LINK:
            raise Bad("zip_link", f"the zip holds {shown}, a symbolic link; pack the file itself")
        if info.flag_bits & 1:
            raise Bad("zip_encrypted", f"{shown} needs a password; pack the files without one")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Bad("zip_method", f"{shown} is compressed by method {info.compress_type}; pack it with deflate")
    ordered = sorted(members, key=lambda info: info.header_offset)
    for info, following in pairwise(ordered):
        if info.header_offset + _LOCAL_HEADER + info.compress_size > following.header_offset:
            raise Bad("zip_bomb", f"{info.filename[:80]!r} and {following.filename[:80]!r} share bytes of the zip")
