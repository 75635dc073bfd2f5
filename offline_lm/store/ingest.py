"""Episodes into the store: identical ones once, unusable ones into ``quarantine``, nothing half visible.

Records become chunks (`chunks`: checked, redacted, as Arrow; by as many processes as one likes), chunks become commits
(`Writer`: one process). In each commit the steps come before the episodes, with one ``ingest_id``; the view ``steps``
joins on it. So an ingest that dies leaves only whole episodes to see, and the same command again completes it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from offline_lm.errors import UserError
from offline_lm.store import schema
from offline_lm.store.media import Media
from offline_lm.store.redact import Redactor, default_patterns
from offline_lm.store.rows import Invalid, Rows, arrow, convert
from offline_lm.store.tables import Store
from offline_lm.types import Episode, Rejected

Mode = Literal["quarantine", "strict"]
CHUNK_ROWS = 512
CHUNK_CHARACTERS = 8 << 20


def add(
    store: Store,
    records: Iterable[Episode | Rejected],
    *,
    mode: Mode = "quarantine",
    batch: int = 500,
    batch_bytes: int = 128 << 20,
    redactor: Redactor | None = None,
    keep_media: bool = True,
    acknowledge: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Adds ``records`` to ``store`` in commits of ``batch`` episodes or ``batch_bytes`` of Arrow data.

    An episode whose content is in the store already is a duplicate and is left out, also if another process put it
    there a moment ago. One whose identity (source, dataset, native id) is there with other content is rejected as
    ``id_conflict``.

    Args:
        redactor: takes secrets out first; one with `default_patterns` if none is given.
        keep_media: copies pictures into the store.
        acknowledge: called after each commit with the counts so far; what it is told is on the disk.

    Returns:
        read, accepted, duplicates, quarantined, by_reason, episodes and steps (both: added), redacted (by kind);
        read = accepted + duplicates + quarantined.

    Raises:
        UserError: mode is ``strict`` and a record was rejected; earlier commits stand, nothing else.
    """
    writer = Writer(store, mode=mode, batch=batch, batch_bytes=batch_bytes, acknowledge=acknowledge)
    media = Media(store, keep=keep_media)
    redactor = redactor or Redactor(default_patterns())
    most_characters = min(CHUNK_CHARACTERS, batch_bytes)
    for chunk in chunks(records, writer.ingest_id, redactor, media, most=batch, most_characters=most_characters):
        writer.take(chunk)
    return writer.finish()


# --- records to chunks --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some records, ready to be committed; it can be sent to another process."""

    read: int
    episodes: pa.RecordBatch
    steps: pa.RecordBatch
    """in the order of the episodes"""
    rows_of: np.ndarray
    """rows of ``steps`` for each episode, the final observation included"""
    rejected: tuple[Rejected, ...]
    redacted: dict[str, int]
    labels_used: frozenset[int] = frozenset()
    """rows of the table of labels that named an episode so far"""


def chunks(
    records: Iterable[Episode | Rejected],
    ingest_id: str,
    redactor: Redactor,
    media: Media,
    *,
    most: int = CHUNK_ROWS,
    most_characters: int = CHUNK_CHARACTERS,
) -> Iterator[Chunk]:
    """Checks, redacts and converts ``records``.

    A chunk ends at ``most`` records, CHUNK_ROWS steps or ``most_characters``, whichever comes first.
    """
    held: list[Episode | Rejected] = []
    characters = steps = 0
    for record in records:
        if isinstance(record, Episode):
            held.append(media.episode(record))  # at once: pictures are not held
            steps += len(record.steps)
            characters += sum(len(step.observation or "") + len(step.messages or "") for step in record.steps)
        else:
            held.append(record)
        if len(held) >= most or steps >= CHUNK_ROWS or characters >= most_characters:
            yield _checked(held, ingest_id, redactor)
            held, characters, steps = [], 0, 0
    yield _checked(held, ingest_id, redactor)


def _checked(records: list[Episode | Rejected], ingest_id: str, redactor: Redactor) -> Chunk:
    redacted = iter(redactor.episodes([record for record in records if isinstance(record, Episode)]))
    good: list[Rows] = []
    rejected: list[Rejected] = []
    for record in records:
        if isinstance(record, Rejected):
            rejected.append(redactor.rejected(record))
            continue
        episode = next(redacted)
        try:
            good.append(convert(episode, ingest_id))
        except Invalid as error:
            rejected.append(redactor.rejected(_reject(episode, error)))
    return _chunk(len(records), good, rejected, redactor)


