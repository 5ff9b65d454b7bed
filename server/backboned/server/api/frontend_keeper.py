"""One front end's process: started, watched, started anew where it dies, and stopped."""

import asyncio
import json
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from backboned.server.api.handover import Answering, Handover
from backboned.server.frontend import slots
from backboned.server.frontend.frames import Kind
from backboned.server.frontend.settings import FrontendSettings

log = logging.getLogger(__name__)

SLOT_BYTES = 2**20
"""Room for a prepared image of up to 591 pixels a side; what an image doesn't fill takes no memory."""

_SLOTS = 512
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _STABLE_SECONDS = 0.1, 10.0, 60.0
_LATE_SECONDS = 5.0
_COMMAND = (sys.executable, "-m", "backboned.server.frontend.process")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class FrontendKeeper:
    """Keeps the front end called `number` running. For one event loop.

    `settings` is awaited before it is let serve; `listening` is done when it first does, or fails with `OSError`.
    """

    def __init__(self, number: int, answering: Answering, settings: "asyncio.Future[FrontendSettings]") -> None:
        self._number = number
        self._answering = answering
        self._settings = settings
        self.listening: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeping: asyncio.Task[None] | None = None
        self._serving: Handover | None = None
        self._stopping = False

    def launch(self) -> None:
        """Start the process, if it isn't yet."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())
            self.listening.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def stop(self, drain_seconds: float) -> None:
        """Let it finish its calls within `drain_seconds`, then end it."""
        self._stopping = True
        if self._keeping is None:
            return
        if self._serving is not None:
            self._serving.send(Kind.DRAIN, payload=json.dumps(drain_seconds).encode())
            await asyncio.wait([self._keeping], timeout=drain_seconds + _LATE_SECONDS)
        self._keeping.cancel()
        with suppress(asyncio.CancelledError):
            await self._keeping

    async def _keep(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            started = time.monotonic()
            end = await self._run()
            if self._stopping:
                return
            if not self.listening.done():
                self.listening.set_exception(OSError(f"front end {self._number} {end} before it could listen"))
                return
            if time.monotonic() - started > _STABLE_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            log.warning("front end %d %s; another one starts in %.1f s", self._number, end, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _run(self) -> str:
        """Run a process to its end; returns how that was."""
        try:
            async with self._process() as (process, handover):
                handover.send(Kind.SERVE, payload=(await asyncio.shield(self._settings)).to_json())
                code = await process.wait()
        except OSError as error:
            return f"couldn't start ({error})"
        finally:
            self._serving = None
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[tuple[asyncio.subprocess.Process, Handover]]:
        """A process and the link to it; both are gone afterwards."""
        images = slots.create(_SLOTS * SLOT_BYTES)
        ours, theirs = socket.socketpair()
        try:
            handover = Handover(self._answering, slots.map_for_reading(images), SLOT_BYTES, self._listens)
            process = await asyncio.create_subprocess_exec(
                *_COMMAND,
                str(theirs.fileno()),
                str(images),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), images),
                env={**os.environ, **_ONE_THREAD},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(images)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: handover, sock=ours)
            log.debug("front end %d is process %d", self._number, process.pid)
            yield process, handover
        finally:
            handover.close()
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    def _listens(self, handover: Handover) -> None:
        self._serving = handover
        if not self.listening.done():
            self.listening.set_result(None)
