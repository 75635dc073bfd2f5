"""A run: its id, folder, configuration, metrics, and the two rows that the table `runs` has of it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from omegaconf import DictConfig
from safetensors.torch import save_model
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from offline_lm import __version__, cli, paths
from offline_lm.store import Store


@dataclass
class Run:
    """One run under way. `start` makes it and its row with status `running`; `finish` writes the last row."""

    store: Store
    run_id: str
    folder: Path
    row: dict[str, Any]
    writer: SummaryWriter | None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    finished: bool = False

    @classmethod
    def start(cls, store: Store, cfg: DictConfig, algo: str) -> Run:
        run_id = f"{algo}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:6]}"
        folder = Path(cfg.run_dir).absolute() / run_id if cfg.run_dir else store.run_dir(run_id)
        folder.mkdir(parents=True)
        config = cli.plain(cfg)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        row = {
            "run_id": run_id,
            "command": "fit",
            "algo": algo,
            "model": cfg.model.path or "tiny",
            "seed": cfg.seed if cfg.heads_seed is None else cfg.heads_seed,
            "started_at": datetime.now(UTC),
            "run_dir": str(folder),
            "git_revision": _revision(),
            "package_version": __version__,
            "store_versions": json.dumps(store.versions()),
            "config": json.dumps(config),
        }
        store.append("runs", [{**row, "status": "running"}])
        return cls(store, run_id, folder, row, SummaryWriter(str(folder)) if cfg.logger.tensorboard else None)

    def log(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        """Keep scalars for the table `metrics`, and show them in TensorBoard."""
        for name, value in values.items():
            self.metrics.append({"run_id": self.run_id, "step": step, "name": prefix + name, "value": float(value)})
            if self.writer is not None:
                self.writer.add_scalar(prefix + name, value, step)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def checkpoint(self, heads: nn.Module, model: nn.Module | None) -> None:
        """Write the weights as they are, beside and then in place of the last ones: a kill leaves a whole file."""
        for name, module in (("heads", heads), ("backbone", model)):
            if module is not None:
                beside = self.folder / f"{name}.part"
                save_model(module, str(beside))
                beside.replace(self.folder / f"checkpoint-{name}.safetensors")

    def finish(self, status: str, steps: int, metrics: dict[str, Any]) -> None:
        """Commit metrics and the run's last row: from here on `run=latest` may mean it."""
        if self.writer is not None:
            self.writer.close()
        self.store.append("metrics", self.metrics)
        end = {
            "status": status,
            "steps": steps,
            "seconds": self.seconds,
            "finished_at": datetime.now(UTC),
            "metrics": json.dumps(metrics),
        }
        self.store.append("runs", [{**self.row, **end}])
        self.finished = True


@contextmanager
def failing(runs: list[Run]) -> Iterator[None]:
    """What goes wrong inside ends the runs that are not finished with status `failed`."""
    try:
        yield
    except BaseException:
        for run in runs:
            if not run.finished:
                run.finish("failed", 0, {})
        raise


def _revision() -> str | None:
    """The commit of the checkout that this package runs from, if it is one."""
    root = paths.CONF.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
