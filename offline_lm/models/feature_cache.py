"""Rows of numbers found by 128-bit keys: an append-only, memory-mapped file that survives kills and is shared.

    FOLDER/rows.bin    the rows end to end, float32 or bfloat16
    FOLDER/keys.bin    the 16-byte key of each row
    FOLDER/index.json  what the rows are of, and how many are whole; replaced atomically, after the data are on disk
    FOLDER/lock        held by the one process that appends; readers never wait

What lies behind the rows that the index counts was cut short by a kill, and is written over.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from offline_lm.errors import UserError

Array = np.ndarray
Dtype = Literal["float32", "bfloat16"]

KEY = 16
COMMIT_S = 5.0
"""Seconds of encoding that a kill may cost."""

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Rows:
    """N rows of a cache as an array [N, d] that is read when it is indexed.

    Attributes:
        shape: (N, d).
        nbytes: bytes that `resident` takes.
    """

    def __init__(self, stored: Array, at: Array) -> None:
        """`stored`: float32 [M, d], or uint16 [M, d] holding bfloat16; `at`: int64 [N], one of its rows for each."""
        self._stored, self._at = stored, at
        self.shape = (len(at), stored.shape[1])
        self.nbytes = len(at) * stored.shape[1] * stored.itemsize

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, rows: Any) -> Array:
        """Rows by number, slice, index array or mask: float32, of a memory of their own."""
        picked = self._stored[self._at[rows]]
        return picked if picked.dtype == np.float32 else (picked.astype(np.uint32) << 16).view(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:].astype(dtype or np.float32, copy=False)

    def resident(self) -> Tensor:
        """All rows [N, d] gathered into memory, in the dtype that they are stored in."""
        picked = self._stored[self._at]
        if picked.dtype == np.float32:
            return torch.from_numpy(picked)
        return torch.from_numpy(picked.view(np.int16)).view(torch.bfloat16)


class FeatureCache:
    """The rows in one folder, as they were when it was opened or last refreshed.

    Args:
        folder: made at the first append.
        of: what the rows are of (weights, readout ...), as JSON has it; the folder must have been written for the same.
        width: numbers in a row.

    Raises:
        UserError: the folder holds rows of something else, or files that do not fit its index.
    """

    def __init__(self, folder: Path, of: dict[str, Any], width: int, dtype: Dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.of = {**of, "width": width, "dtype": dtype}
        self._disk = np.dtype(np.float32 if dtype == "float32" else np.uint16)
        self._sizes = {"rows.bin": width * self._disk.itemsize, "keys.bin": KEY}
        self._width = width
        self.refresh()

    def refresh(self) -> None:
        """Take in what was indexed meanwhile, by whatever process."""
        self._whole = self._indexed()
        self.stored = np.zeros((0, self._width), self._disk)
        keys = np.zeros(0, f"S{KEY}")
        if self._whole:
            keys = np.fromfile(self.folder / "keys.bin", keys.dtype, self._whole)
            mapped = np.memmap(self.folder / "rows.bin", self._disk, "r", shape=(self._whole, self._width))
            self.stored = np.asarray(mapped)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def find(self, keys: Array) -> Array:
        """int64 [n]: the row of each key (S16 [n]); -1 where there is none."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._order[place], -1)

    @contextmanager
    def appending(self) -> Iterator[Appender]:
        """The right to append, for one process at a time; begins with a `refresh`, ends with everything indexed.

        Raises:
            UserError: the folder cannot be written.
        """
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that adds to {self.folder}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.refresh()
            with self._opened("rows.bin") as rows, self._opened("keys.bin") as keys:
                appender = Appender(self, rows, keys, self._whole)
                try:
                    yield appender
                finally:
                    appender.commit()
            self.refresh()

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """A file of the folder, cut to its whole rows, to append to."""
        with self.writing():
            file = (self.folder / name).open("ab")
            file.truncate(self._whole * self._sizes[name])
        try:
            yield file
        finally:
            with self.writing():
                file.close()

    def write_index(self, rows: int) -> None:
        """Say that the first `rows` rows are whole."""
        beside = self.folder / f"index.json.{os.getpid()}"
        with beside.open("w") as file:
            json.dump({"rows": rows, "of": self.of}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.folder / "index.json")

    def _indexed(self) -> int:
        """Rows that the index counts; 0 where there is none."""
        index = self.folder / "index.json"
        if not index.exists():
            return 0
        try:
            content = json.loads(index.read_text())
            rows, of = int(content["rows"]), dict(content["of"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._refused(f"has an index.json that is damaged ({error})") from error
        if other := sorted(name for name in self.of | of if self.of.get(name) != of.get(name)):
            told = ", ".join(f"{name} {of.get(name)} where {self.of.get(name)} is asked for" for name in other)
            raise self._refused(f"holds features of something else ({told})")
        for name, size in self._sizes.items():
            file = self.folder / name
            held = file.stat().st_size if file.exists() else 0
            if held < rows * size:
                raise self._refused(f"is damaged: {name} has {held} bytes where {rows} rows take {rows * size}")
        return rows

    def _refused(self, problem: str) -> UserError:
        return UserError(f"{self.folder} {problem}: remove this folder, and what is needed of it is computed again")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around what writes to the folder: a full disk, say, is the user's to mend."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error}); what was indexed is kept") from error


class Appender:
    """Writes rows behind those of a cache; every `COMMIT_S` seconds they are indexed."""

    def __init__(self, cache: FeatureCache, rows: BinaryIO, keys: BinaryIO, whole: int) -> None:
        self._cache, self._rows, self._keys, self._whole = cache, rows, keys, whole
        self._indexed, self._last = whole, time.monotonic()

    def add(self, keys: Array, values: Tensor) -> None:
        """Append one row of `values` [n, d] for each key (S16 [n]).

        Raises:
            FloatingPointError: a value that is not finite.
        """
        if not values.isfinite().all():
            raise FloatingPointError("the backbone's hidden states are not finite: try model.dtype=float32")
        values = values.to(_TORCH[self._cache.dtype]).cpu().contiguous()
        with self._cache.writing():
            self._rows.write(values.view(torch.uint8).numpy().data)
            self._keys.write(keys.tobytes())
        self._whole += len(keys)
        if time.monotonic() - self._last >= COMMIT_S:
            self.commit()

    def commit(self) -> None:
        """Bring to disk what was added, then count it in the index."""
        if self._whole == self._indexed:
            return
        with self._cache.writing():
            for file in (self._rows, self._keys):
                file.flush()
                os.fsync(file.fileno())
            self._cache.write_index(self._whole)
        self._indexed, self._last = self._whole, time.monotonic()
