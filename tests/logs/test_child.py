"""Readers that hang, die or want too much memory: the file is damaged, the process that asked goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

import pytest

from offline_lm.logs import _child
from offline_lm.logs._child import Item
from offline_lm.logs._files import Damaged, Record, TooLarge
from offline_lm.logs._records import Bad

# --- readers, run in a child --------------------------------------------------------------------------------


def healthy(stream: IO[bytes]) -> Iterator[Item]:
    for i, line in enumerate(stream.read().split()):
        yield (i, Bad("bad_value", "an e")) if line == b"e" else Record(i, line, "", False)


def hanging(stream: IO[bytes]) -> Iterator[Item]:
    yield Record(0, b"a", "", False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    while True:
        pass


def killed(stream: IO[bytes]) -> Iterator[Item]:
    yield Record(0, b"a", "", False)
    os.kill(os.getpid(), signal.SIGKILL)


def aborting(stream: IO[bytes]) -> Iterator[Item]:
    yield Record(0, b"a", "", False)
    os.abort()


def greedy(stream: IO[bytes]) -> Iterator[Item]:
    try:
        yield Record(len(bytearray(8 << 30)), b"a", "", False)
    except MemoryError:
        yield TooLarge("too much")


def raising(stream: IO[bytes]) -> Iterator[Item]:
    yield Record(0, b"a", "", False)
    raise AssertionError("a fault of ours")


def endless(stream: IO[bytes]) -> Iterator[Item]:
    while True:
        yield Record(0, b"a" * 10_000, "", False)


# --- who asks -----------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    (tmp_path / "log").write_bytes(b"a b e c")
    return tmp_path / "log"


def test_a_healthy_file(path):
    a, b, e, c = _child.read(path, healthy)
    assert [(i.offset, i.data, i.too_long) for i in (a, b, c) if isinstance(i, Record)] == [
        (0, b"a", False),
        (1, b"b", False),
        (3, b"c", False),
    ]
    assert isinstance(a, Record)
    assert a.sha256 == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert isinstance(e, tuple)
    assert (e[0], str(e[1])) == (2, "an e")


@pytest.mark.parametrize(("reader", "code"), [(killed, -9), (aborting, -6), (raising, 1)])
def test_a_child_that_dies(path, reader, code):
    first, last = _child.read(path, reader)
    assert isinstance(first, Record)
    assert isinstance(last, Damaged)
    assert str(last) == f"its reader gave up, code {code}"
    assert last.reason == "damaged_file"


def test_a_child_that_hangs(path, monkeypatch):
    monkeypatch.setattr(_child, "SECONDS", 1)
    first, last = _child.read(path, hanging)
    assert isinstance(first, Record)
    assert isinstance(last, Damaged)
    assert str(last) == "nothing came of it for 1 s"


def test_who_asks_may_take_its_time(path, monkeypatch):
    monkeypatch.setattr(_child, "SECONDS", 1)
    items = _child.read(path, endless)
    for _ in range(20):  # more than a pipe holds: the child waits
        next(items)
    time.sleep(2)
    for _ in range(40):
        assert isinstance(next(items), Record)
    del items


def test_a_child_that_wants_too_much_memory(path):
    (item,) = _child.read(path, greedy)
    assert isinstance(item, TooLarge)
    assert item.reason == "too_large"


def test_leaving_early_ends_the_child(path, monkeypatch):
    made: list[Any] = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **keys: made.append(start(*args, **keys)) or made[-1])
    items = _child.read(path, endless)
    next(items)
    del items
    assert made[0].poll() is not None


def test_a_file_that_cannot_be_opened(tmp_path):
    (item,) = _child.read(tmp_path / "none", healthy)
    assert isinstance(item, Damaged)
    assert item.reason == "unreadable_file"


_DAEMON = """
import multiprocessing, sys
from pathlib import Path
from offline_lm.logs import _child
from test_child import healthy

def count(path):
    return sum(1 for _ in _child.read(Path(path), healthy))

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its workers are daemons
        print(pool.apply(count, (sys.argv[1],)))
"""


def test_inside_a_daemon(path, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_DAEMON)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    made = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True, check=True, env=environment
    )
    assert made.stdout.strip() == "4"