def _chunk(read: int, good: list[Rows], rejected: list[Rejected], redactor: Redactor) -> Chunk:
    try:
        episodes, steps = arrow(good)
    except Invalid:
        fitting: list[Rows] = []
        for rows in good:
            try:
                arrow([rows])
                fitting.append(rows)
            except Invalid as error:
                rejected.append(redactor.rejected(_reject_row(rows.episode, rows.steps[0].get("source_offset"), error)))
        good = fitting
        episodes, steps = arrow(good)
    redacted = dict(redactor.counts)
    redactor.counts.clear()
    return Chunk(
        read=read,
        episodes=episodes,
        steps=steps,
        rows_of=np.array([len(rows.steps) for rows in good], dtype=np.int64),
        rejected=tuple(rejected),
        redacted=redacted,
    )


def _reject(episode: Episode, error: Invalid) -> Rejected:
    offset = episode.steps[0].source_offset if episode.steps else None
    return Rejected(
        source=episode.source,
        uri=episode.uri or "(no file)",
        offset=offset if isinstance(offset, int) else 0,
        reason=error.reason,
        message=f"episode {episode.native_id!r}: {error}",
        sha256=episode.sha256,
        excerpt=f"{episode.task_id}: {episode.goal}",
    )


def _reject_row(row: dict[str, Any], offset: Any, error: Invalid) -> Rejected:
    """As `_reject`, for an episode that is a row already."""
    came = row["provenance"]
    return Rejected(
        source=row["source"],
        uri=came["uri"] or "(no file)",
        offset=offset if isinstance(offset, int) else 0,
        reason=error.reason,
        message=f"episode {came['native_id']!r}: {error}",
        sha256=came["sha256"],
        excerpt=f"{row['task_id']}: {row['goal']}",
    )


# --- chunks to commits --------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Commits chunks to a store, a batch at a time, and counts what became of each record."""

    store: Store
    mode: Mode = "quarantine"
    batch: int = 500
    batch_bytes: int = 128 << 20
    acknowledge: Callable[[dict[str, Any]], object] | None = None
    ingest_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        if self.mode not in ("quarantine", "strict"):
            raise UserError(f"mode={self.mode}: there are quarantine and strict")
        self._counts: Counter[str] = Counter()
        self._by_reason: Counter[str] = Counter()
        self._redacted: Counter[str] = Counter()
        self._known = _Known(self.store)
        self._quarantined = _Quarantined(self.store)
        self._chunks: list[Chunk] = []
        self._rejected: list[Rejected] = []

    def take(self, chunk: Chunk) -> None:
        """Takes a chunk, and commits when there is enough."""
        self._counts["read"] += chunk.read
        self._redacted.update(chunk.redacted)
        if chunk.rejected and self.mode == "strict":
            raise _strict(chunk.rejected[0])
        self._rejected += chunk.rejected
        if chunk.episodes.num_rows:
            self._chunks.append(chunk)
        episodes = sum(held.episodes.num_rows for held in self._chunks)
        held_bytes = sum(held.steps.nbytes for held in self._chunks)
        if episodes >= self.batch or held_bytes >= self.batch_bytes or len(self._rejected) >= 10 * self.batch:
            self.commit()

    def finish(self) -> dict[str, Any]:
        """Commits the rest; returns the counts that `add` describes."""
        self.commit()
        return self.counts()

    def counts(self) -> dict[str, Any]:
        names = ("read", "accepted", "duplicates", "quarantined")
        return {
            **{name: self._counts[name] for name in names},
            "by_reason": dict(self._by_reason.most_common()),
            "episodes": self._counts["accepted"],
            "steps": self._counts["steps"],
            "redacted": dict(self._redacted.most_common()),
        }

    def commit(self) -> None:
        """Makes what was taken durable and visible: steps, then episodes, then quarantine."""
        conflicts: list[Rejected] = []
        if self._chunks:
            conflicts = self._commit_episodes()
        rejected = [*self._rejected, *conflicts]
        if rejected:
            rows = [_quarantine_row(one, self.ingest_id) for one in rejected]
            self.store.append_checked("quarantine", lambda files: self._quarantined.new(files, rows))
            self._by_reason.update(one.reason for one in rejected)
            self._counts["quarantined"] += len(rejected)
        self._chunks, self._rejected = [], []
        if self.acknowledge is not None:
            self.acknowledge(self.counts())

    def _commit_episodes(self) -> list[Rejected]:
        """Commits what is new of the chunks; returns the episodes whose identity is taken."""
        episodes = pa.Table.from_batches([chunk.episodes for chunk in self._chunks]).combine_chunks()
        steps = pa.Table.from_batches([chunk.steps for chunk in self._chunks])
        rows_of = np.concatenate([chunk.rows_of for chunk in self._chunks])
        ids, hashes = _digests(episodes["episode_id"]), _digests(episodes["content_hash"])
        sort = np.zeros(0)
        committed: pa.Table | None = None

        def new(files: Sequence[str]) -> pa.Table:
            """The episodes that are not in the snapshot with `files`; the same table while they are the same."""
            nonlocal sort, committed
            self._known.refresh(files)
            before, sort = sort, self._known.sort(ids, hashes)
            if committed is None or not np.array_equal(before, sort):
                committed = _where(episodes, sort == _NEW)
            return committed

        first = new(self.store.files("episodes"))
        if self.mode == "strict" and (sort == _TAKEN).any():
            raise _strict(self._conflict(episodes, int(np.argmax(sort == _TAKEN))))
        if first.num_rows:
            self.store.append("steps", _where(steps, np.repeat(sort == _NEW, rows_of)))
            self.store.append_checked("episodes", new)
        self._counts["accepted"] += int((sort == _NEW).sum())
        self._counts["steps"] += sum(episodes["n_steps"].filter(pa.array(sort == _NEW)).to_pylist())
        self._counts["duplicates"] += int((sort == _SAME).sum())
        return [self._conflict(episodes, int(i)) for i in np.flatnonzero(sort == _TAKEN)]

    def _conflict(self, episodes: pa.Table, i: int) -> Rejected:
        reason = "an episode of this source, dataset and id is in the store with other content"
        return _reject_row(episodes.slice(i, 1).to_pylist()[0], None, Invalid("id_conflict", reason))


