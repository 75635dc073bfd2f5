"""Episodes into the store: identical ones once, unusable ones into ``quarantine``, nothing half visible."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from offline_lm.errors import UserError
from offline_lm.store.connect import explained
from offline_lm.store.rows import Invalid, Rows, convert
from offline_lm.store.tables import Store
from offline_lm.types import Episode, Rejected

Mode = Literal["quarantine", "strict"]

_SECRET = re.compile(
    r"""(?ix)
    (?: \bbearer\s+ | \bsk-
    | \b(?:api[_-]?key|access[_-]?token|token|password|passwd|secret)["']?\s*[:=]\s*["']? )
    [^\s"',;&}]+
    | [\w.+-]+@[\w-]+\.[\w.]+  # mail
    """
)


def add(
    store: Store,
    records: Iterable[Episode | Rejected],
    *,
    mode: Mode = "quarantine",
    batch: int = 500,
    batch_bytes: int = 128 << 20,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Adds ``records`` to ``store`` in batches of ``batch`` episodes or ``batch_bytes`` of Arrow data.

    An episode whose content is in the store already is a duplicate and is left out. One whose identity
    (source, dataset, native id) is there with other content is rejected as ``id_conflict``. In each batch
    the steps are committed before the episodes, both with one ``ingest_id``; the view ``steps`` joins on it.
    So an ingest that dies leaves only whole batches to see, and the same command again completes it.

    Args:
        progress: called once for each record.

    Returns:
        read, accepted, duplicates, quarantined, by_reason, episodes and steps (both: added);
        read = accepted + duplicates + quarantined.

    Raises:
        UserError: mode is ``strict`` and a record was rejected; earlier batches are committed, nothing else.
    """
    if mode not in ("quarantine", "strict"):
        raise UserError(f"mode={mode}: there are quarantine and strict")
    accepted = _Batch(store, str(uuid.uuid4()))
    counts: Counter[str] = Counter()
    by_reason: Counter[str] = Counter()
    known, quarantined = _Known.of(store), _quarantined(store)

    for record in records:
        counts["read"] += 1
        if progress is not None:
            progress()
        result = _accept(record, known, accepted.ingest_id)
        if isinstance(result, Rows):
            counts["accepted"] += 1
            counts["steps"] += result.n_steps
            accepted.add(result)
        elif result is None:
            counts["duplicates"] += 1
        else:
            if mode == "strict":
                raise UserError(f"{result.uri}, at {result.offset}: {result.reason}: {result.message}")
            counts["quarantined"] += 1
            by_reason[result.reason] += 1
            row = _quarantine_row(result, accepted.ingest_id)
            if _key(row) not in quarantined:
                quarantined.add(_key(row))
                accepted.quarantine.append(row)
        if accepted.bytes >= batch_bytes or len(accepted.rows) >= batch or len(accepted.quarantine) >= batch:
            accepted.commit()
    accepted.commit()
    return {
        "read": counts["read"],
        "accepted": counts["accepted"],
        "duplicates": counts["duplicates"],
        "quarantined": counts["quarantined"],
        "by_reason": dict(by_reason.most_common()),
        "episodes": counts["accepted"],
        "steps": counts["steps"],
    }


@dataclass(slots=True)
class _Batch:
    """What has been accepted or rejected and is not committed yet."""

    store: Store
    ingest_id: str
    rows: list[Rows] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0

    def add(self, rows: Rows) -> None:
        self.rows.append(rows)
        self.bytes += rows.steps.nbytes

    def commit(self) -> None:
        """Steps first: they show only once the episodes of the same ingest stand."""
        if self.rows:
            self.store.append("steps", pa.Table.from_batches([rows.steps for rows in self.rows]).combine_chunks())
            self.store.append("episodes", pa.Table.from_batches([rows.episode for rows in self.rows]))
        self.store.append("quarantine", self.quarantine)
        self.rows, self.quarantine, self.bytes = [], [], 0


@dataclass(frozen=True, slots=True)
class _Known:
    """Identity and content of every episode in the store, and of those accepted since."""

    ids: set[str]
    hashes: set[str]

    @classmethod
    def of(cls, store: Store) -> _Known:
        with store.connect() as db, explained(store):
            rows = db.execute("SELECT episode_id, content_hash FROM episodes").fetchall()
        return cls({row[0] for row in rows}, {row[1] for row in rows})


def _accept(record: Episode | Rejected, known: _Known, ingest_id: str) -> Rows | Rejected | None:
    """Rows to add, the reason not to, or None for a duplicate."""
    if isinstance(record, Rejected):
        return record
    try:
        rows = convert(record, ingest_id)
    except Invalid as error:
        return _reject(record, error.reason, str(error))
    if rows.content_hash in known.hashes:
        return None
    if rows.episode_id in known.ids:
        return _reject(
            record,
            "id_conflict",
            "an episode of this source, dataset and id is in the store with other content",
        )
    known.ids.add(rows.episode_id)
    known.hashes.add(rows.content_hash)
    return rows


def _reject(episode: Episode, reason: str, message: str) -> Rejected:
    offset = episode.steps[0].source_offset if episode.steps else None
    return Rejected(
        source=episode.source,
        uri=episode.uri or "(no file)",
        offset=offset if isinstance(offset, int) else 0,
        reason=reason,
        message=f"episode {episode.native_id!r}: {message}",
        sha256=episode.sha256,
        excerpt=f"{episode.task_id}: {episode.goal}",
    )


def _quarantine_row(rejected: Rejected, ingest_id: str) -> dict[str, Any]:
    return {
        "source": _text(rejected.source),
        "uri": _text(rejected.uri),
        "source_offset": rejected.offset if abs(rejected.offset) < 2**63 else None,
        "sha256": None if rejected.sha256 is None else _text(rejected.sha256),
        "reason": rejected.reason,
        "message": _text(rejected.message),
        "excerpt": None if rejected.excerpt is None else _SECRET.sub("[redacted]", _text(rejected.excerpt))[:200],
        "ingest_id": ingest_id,
        "quarantined_at": datetime.now(UTC),
    }


def _text(text: object) -> str:
    """Whatever an episode that is no episode holds; lone surrogates become question marks."""
    return str(text).encode("utf-8", "replace").decode()


_KEY = ("source", "uri", "source_offset", "sha256", "reason", "message")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _quarantined(store: Store) -> set[tuple[Any, ...]]:
    """Records already in quarantine: the same log read again adds nothing there either."""
    with store.connect() as db, explained(store):
        return set(db.execute(f"SELECT {', '.join(_KEY)} FROM quarantine").fetchall())
