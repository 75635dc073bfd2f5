"""Damage to a store, found and mended: what `python -m offline_lm.doctor` does. For stores in a folder.

A power cut or a failing disk leaves logs that are cut short or empty, files that are missing, or shorter than they
were. Nothing is deleted here: what is damaged moves to ``STORE/lost/``, and what it held is named, so that the logs it
came from can be ingested again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from deltalake.transaction import RemoveAction

from offline_lm.errors import UserError
from offline_lm.store import commits, schema
from offline_lm.store.tables import Store, first_entry

_ENTRY = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\.parquet")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a store."""

    kind: str
    """log_empty, log_torn, log_missing, checkpoint_torn, file_missing, file_torn, episode_incomplete, media_missing,
    or episode_unseen: its file is there, and no snapshot has it"""
    table: str
    place: str
    """a file below the store, or an episode"""
    message: str
    lost: tuple[str, ...] = ()
    """what to ingest again: logs, or episodes where the log is not known"""
    harmless: bool = False
    """nothing that was accepted is missing"""


def examine(url: str | Path, *, deep: bool = False) -> list[Finding]:
    """Everything that is wrong with the store; with ``deep`` every page of every file is read.

    Raises:
        UserError: no store in a folder is there.
    """
    store = _local(url)
    findings = [finding for table in _tables(store) for finding in _examine_log(store, table)]
    if findings:
        return findings  # what the log does not tell cannot be looked at
    findings += [finding for table in _tables(store) for finding in _examine_files(store, table, deep)]
    if any(finding.kind.startswith("file_") for finding in findings):
        return findings
    return [*findings, *_examine_episodes(store), *_examine_unseen(store), *_examine_media(store)]


def repair(url: str | Path, *, deep: bool = False) -> list[Finding]:
    """Brings the store to its last good snapshot; returns what was found on the way, `Finding.lost` included.

    A damaged entry of the log is replaced by an empty one, so that the entries after it hold. Damaged data files
    leave the snapshot, and so do episodes that lost steps: ingesting their log again accepts them again.

    Raises:
        UserError: no store is there, or it cannot be mended.
    """
    store = _local(url)
    lost = Path(store.url, "lost", f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}")
    found: list[Finding] = []
    for _ in range(10):  # mending one layer shows the next
        findings = [f for f in examine(store.url, deep=deep) if f.kind in _MENDERS]
        if not findings:
            return found
        found += findings
        for finding in findings:
            _MENDERS[finding.kind](store, finding, lost)
        _mend_episodes(store, {finding.place for finding in findings if finding.kind == "episode_incomplete"})
    raise UserError(f"{store.url} is not whole after ten rounds of repair; the last finding: {found[-1].message}")


def _local(url: str | Path) -> Store:
    store = Store.at_url(url)
    if not store.is_local:
        raise UserError(f"{store.url} is remote: an object store writes whole files or none; doctor looks at folders")
    if not Path(store.url, "tables").is_dir():
        raise UserError(f"no store at {store.url}: it has no folder `tables`")
    return store


def _tables(store: Store) -> list[str]:
    return [table for table in schema.TABLES if Path(store.table_url(table)).is_dir()]


# --- the log ------------------------------------------------------------------------------------------------


def _examine_log(store: Store, table: str) -> Iterator[Finding]:
    log = Path(store.table_url(table), "_delta_log")
    names = sorted(path.name for path in log.iterdir()) if log.is_dir() else []
    versions = {int(match[1]) for name in names if (match := _ENTRY.fullmatch(name))}
    for version in range(max(versions, default=0) + 1):
        path = log / f"{version:020}.json"
        if version not in versions:
            yield _finding(store, table, "log_missing", path, "a commit is missing from the log")
        elif not path.stat().st_size:
            yield _finding(store, table, "log_empty", path, "the commit is empty: it was not on the disk yet")
        elif (torn := _torn_entry(path)) or (version == 0 and not _has_metadata(path)):
            yield _finding(store, table, "log_torn", path, f"the commit cannot be read ({torn or 'no metadata'})")
    pointer = log / "_last_checkpoint"
    for name in names:
        if _CHECKPOINT.fullmatch(name) and (torn := _unreadable(log / name)):
            yield _finding(store, table, "checkpoint_torn", log / name, f"the checkpoint cannot be read ({torn})")
    if pointer.exists() and _bad_pointer(pointer):
        yield _finding(store, table, "checkpoint_torn", pointer, "it names no checkpoint that is there")


def _torn_entry(path: Path) -> str | None:
    try:
        lines = path.read_bytes().decode().splitlines()
        if not all(isinstance(json.loads(line), dict) for line in lines if line.strip()):
            return "a line is no object"
    except (ValueError, RecursionError) as error:
        return str(error)[:100]
    return None if any(line.strip() for line in lines) else "blank"


