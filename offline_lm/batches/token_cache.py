"""Tokens on disk: written as they are made, and copied from an earlier cache where that holds the same episodes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from offline_lm.batches.tokens import Tokens, moved, tokenized_parts

Array = np.ndarray

_COPIED = 65_536
"""States that are copied at a time."""


class _Column:
    """A .npy file that grows at its end; its header is written again, with the length, when it is whole.

    NumPy pads headers so that the length of the first axis may grow to 21 digits in place.
    """

    def __init__(self, file: Path) -> None:
        self.file: IO[bytes] = file.open("w+b")
        self.like: Array | None = None
        self.rows = 0

    def append(self, array: Array) -> None:
        if self.like is None:
            self.like = array[:0]
            self._header()
        assert (array.dtype, array.shape[1:]) == (self.like.dtype, self.like.shape[1:])
        self.file.write(np.ascontiguousarray(array).data)
        self.rows += len(array)

    def _header(self) -> None:
        assert self.like is not None
        shape = (self.rows, *self.like.shape[1:])
        described = {"descr": np.lib.format.dtype_to_descr(self.like.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, described)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


def write(folder: Path, parts: Iterable[Tokens]) -> None:
    """Write tokens as they come, a .npy file for every column; one part at a time is held in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {f.name: _Column(folder / f"{f.name}.npy") for f in fields(Tokens)}
    for part in moved(parts):
        for name, array in part.items():
            columns[name].append(array)
    for column in columns.values():
        column.close()


def cached(
    root: Path,
    settings: str,
    episodes: Sequence[str],
    contents: Sequence[str],
    offsets: Array,
    steps: Callable[[list[str] | None], Iterable[dict[str, Any]]],
    tokenizer: Any,
    *,
    max_tokens: int,
    history: int,
    context: str,
    grounding: bool = False,
) -> Tokens:
    """The tokens of these episodes, memory-mapped; what no cache under `root` holds yet is made and kept there.

    Episodes that another cache with the same settings holds are copied from it, and the tokenizer sees the new ones
    alone. What an episode is, its content says: after a repair another may have its id. Folders appear whole or not
    at all.

    Args:
        root: the store's folder for tokens.
        settings: name of all that tokens depend on beside the episodes: tokenizer, renderer and their options.
        episodes, offsets: ids [E] in the order of the rows, and int64 [E+1] their borders, as `Replay` has them.
        contents: [E], the hash of each episode's content.
        steps: the rows of some of these episodes, or for None of all, in that order.
    """
    digest = hashlib.sha256("\n".join(contents).encode() + np.ascontiguousarray(offsets).tobytes())
    folder = root / settings / digest.hexdigest()[:20]
    if not (folder / "meta.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        earlier, at = _earlier(folder.parent, contents, np.diff(offsets))
        missing = [e for e, row in zip(episodes, at.tolist(), strict=True) if row < 0]
        options = {"max_tokens": max_tokens, "history": history, "context": context, "grounding": grounding}
        with tempfile.TemporaryDirectory(prefix="partial-", dir=folder.parent) as scratch:
            new, whole = Path(scratch) / "new", Path(scratch) / "whole"
            if earlier is None:
                write(whole, tokenized_parts(steps(None), tokenizer, **options))
            else:
                write(new, tokenized_parts(steps(missing), tokenizer, **options))
                write(whole, _merged(earlier, Tokens.load(new), at, np.diff(offsets)))
            np.save(whole / "contents.npy", np.array(contents))
            np.save(whole / "offsets.npy", offsets)
            (whole / "meta.json").write_text(
                json.dumps({"episodes": len(episodes), "copied": len(episodes) - len(missing)})
            )
            try:
                whole.rename(folder)
            except OSError:
                if not (folder / "meta.json").exists():  # else another run was here first, with the same
                    raise
    return Tokens.load(folder)


def _earlier(folder: Path, contents: Sequence[str], lengths: Array) -> tuple[Tokens | None, Array]:
    """The cache that holds most of these episodes; and int64 [E], the row where each begins there, else -1."""
    found, best = None, np.full(len(contents), -1, np.int64)
    for meta in folder.glob("*/meta.json"):
        held = np.load(meta.parent / "contents.npy")
        offsets = np.load(meta.parent / "offsets.npy")
        place = {
            (content, n): start
            for content, n, start in zip(held.tolist(), np.diff(offsets).tolist(), offsets[:-1].tolist(), strict=True)
        }
        at = np.array([place.get(key, -1) for key in zip(contents, lengths.tolist(), strict=True)], np.int64)
        if (at >= 0).sum() > (best >= 0).sum():
            found, best = meta.parent, at
    return (None if found is None else Tokens.load(found)), best


def _merged(earlier: Tokens, new: Tokens, at: Array, lengths: Array) -> Iterator[Tokens]:
    """Rows of episodes from the one or the other; episodes that stand together there are copied together."""
    held = at >= 0
    made = np.where(held, 0, lengths)
    start = np.where(held, at, np.cumsum(made) - made)
    follows = (held[1:] == held[:-1]) & (start[1:] == start[:-1] + lengths[:-1])
    for run in np.split(np.arange(len(at)), np.flatnonzero(~follows) + 1):
        source = earlier if held[run[0]] else new
        first, last = int(start[run[0]]), int(start[run[-1]] + lengths[run[-1]])
        for a in range(first, last, _COPIED):
            yield source.part(a, min(a + _COPIED, last))
