"""A trainer process, as the daemon sees it."""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress

from backboned.server.training.events import JobEventPayload, from_json
from backboned.server.training.fork_client import ForkedProcess
from backboned.server.training.spec import TrainerSpec

MAX_EVENT_BYTES = 16 * 2**20
_KEPT_LINES = 20
ENVIRONMENT = {
    # Without these, large batches are up to three times slower: glibc gives memory back and faults it in again.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    # Threads that wait leave their core to serving.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Of trainers, unless the daemon's own says otherwise."""


class TrainerProcess:
    """One trainer, from its start to its end. For the event loop's thread.

    The process ends by itself when this one does: it reads the pipe that is its standard input to the end.
    """

    def __init__(self, process: asyncio.subprocess.Process | ForkedProcess) -> None:
        self._process = process
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._stderr = asyncio.create_task(self._read_stderr())

    @classmethod
    async def start(cls, plugin_modules: tuple[str, ...]) -> "TrainerProcess":
        """Start a trainer, which imports what it needs and waits. Raises `OSError` if no process can be started."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # no module from wherever the daemon was started
            "-m",
            "backboned.server.training.trainer_alone",
            *plugin_modules,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_EVENT_BYTES,
            env={**ENVIRONMENT, **os.environ},
            start_new_session=True,
        )
        return cls(process)

    def begin(self, spec: TrainerSpec) -> None:
        """Let it run a job. Once only; where it has been killed meanwhile, `events` and `ended` tell."""
        assert self._process.stdin is not None
        if self.runs:
            with suppress(BrokenPipeError):
                self._process.stdin.write(spec.to_json().encode() + b"\n")

    @property
    def runs(self) -> bool:
        """Whether it hasn't ended."""
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def last_words(self) -> str:
        """What it wrote last to standard error, for the log."""
        return "\n".join(self._last_lines)

    async def events(self) -> AsyncIterator[JobEventPayload]:
        """What it tells, until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if not line.endswith(b"\n"):
                return  # killed while it wrote
            yield from_json(line.decode())

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self._process.returncode == -signal.SIGKILL

    async def ended(self) -> str:
        """Wait for its end, and say in one line how it came about."""
        code = await self._process.wait()
        await self._stderr
        said = f": {self._last_lines[-1]}" if self._last_lines else ""
        if code >= 0:
            return f"the trainer process ended with code {code}{said}"
        hint = " (most often the system is out of memory: lower batch_size)" if -code == signal.SIGKILL else ""
        return f"the trainer process was killed by {signal.Signals(-code).name}{hint}{said}"

    async def stop(self, kill_after_seconds: float) -> None:
        """Ask it to end after its current batch, wait, and kill it if that takes too long."""
        self._send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), kill_after_seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it now, if it hasn't ended."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            if text := line.decode(errors="replace").strip():
                self._last_lines.append(text[:500])
