"""Suite `mdp` of `evaluate`: every critic on tables, against the fixed point of its equation on random processes."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from offline_lm.envs import random_mdp
from offline_lm.errors import UserError
from offline_lm.ope import fixed_points


def run(cfg: DictConfig) -> dict[str, Any]:
    """Print, and return as `max_error`, each critic's largest distance from its fixed point on any process."""
    if type(cfg.mdp.processes) is not int or cfg.mdp.processes < 1:
        raise UserError(f"mdp.processes={cfg.mdp.processes}: a whole number from 1 is wanted")
    found = {}
    for seed in cfg.seeds:
        tasks = [random_mdp.task(seed, n, states=5, branching=1, ends=0.2) for n in range(cfg.mdp.processes)]
        for name, error in fixed_points.errors(tasks, seed).items():
            found[name] = max(error, found.get(name, 0.0))
    print(f"{cfg.mdp.processes} random processes for each of {len(cfg.seeds)} seeds; the largest error of any V or Q")
    for name, error in found.items():
        print(f"{name:24} {error:.1e}")
    return {"max_error": found}
