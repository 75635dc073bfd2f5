"""Episodes into the store as they end: in a thread, and those that end while one commit is under way in the next."""

from __future__ import annotations

import asyncio
from typing import Any

from offline_lm.store import Store
from offline_lm.store.ingest import Writer, chunks
from offline_lm.store.media import Media
from offline_lm.store.redact import Redactor
from offline_lm.store.tables import OpenStore
from offline_lm.types import Episode


class Committer:
    """What `add` returned from is durable: a kill after that loses nothing of it.

    Args:
        redactor: takes secrets out first, as at ingest.
    """

    def __init__(self, store: Store, redactor: Redactor) -> None:
        self._writer = Writer(OpenStore(store.url))
        self._redactor, self._media = redactor, Media(store, keep=True)
        self._waiting: list[tuple[Episode, asyncio.Future[None]]] = []
        self._wake, self._closing = asyncio.Event(), False

    async def add(self, episode: Episode) -> None:
        """Returns when the episode is on the disk, or is known to be there already."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((episode, future))
        self._wake.set()
        await asyncio.shield(future)

    async def run(self) -> None:
        """Serves until `close`."""
        while not (self._closing and not self._waiting):
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            if batch:
                await asyncio.to_thread(self._commit, [episode for episode, _ in batch])
            for _, future in batch:
                future.set_result(None)

    def close(self) -> None:
        """Lets `run` end when all that waits is committed."""
        self._closing = True
        self._wake.set()

    def counts(self) -> dict[str, Any]:
        """As `offline_lm.store.ingest.add` counts."""
        return self._writer.counts()

    def _commit(self, episodes: list[Episode]) -> None:
        for chunk in chunks(episodes, self._writer.ingest_id, self._redactor, self._media):
            self._writer.take(chunk)
        self._writer.commit()
