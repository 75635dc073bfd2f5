"""A file read by a child process, because the library that reads it cannot be trusted with a damaged one.

Arrow's and HDF5's C and C++ code may abort on such a file, take whatever memory it claims to need, or go round in
circles for ever; nothing inside the process can stop that. The child has a limit on its memory and an alarm clock that
it sets anew for each item; when it dies, the file is damaged and the reader goes on. It is a plain `subprocess`: the
workers of an ingest are daemons, and may have no children by `multiprocessing`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO

import orjson

from offline_lm.logs._files import Damaged, Record, TooLarge, open_file
from offline_lm.logs._records import Bad

MEMORY = 3 << 30
"""Most address space of the child; the memory that it uses is far less, this stops what lies about its size."""
SECONDS = 60
"""Longest that the child may take over one item, in seconds."""
_FRAME = struct.Struct("<cqI")
"""What the child writes: a kind (Row, Bad, too Large or Damaged), an index, a length; so many bytes follow."""

Item = Record | Damaged | tuple[int, Bad]
Reader = Callable[[IO[bytes]], Iterator[Item]]


def read(path: Path, reader: Reader) -> Iterator[Item]:
    """What ``reader(stream)`` yields for the file, run in a child; at the end a Damaged if it did not live to the end.

    `reader` is a function of a module: the child imports it by name. A Record carries its own index as offset.
    """
    try:
        stream = open_file(path)
    except Damaged as why:
        yield why
        return
    with stream, _on_disk(stream) as file:
        call = f"serve({reader.__module__!r}, {reader.__name__!r}, {MEMORY}, {SECONDS})"
        command = [sys.executable, "-c", f"from {__name__} import serve; {call}"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, os.getcwd()])),
            "OPENBLAS_NUM_THREADS": "1",  # each thread reserves address space
        }
        child = subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert child.stdout is not None
        try:
            yield from _frames(child.stdout)
            if code := child.wait():
                silent = code == -signal.SIGALRM
                yield Damaged(f"nothing came of it for {SECONDS} s" if silent else f"its reader gave up, code {code}")
        finally:
            child.stdout.close()
            child.kill()
            child.wait()


def _on_disk(stream: IO[bytes]) -> IO[bytes]:
    """A file that another process can read: the stream itself, or a copy of one from an object store."""
    try:
        stream.fileno()
    except OSError:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.seek(0)
        return copy
    return stream


def _frames(stream: IO[bytes]) -> Iterator[Item]:
    while len(head := stream.read(_FRAME.size)) == _FRAME.size:
        kind, index, length = _FRAME.unpack(head)
        data = stream.read(length)
        if len(data) < length:
            return
        if kind == b"R":
            yield Record(index, data, hashlib.sha256(data).hexdigest(), False)
        elif kind == b"B":
            yield index, Bad(*orjson.loads(data))
        else:
            yield (TooLarge if kind == b"L" else Damaged)(data.decode())


def serve(module: str, name: str, memory: int, seconds: int) -> None:
    """The child: reads the file that is its standard input, and writes frames."""
    reader: Reader = getattr(import_module(module), name)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, also one that never comes back to Python
    signal.alarm(seconds)
    for item in reader(sys.stdin.buffer.raw):  # type: ignore[attr-defined]
        signal.alarm(0)  # whoever reads the frames may take its time
        if isinstance(item, Record):
            kind, index, data = b"R", item.offset, item.data
        elif isinstance(item, Damaged):
            kind = b"L" if isinstance(item, TooLarge) else b"D"
            index, data = 0, str(item).encode("utf-8", "replace")
        else:
            kind, index, data = b"B", item[0], orjson.dumps([item[1].reason, item[1].message])
        sys.stdout.buffer.write(_FRAME.pack(kind, index, len(data)) + data)
        sys.stdout.buffer.flush()
        signal.alarm(seconds)
    signal.alarm(0)
