"""``python -m offline_lm.ingest``: logs into the store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from offline_lm import cli, logs
from offline_lm.errors import UserError
from offline_lm.store import Store
from offline_lm.store.ingest import add


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("ingest", ingest, argv)


def ingest(cfg: DictConfig) -> dict[str, Any]:
    if cfg.mode not in ("quarantine", "strict"):
        raise UserError(f"mode={cfg.mode}: there are quarantine and strict")
    options = OmegaConf.to_container(cfg.options)
    records = logs.read(cfg.source, Path(cfg.path), **options)  # type: ignore[arg-type]
    store = Store.create(cfg.store)
    with tqdm(desc="ingest", unit=" episodes", file=sys.stderr, disable=None, mininterval=0.5) as bar:
        counts = add(store, records, mode=cfg.mode, progress=bar.update)
    print(summary(counts, store.url))
    return counts


def summary(counts: dict[str, Any], store: str) -> str:
    """The counts in words."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts["by_reason"].items())
    return (
        f"read {counts['read']}: accepted {counts['accepted']}, duplicates {counts['duplicates']}, "
        f"quarantined {counts['quarantined']}{f' ({reasons})' if reasons else ''}. "
        f"{counts['steps']} steps of {counts['episodes']} episodes added to {store}"
    )


if __name__ == "__main__":
    sys.exit(main())
