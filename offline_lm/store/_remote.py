"""The files of a store in an object store, as DuckDB reads them: through fsspec, with the credentials of `deltalake`.

DuckDB's own extension would be a download, and would want its credentials given once more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from deltalake.fs import DeltaStorageHandler
from fsspec import AbstractFileSystem
from pyarrow import fs

BLOCK = 256 << 10
"""Least bytes of a request: DuckDB reads the headers of pages one by one."""


class ObjectStore(AbstractFileSystem):
    """Reads the files below ``url``.

    Args:
        sizes: bytes of every file that can be read, by its URL. They are never asked for: a data file never changes.
    """

    cachable = False

    def __init__(self, url: str, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.protocol = urlsplit(url).scheme
        self._root = f"{url}/"
        self._sizes = sizes
        known = {file.removeprefix(self._root): size for file, size in sizes.items()}
        self._files = fs.PyFileSystem(DeltaStorageHandler(url, known_sizes=known))

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if path not in self._sizes:
            raise FileNotFoundError(path)
        return {"name": path, "size": self._sizes[path], "type": "file"}

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)

    def _open(self, path: str, *_: Any, **__: Any) -> _File:
        return _File(lambda: self._files.open_input_file(path.removeprefix(self._root)), self._sizes[path])


class _File:
    """DuckDB's threads share a file, and each seeks and reads in it: so each thread has a position of its own.

    (Not by `threading.local`: DuckDB's threads are not Python's, and what they hold there is destroyed too late.)
    """

    def __init__(self, open_: Callable[[], pa.NativeFile], size: int) -> None:
        self._open = open_
        self._size = size
        self._positions: dict[int, int] = {}
        self._blocks: dict[int, tuple[int, bytes]] = {}

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._positions[threading.get_ident()] = start + offset
        return start + offset

    def tell(self) -> int:
        return self._positions.get(threading.get_ident(), 0)

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        stop = self._size if size < 0 else min(start + size, self._size)
        begin, block = self._blocks.get(threading.get_ident(), (0, b""))
        if not begin <= start <= stop <= begin + len(block):
            begin = max(0, min(start, self._size - BLOCK))  # the end of a file is read backwards
            with self._open() as stream:
                stream.seek(begin)
                block = stream.read(max(stop - begin, BLOCK))
            self._blocks[threading.get_ident()] = begin, block
        self.seek(stop)
        return block[start - begin : stop - begin]

    def close(self) -> None:
        self._blocks.clear()
