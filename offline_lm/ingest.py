"""``python -m offline_lm.ingest``: logs into the store."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from offline_lm import cli, logs
from offline_lm.errors import UserError
from offline_lm.interop.processes import Done, Job, run
from offline_lm.logs._files import walk
from offline_lm.logs._labels import Labels
from offline_lm.store import Store
from offline_lm.store.ingest import Writer

WORTH_PROCESSES = 96 << 20
"""Bytes of log from which starting processes (each a second or two of imports) pays by itself."""
_MEDIA = ("keep", "reference")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("ingest", ingest, argv)


def ingest(cfg: DictConfig) -> dict[str, Any]:
    if cfg.mode not in ("quarantine", "strict"):
        raise UserError(f"mode={cfg.mode}: there are quarantine and strict")
    if cfg.media not in _MEDIA:
        raise UserError(f"media={cfg.media}: there are {' and '.join(_MEDIA)}")
    path = log_path(cfg.path)
    options = cli.plain(cfg).get("options") or {}
    logs.read(cfg.source, path, **options)  # a wrong name is told before a store is made
    labels = None if cfg.labels is None else Labels.load(Path(cfg.labels))
    chunks = engine(cfg.engine)
    size = sum(file.stat().st_size for file in walk(path))
    store = Store.create(cfg.store)
    writer = Writer(store, mode=cfg.mode)
    job = Job(
        source=cfg.source,
        path=path,
        store=store.url,
        ingest_id=writer.ingest_id,
        options=options,
        labels=labels,
        patterns=OmegaConf.to_container(cfg.redact.patterns),  # type: ignore[arg-type]
        keep_media=cfg.media == "keep",
    )
    began = time.monotonic()
    with tqdm(desc="ingest", total=size, unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:
        writer.acknowledge = lambda counts: bar.set_postfix_str(_rate(counts, time.monotonic() - began))
        used: set[int] = set()
        for done in chunks(job, _workers(cfg.workers, size)):
            writer.take(done.chunk)
            used |= done.chunk.labels_used
            bar.update(done.size)
        counts = writer.finish()
    print(summary(counts, store.url))
    if labels is not None:
        counts["labels"] = {"rows": len(labels.rows), "used": len(used)}
        print(f"labels: {len(used)} of {len(labels.rows)} rows of {cfg.labels} named an episode")
    return {**counts, "seconds": round(time.monotonic() - began, 3), "bytes": size}


def engine(name: str) -> Callable[[Job, int], Iterator[Done]]:
    """What runs the adapters: this machine's processes, or Ray or Daft with theirs."""
    if name == "processes":
        return run
    if name == "ray":
        from offline_lm.interop import ray

        return ray.run
    if name == "daft":
        from offline_lm.interop import daft

        return daft.run
    raise UserError(f"engine={name}: there are processes, ray and daft")


def log_path(text: str) -> Path:
    """A local path, or one in an object store: ``s3://bucket/logs``.

    Raises:
        UserError: a URL, and `universal_pathlib` is not installed.
    """
    if "://" not in text:
        return Path(text)
    try:
        from upath import UPath  # pyright: ignore[reportMissingImports] (an extra)
    except ModuleNotFoundError:
        raise UserError(f"path={text} needs `pip install 'offline_lm[s3]'`") from None
    return UPath(text)  # type: ignore[return-value]


def summary(counts: dict[str, Any], store: str) -> str:
    """The counts in words."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts["by_reason"].items())
    redacted = ", ".join(f"{kind} {count}" for kind, count in counts["redacted"].items())
    return (
        f"read {counts['read']}: accepted {counts['accepted']}, duplicates {counts['duplicates']}, "
        f"quarantined {counts['quarantined']}{f' ({reasons})' if reasons else ''}. "
        f"{counts['steps']} steps of {counts['episodes']} episodes added to {store}"
        f"{f'; secrets redacted: {redacted}' if redacted else ''}"
    )


def _workers(given: int | None, size: int) -> int:
    if given is None:
        return (os.cpu_count() or 1) if size >= WORTH_PROCESSES else 1
    if type(given) is not int or given < 1:
        raise UserError(f"workers={given}: a whole number from 1, or null to choose by size, is wanted")
    return given


def _rate(counts: dict[str, Any], seconds: float) -> str:
    return f"{counts['accepted']} episodes, {counts['steps'] / max(seconds, 1e-3):.0f} steps/s"


if __name__ == "__main__":
    sys.exit(main())
