"""A trainer process that waits for the next job: most of a short job's time would be spent on importing torch."""

import asyncio
import logging
from contextlib import suppress

from backboned.server.training.trainer_process import TrainerProcess

_IDLE_SECONDS = 600.0

_logger = logging.getLogger(__name__)


class Standby:
    """Keeps one process ready while jobs run, and for ten minutes after. For the event loop's thread."""

    def __init__(self, plugin_modules: tuple[str, ...], *, enabled: bool = True) -> None:
        self._plugin_modules = plugin_modules
        self._ready: TrainerProcess | None = None
        self._idle: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closed = not enabled

    async def take(self) -> TrainerProcess:
        """The process that waits, or a new one. Raises `OSError` if none can be started."""
        async with self._starting:
            process, self._ready = self._ready, None
            if self._idle is not None:
                self._idle.cancel()
            if process is not None and process.runs:
                return process
            return await TrainerProcess.start(self._plugin_modules)

    async def prepare(self) -> None:
        """See that a process waits, for ten minutes from now; where none can be started, the next job will tell."""
        async with self._starting:
            if self._idle is not None:
                self._idle.cancel()
            if self._closed:
                return
            if self._ready is None or not self._ready.runs:
                with suppress(OSError):
                    self._ready = await TrainerProcess.start(self._plugin_modules)
            self._idle = asyncio.create_task(self._end_when_idle())

    async def close(self) -> None:
        """End the process that waits, for good."""
        self._closed = True
        await self._end()

    async def _end(self) -> None:
        async with self._starting:
            process, self._ready = self._ready, None
            if self._idle is not None:
                self._idle.cancel()
            if process is not None:
                process.kill()
                await process.ended()

    async def _end_when_idle(self) -> None:
        await asyncio.sleep(_IDLE_SECONDS)
        self._idle = None
        await self._end()
