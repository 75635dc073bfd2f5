"""``python -m offline_lm.doctor``: is the store whole? Repair, compaction, vacuum."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig

from offline_lm import cli
from offline_lm.errors import UserError
from offline_lm.store import Store
from offline_lm.store.check import Finding, examine, repair
from offline_lm.store.maintain import compact, vacuum


def main(argv: Sequence[str] | None = None) -> int:
    """0: the store is whole, or whole again. 1: it is not (or, as everywhere, a fault)."""
    healthy = True

    def body(cfg: DictConfig) -> dict[str, Any]:
        nonlocal healthy
        result = doctor(cfg)
        healthy = result["healthy"]
        return result

    return cli.run("doctor", body, argv) or int(not healthy)


def doctor(cfg: DictConfig) -> dict[str, Any]:
    if type(cfg.retention_hours) is not int or cfg.retention_hours < 0:
        raise UserError(f"retention_hours={cfg.retention_hours}: a whole number from 0 is wanted")
    remote = not Store.at_url(cfg.store).is_local
    if remote and (cfg.repair or cfg.deep):
        raise UserError(
            f"{cfg.store} is remote: an object store keeps whole files or none; repair and deep are for folders"
        )
    repaired = repair(cfg.store, deep=cfg.deep) if cfg.repair else []
    found = [] if remote else examine(cfg.store, deep=cfg.deep)
    wrong = [finding for finding in found if not finding.harmless]
    commits_lost = any(finding.kind.startswith("log_") for finding in repaired)
    gone = [*repaired, *wrong, *([f for f in found if f.kind == "episode_unseen"] if commits_lost else [])]
    for finding in repaired:
        _say(finding, "repaired: ")
    for finding in found:
        _say(finding, "")
    result: dict[str, Any] = {
        "healthy": not wrong,
        "found": dict(Counter(finding.kind for finding in found)),
        "repaired": dict(Counter(finding.kind for finding in repaired)),
        "lost": sorted({name for finding in gone for name in finding.lost}),
        "findings": [asdict(finding) for finding in [*repaired, *found]],
    }
    if wrong:
        print(f"{len(wrong)} things are wrong: `python -m offline_lm.doctor store={cfg.store} repair=true` mends them")
        return result
    store = Store.open(cfg.store)
    if cfg.compact:
        result["compacted"] = compact(store)
        for table, files in result["compacted"].items():
            print(f"{table}: {files['before']} files are now {files['after']}")
    if cfg.vacuum:
        result["vacuumed"] = vacuum(store, cfg.retention_hours)
        print(f"files deleted: {sum(result['vacuumed'].values())}; what a run was trained on stays")
    result["versions"] = store.versions()
    result["files"] = {table: len(store.files(table)) for table in result["versions"]}
    whole = "can be opened" if remote else "is whole"
    print(f"{store.url} {whole}: version {result['versions']['episodes']}, {sum(result['files'].values())} files")
    return result


def _say(finding: Finding, before: str) -> None:
    print(f"{before}{finding.kind}: {finding.message}")
    for name in finding.lost[:10]:
        print(f"    {'not in the store' if finding.harmless else 'lost'}: {name}")
    if len(finding.lost) > 10:
        print(f"    and {len(finding.lost) - 10} more (json=true lists all)")


if __name__ == "__main__":
    sys.exit(main())