_NEW, _SAME, _TAKEN = 0, 1, 2
"""What an episode is to a snapshot: not in it; its content is; its identity is, with other content."""


class _Known:
    """Identity and content of every episode of a snapshot, 16 bytes each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: set[str] = set()
        self._ids: set[bytes] = set()
        self._hashes: set[bytes] = set()

    def refresh(self, files: Sequence[str]) -> None:
        """Reads the files that it has not read yet."""
        for file in [file for file in files if file not in self._files]:
            rows = self._store.read_file("episodes", file, ["episode_id", "content_hash"])
            self._ids.update(_digests(rows["episode_id"]))
            self._hashes.update(_digests(rows["content_hash"]))
            self._files.add(file)

    def sort(self, ids: list[bytes], hashes: list[bytes]) -> np.ndarray:
        """For each episode _NEW, _SAME or _TAKEN; the first of two in the same batch is the new one."""
        result = np.zeros(len(ids), dtype=np.int8)
        new_ids: set[bytes] = set()
        new_hashes: set[bytes] = set()
        for i, (id_, digest) in enumerate(zip(ids, hashes, strict=True)):
            if digest in self._hashes or digest in new_hashes:
                result[i] = _SAME
            elif id_ in self._ids or id_ in new_ids:
                result[i] = _TAKEN
            else:
                new_ids.add(id_)
                new_hashes.add(digest)
        return result


def _where(table: pa.Table, mask: np.ndarray) -> pa.Table:
    """`table` where `mask`; itself, not a copy, if that is everywhere."""
    return table if mask.all() else table.filter(pa.array(mask))


def _digests(column: pa.ChunkedArray) -> list[bytes]:
    """The first 128 bits of hashes or UUIDs in hexadecimal."""
    return [bytes.fromhex(text.replace("-", "")[:32]) for text in column.to_pylist()]


def _strict(rejected: Rejected) -> UserError:
    return UserError(f"{rejected.uri}, at {rejected.offset}: {rejected.reason}: {rejected.message}")


# --- quarantine ---------------------------------------------------------------------------------------------

_KEY = ("source", "uri", "source_offset", "sha256", "reason", "message")


def _quarantine_row(rejected: Rejected, ingest_id: str) -> dict[str, Any]:
    return {
        "source": _text(rejected.source),
        "uri": _text(rejected.uri),
        "source_offset": rejected.offset if abs(rejected.offset) < 2**63 else None,
        "sha256": None if rejected.sha256 is None else _text(rejected.sha256),
        "reason": rejected.reason,
        "message": _text(rejected.message),
        "excerpt": None if rejected.excerpt is None else _text(rejected.excerpt)[:200],
        "ingest_id": ingest_id,
        "quarantined_at": datetime.now(UTC),
    }


def _text(text: object) -> str:
    """Whatever an episode that is no episode holds; lone surrogates become question marks."""
    return str(text).encode("utf-8", "replace").decode()


class _Quarantined:
    """Records in quarantine already: the same log read again adds nothing there either."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: set[str] = set()
        self._keys: set[bytes] = set()
        self._last: tuple[list[bytes], pa.Table] | None = None

    def new(self, files: Sequence[str], rows: list[dict[str, Any]]) -> pa.Table:
        """The rows that are not in the snapshot with `files`; the same table while they are the same."""
        for file in [file for file in files if file not in self._files]:
            columns = self._store.read_file("quarantine", file, list(_KEY))
            self._keys.update(_key(row) for row in columns.to_pylist())
            self._files.add(file)
        fresh = {key: row for row in rows if (key := _key(row)) not in self._keys}
        if self._last is None or self._last[0] != list(fresh):
            self._last = list(fresh), pa.Table.from_pylist(list(fresh.values()), schema=schema.QUARANTINE)
        return self._last[1]


def _key(row: dict[str, Any]) -> bytes:
    return hashlib.sha256(repr([row[name] for name in _KEY]).encode()).digest()[:16]
