"""Where trainer processes come from: most of a short job's time would be spent on importing torch."""

import asyncio
import os

from backboned.server.training.fork_client import ForkServer
from backboned.server.training.trainer_process import ENVIRONMENT, MAX_EVENT_BYTES, TrainerProcess

_IDLE_SECONDS = 600.0


class Standby:
    """Keeps a process that has everything imported while jobs run, and for ten minutes after; trainers are its forks.

    Where that can't be, or isn't `enabled`, each trainer imports for itself. For the event loop's thread.
    """

    def __init__(self, plugin_modules: tuple[str, ...], *, enabled: bool = True) -> None:
        self._plugin_modules = plugin_modules
        self._server: ForkServer | None = None
        self._forks = enabled and hasattr(os, "pidfd_open")  # Linux
        self._idle: asyncio.TimerHandle | None = None

    async def take(self) -> TrainerProcess:
        """A trainer that waits for its job. Raises `OSError` if none can be started."""
        if self._idle is not None:
            self._idle.cancel()
        if self._forks:
            if self._server is None or not self._server.lives:
                environment = {**ENVIRONMENT, **os.environ}
                self._server = ForkServer.start(self._plugin_modules, environment, MAX_EVENT_BYTES)
            forked = await self._server.fork()
            if forked is not None:
                return TrainerProcess(forked)
            self._forks = not self._server.refuses
        return await TrainerProcess.start(self._plugin_modules)

    def rest(self) -> None:
        """No job runs: keep the process for ten more minutes."""
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._end)

    def close(self) -> None:
        """End the process, for good."""
        self._forks = False
        if self._idle is not None:
            self._idle.cancel()
        self._end()

    def _end(self) -> None:
        if self._server is not None:
            self._server.close()
