"""``python -m offline_lm.evaluate``: critics and actors judged. Each suite has a file of its own, `_evaluate_*`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from offline_lm import (
    _evaluate_actors,
    _evaluate_credit,
    _evaluate_mdp,
    _evaluate_policies,
    _evaluate_probe,
    _evaluate_real,
    _evaluate_truth,
    cli,
)
from offline_lm.errors import UserError

SUITES: dict[str, Callable[[DictConfig], dict[str, Any]]] = {
    **dict.fromkeys(_evaluate_truth.SUITES, _evaluate_truth.run),
    "mdp": _evaluate_mdp.run,
    "real": _evaluate_real.run,
    "probe": _evaluate_probe.run,
    "credit": _evaluate_credit.run,
    "policies": _evaluate_policies.run,
    "actors": _evaluate_actors.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("evaluate", evaluate, argv)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    if cfg.suite not in SUITES:
        raise UserError(f"suite={cfg.suite}: there are {', '.join(SUITES)}")
    return SUITES[cfg.suite](cfg)


if __name__ == "__main__":
    raise SystemExit(main())
