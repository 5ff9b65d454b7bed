"""Deleting old versions, every minute, and finishing what couldn't be deleted wholly."""

import asyncio
import logging
from contextlib import suppress

from backboned.server.serving.versions import Versions

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 60.0
_RETRY_SECONDS = 5.0


class Sweeper:
    """Deletes what is not to be kept any longer, and finishes deletions. For one event loop."""

    def __init__(self, versions: Versions, keep_versions: int, keep_days: float) -> None:
        """See `Versions.sweep`: with 0 for both nothing is deleted."""
        self._versions = versions
        self._keep = keep_versions
        self._max_age_seconds = keep_days * 86_400
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End after the deletion in progress."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            finished = False
            try:
                finished = await self._versions.finish_deletions()
                await self._versions.sweep(self._keep, self._max_age_seconds)
            except Exception as error:  # a read-only folder, say: it may be mended
                log.warning("old versions can't be deleted: %s", error)
            await asyncio.sleep(_PAUSE_SECONDS if finished else _RETRY_SECONDS)
