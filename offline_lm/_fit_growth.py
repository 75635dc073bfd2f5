"""A store that is read again while `fit` trains, for what others have added since."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from omegaconf import DictConfig

from offline_lm._fit_prepare import selected
from offline_lm.run import Run
from offline_lm.store import Store
from offline_lm.store.connect import explained


class Growing:
    """What a run reads: the store at one version, and the selected steps; until `grew` finds newer episodes.

    A task stays on its side of the split, with every new episode. A new task joins the training side.

    Args:
        stack: closes the connections.
    """

    def __init__(self, cfg: DictConfig, gamma: float, stack: ExitStack) -> None:
        self.cfg, self.gamma, self.stack = cfg, gamma, stack
        self._read(Store.open(cfg.data.store, cfg.data.version).frozen())

    def grew(self, run: Run) -> bool:
        """Whether the selected episodes are others than before: then `store`, `db` and `replay` are the newest.

        `run` is then of the newer version of the store. With `data.version` they never are.
        """
        newest = Store.open(self.cfg.data.store, self.cfg.data.version).frozen()
        if newest.pinned == self.store.pinned:
            return False
        before = self.replay
        self._read(newest)
        known, held = set(before.episode_ids), {t for t, h in zip(before.tasks, before.held_out, strict=True) if h}
        self.replay = replace(self.replay, held_out=np.array([t in held for t in self.replay.tasks], bool))
        new = np.array([episode not in known for episode in self.replay.episode_ids])
        if len(known) == len(new) and not new.any():
            return False
        tasks = len(set(self.replay.tasks) - set(before.tasks))
        print(
            f"the store has grown: {int(new.sum())} new episodes, {int((new & ~self.replay.held_out).sum())} of them"
            f" to train on, {tasks} new tasks; {len(new)} episodes together"
        )
        run.row["store_versions"] = json.dumps(newest.versions())
        return True

    def _read(self, store: Store) -> None:
        self.stack.enter_context(explained(store))
        self.store, self.db = store, self.stack.enter_context(store.connect())
        self.replay = selected(self.cfg, self.db, self.gamma)
