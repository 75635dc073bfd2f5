"""Pictures beside the tables: ``STORE/media/ab/abcd...png``, named by the hash of their bytes, stored once."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyarrow import fs

from offline_lm.store import commits
from offline_lm.store.tables import Store
from offline_lm.types import Episode

_ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg", "image/gif": ".gif", "image/webp": ".webp", "image/bmp": ".bmp"}
_MOST = 64 << 20
"""bytes of a picture; adapters take none that is longer"""
_JSON = (str, int, float, bool, list, dict, type(None))


class Media:
    """Puts the pictures of episodes into the store, or only says where they are."""

    def __init__(self, store: Store, *, keep: bool = True) -> None:
        self.keep = keep
        self.url = f"{store.url}/media"
        self._have: set[str] = set()

    def episode(self, episode: Episode) -> Episode:
        """`episode` with every picture that its log still holds stored (status ``stored``), or, with ``keep=False``,
        named (status ``referenced``, and its file in ``extra``)."""
        if all(step.screenshot is None for step in episode.steps):
            return episode
        steps = [
            step if step.screenshot is None else replace(step, screenshot=self._shot(step.screenshot))
            for step in episode.steps
        ]
        return replace(episode, steps=tuple(steps))

    def _shot(self, shot: Mapping[str, Any]) -> dict[str, Any]:
        data, path = shot.get("data"), shot.get("path")
        # Only an adapter gives bytes or a path object: a log cannot name a file of this machine to be copied.
        if not isinstance(data, bytes) and isinstance(path, _JSON):
            return dict(shot)
        row = {key: value for key, value in shot.items() if key not in ("data", "path")}
        if not self.keep:
            return {**row, "status": "referenced", **({"path": str(path)} if path is not None else {})}
        name = f"{row['sha256'][:2]}/{row['sha256']}{_ENDINGS.get(row['mime'] or '', '')}"
        if name not in self._have:
            if isinstance(data, bytes):
                self._put(name, data)
            else:
                assert path is not None
                with path.open("rb") as source:
                    data = source.read(_MOST + 1)
                if hashlib.sha256(data).hexdigest() != row["sha256"]:
                    return {**row, "status": "damaged"}  # it changed since it was hashed
                self._put(name, data)
            self._have.add(name)
        return {**row, "status": "stored"}

    def _put(self, name: str, data: bytes) -> None:
        """Durable before the rows that name it."""
        if "://" in self.url:
            files = commits.filesystem(self.url)
            if files.get_file_info(name).type == fs.FileType.NotFound:
                # deltalake takes bytes alone; what fits Arrow's buffer comes to it as bytes
                with files.open_output_stream(name, buffer_size=len(data) + 1) as sink:
                    sink.write(data)
            return
        file = Path(self.url, name)
        if file.exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{uuid.uuid4()}")
        try:
            beside.write_bytes(data)
            commits.sync(beside)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
        for folder in (file.parent, file.parent.parent, file.parent.parent.parent):
            commits.sync(folder)