def _has_metadata(path: Path) -> bool:
    keys = {key for line in path.read_text().splitlines() if line.strip() for key in json.loads(line)}
    return {"metaData", "protocol"} <= keys


def _bad_pointer(pointer: Path) -> bool:
    try:
        version = json.loads(pointer.read_bytes())["version"]
    except (ValueError, KeyError, TypeError):
        return True
    return type(version) is not int or not (pointer.parent / f"{version:020}.checkpoint.parquet").exists()


def _finding(store: Store, table: str, kind: str, path: Path, message: str) -> Finding:
    place = str(path.relative_to(store.url))
    return Finding(kind, table, place, f"{place}: {message}")


def _mend_entry(store: Store, finding: Finding, lost: Path) -> None:
    """An entry that changes nothing in place of the damaged one; version 0 also says what the table is."""
    path = Path(store.url, finding.place)
    _move(store, path, lost)
    info = {"commitInfo": {"timestamp": int(time.time() * 1000), "operation": "REPAIR", "by": "offline_lm.doctor"}}
    text = json.dumps(info) if int(path.stem) else first_entry(finding.table)
    beside = path.with_name(f".{path.name}.{time.time_ns()}")
    beside.write_text(text, encoding="utf-8")
    commits.sync(beside)
    beside.rename(path)
    commits.sync(path.parent)


def _mend_checkpoint(store: Store, finding: Finding, lost: Path) -> None:
    """Every entry is kept, so a checkpoint is only a shortcut."""
    _move(store, Path(store.url, finding.place), lost)


# --- data files ---------------------------------------------------------------------------------------------


def _examine_files(store: Store, table: str, deep: bool) -> Iterator[Finding]:
    delta = _opened(store, table)
    rows = pa.table(delta.get_add_actions(flatten=True)).to_pylist()
    for row in rows:
        path = Path(store.table_url(table), row["path"])
        if not path.exists():
            kind, why = "file_missing", "it is gone"
        elif torn := _torn(path, row["size_bytes"], deep):
            kind, why = "file_torn", f"it cannot be read ({torn})"
        else:
            continue
        count = row.get("num_records")
        yield Finding(
            kind,
            table,
            str(path.relative_to(store.url)),
            f"{path.relative_to(store.url)}: {why}; it held {'some' if count is None else count} rows of {table}",
            _lost_with(store, table, path.name) if table in ("episodes", "steps") else (),
        )


def _opened(store: Store, table: str) -> DeltaTable:
    try:
        return store.delta(table)
    except (DeltaError, UserError) as error:
        raise UserError(f"{store.table_url(table)}: its log is whole, yet it cannot be opened: {error}") from error


def _torn(path: Path, size: int, deep: bool) -> str | None:
    """What is wrong with a data file; with `deep` its bytes are compared with the hash in its name."""
    if path.stat().st_size != size:
        return f"{path.stat().st_size} bytes of {size}"
    if deep and (digest := commits.digest_in(path.name)):
        return None if commits.digest_of(path) == digest else "its bytes are not those that were written"
    return _unreadable(path) if deep else None


def _unreadable(path: Path) -> str | None:
    """DuckDB's complaint about a Parquet file. (pyarrow aborts the process over some damaged footers.)"""
    name = "'" + str(path).replace("'", "''") + "'"
    with duckdb.connect() as db:
        try:
            db.execute(f"SELECT count(COLUMNS(*)) FROM read_parquet({name})")
        except duckdb.Error as error:
            return (str(error).splitlines() or [type(error).__name__])[0][:100]
    return None


def _lost_with(store: Store, table: str, name: str) -> tuple[str, ...]:
    """What can still be said of the rows of a lost file: logs of the episodes whose steps, or ids whose rows, it held.

    The other table is read as far as its own files can be.
    """
    other = "steps" if table == "episodes" else "episodes"
    have = _readable(store, table, ["episode_id", "ingest_id"], without=name)
    keys = {(row["episode_id"], row["ingest_id"]) for row in have}
    columns = ["episode_id", "ingest_id"] + (["provenance"] if other == "episodes" else [])
    gone = [row for row in _readable(store, other, columns) if (row["episode_id"], row["ingest_id"]) not in keys]
    return tuple(sorted({_name(row) for row in gone}))


def _name(row: dict[str, Any]) -> str:
    came = row.get("provenance") or {}
    return f"{came['uri']} ({came['native_id']})" if came.get("uri") else f"episode {row['episode_id']}"


def _readable(store: Store, table: str, columns: list[str], without: str = "") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in store.files(table):
        if Path(file).name == without:
            continue
        with suppress(OSError, pa.ArrowException):  # the file is a finding of its own
            rows += store.read_file(table, file, columns).to_pylist()
    return rows


