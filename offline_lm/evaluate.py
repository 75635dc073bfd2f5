"""``python -m offline_lm.evaluate``: critics judged. Each suite stands in a file of its own, `_evaluate_*`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from offline_lm import _evaluate_probe, _evaluate_real, _evaluate_truth, cli
from offline_lm.errors import UserError

SUITES: dict[str, Callable[[DictConfig], dict[str, Any]]] = {
    "shop": _evaluate_truth.run,
    "real": _evaluate_real.run,
    "probe": _evaluate_probe.run,
    "office": _evaluate_truth.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("evaluate", evaluate, argv)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    if cfg.suite not in SUITES:
        raise UserError(f"suite={cfg.suite}: there are {', '.join(SUITES)}")
    return SUITES[cfg.suite](cfg)


if __name__ == "__main__":
    raise SystemExit(main())