def _mend_file(store: Store, finding: Finding, lost: Path) -> None:
    """The snapshot goes on without the file."""
    path = Path(store.url, finding.place)
    if path.exists():
        _move(store, path, lost)
    delta = store.delta(finding.table)
    remove = RemoveAction(path.name, True, int(time.time() * 1000))
    commits.commit(finding.table, store.table_url(finding.table), delta, [remove], {"by": "doctor"})


# --- episodes -----------------------------------------------------------------------------------------------


def _examine_episodes(store: Store) -> Iterator[Finding]:
    """Episodes that do not have all their steps, or stand twice."""
    with store.connect() as db:
        rows = db.execute("""
            WITH held AS (
                SELECT episode_id, count(*) FILTER (NOT is_final_observation) AS n,
                       count(DISTINCT step) AS d, count(*) AS c
                FROM steps GROUP BY episode_id
            )
            SELECT e.episode_id, any_value(e.provenance.uri), any_value(e.provenance.native_id),
                   any_value(e.n_steps), coalesce(any_value(h.n), 0), count(*)
            FROM stored_episodes AS e LEFT JOIN held AS h USING (episode_id)
            GROUP BY e.episode_id
            HAVING any_value(e.n_steps) <> coalesce(any_value(h.n), 0) OR count(*) > 1 OR any_value(h.d <> h.c)
            ORDER BY e.episode_id
        """).fetchall()
    for episode_id, uri, native_id, wanted, held, times in rows:
        name = _name({"episode_id": episode_id, "provenance": {"uri": uri, "native_id": native_id}})
        message = f"{name}: {held} of {wanted} steps, {times} rows of episodes"
        yield Finding("episode_incomplete", "episodes", episode_id, message, (name,))


def _mend_episodes(store: Store, incomplete: set[str]) -> None:
    """The episodes leave the snapshot: what has a part of its steps only would teach a wrong return."""
    url = store.table_url("episodes")
    for file in store.files("episodes") if incomplete else ():
        rows = store.read_file("episodes", file, schema.EPISODES.names)
        keep = pa.array([id_ not in incomplete for id_ in rows["episode_id"].to_pylist()])
        kept = rows.filter(keep).combine_chunks()
        if kept.num_rows == rows.num_rows:
            continue
        actions: list[Any] = [RemoveAction(Path(file).name, True, int(time.time() * 1000))]
        delta = store.delta("episodes")
        if kept.num_rows:
            actions.append(commits.write_file("episodes", url, kept.to_batches()))
        commits.commit("episodes", url, delta, actions, {"by": "doctor"})


def _examine_unseen(store: Store) -> Iterator[Finding]:
    """Episodes in files that no snapshot has: of a writer that was killed before it committed, or of a lost commit."""
    known = {Path(file).name for file in store.files("episodes")}
    history = _ever_added(store, "episodes")
    seen = {row["episode_id"] for row in _readable(store, "episodes", ["episode_id"])}
    for path in sorted(Path(store.table_url("episodes")).glob("*.parquet")):
        if path.name in known or path.name in history or _unreadable(path):
            continue
        rows = store.read_file("episodes", str(path), ["episode_id", "provenance"]).to_pylist()
        names = tuple(sorted(_name(row) for row in rows if row["episode_id"] not in seen))
        if names:
            place = str(path.relative_to(store.url))
            message = f"{place}: {len(names)} episodes that were not committed, or whose commit is lost"
            yield Finding("episode_unseen", "episodes", place, message, names, harmless=True)


def _ever_added(store: Store, table: str) -> set[str]:
    names: set[str] = set()
    for entry in Path(store.table_url(table), "_delta_log").glob("*.json"):
        for line in entry.read_text().splitlines():
            action = json.loads(line) if line.strip() else {}
            if isinstance(add := action.get("add"), dict):
                names.add(str(add.get("path")))
    return names


def _examine_media(store: Store) -> Iterator[Finding]:
    with store.connect() as db:
        rows = db.execute("""
            SELECT DISTINCT screenshot.sha256 FROM steps WHERE screenshot.status = 'stored' ORDER BY 1
        """).fetchall()
    media = Path(store.url, "media")
    for (sha256,) in rows:
        if not any(path.stat().st_size for path in (media / sha256[:2]).glob(f"{sha256}*")):
            place = f"media/{sha256[:2]}/{sha256}"
            yield Finding("media_missing", "steps", place, f"{place}: the picture is gone", (place,))


_MENDERS = {
    "log_empty": _mend_entry,
    "log_torn": _mend_entry,
    "log_missing": _mend_entry,
    "checkpoint_torn": _mend_checkpoint,
    "file_missing": _mend_file,
    "file_torn": _mend_file,
    "episode_incomplete": lambda store, finding, lost: None,  # all at once, at the end of a round
}


def _move(store: Store, path: Path, lost: Path) -> None:
    if not path.exists():
        return
    to = lost / path.relative_to(store.url)
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
    commits.sync(to.parent)
    commits.sync(path.parent)
