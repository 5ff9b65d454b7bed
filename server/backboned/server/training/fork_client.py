"""The daemon's end of the fork server: trainers that begin at once, as processes that can be talked to."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO

_UNKNOWN_CODE = 255
"""Of a trainer that outlived the fork server, which alone would have told."""


class ForkedProcess:
    """A trainer that was forked: what a `TrainerProcess` needs of it. For the event loop's thread."""

    def __init__(self, stdin: BinaryIO, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.pid = 0
        self.returncode: int | None = None
        self._pidfd = -1
        self._ended = asyncio.Event()

    def began(self, pid: int, pidfd: int) -> None:
        """It runs."""
        self.pid, self._pidfd = pid, pidfd

    def end(self, code: int) -> None:
        """It has ended."""
        self.returncode = code
        self.stdin.close()
        os.close(self._pidfd)
        self._ended.set()

    def orphaned(self) -> None:
        """The fork server is gone: wait for the end from outside."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self._pidfd)
            self.end(_UNKNOWN_CODE)

        loop.add_reader(self._pidfd, ended)

    def send_signal(self, number: int) -> None:
        """Send a signal to it, and never to a process that got its number later."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int:
        """Its exit code; minus the signal's number if one ended it."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode


class ForkServer:
    """A fork server, from its start to its end. For the event loop's thread."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, longest_line: int) -> None:
        """`longest_line` is that of a trainer's, in bytes."""
        self._process = process
        self._channel = channel
        self._longest_line = longest_line
        self.refuses = False
        """Whether it has said that it can't fork: another one couldn't either."""
        self._ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._beginning: list[tuple[ForkedProcess, asyncio.Future[bool]]] = []
        self._running: dict[int, ForkedProcess] = {}
        asyncio.get_running_loop().add_reader(channel.fileno(), self._receive)

    @classmethod
    def start(cls, plugin_modules: tuple[str, ...], environment: Mapping[str, str], longest_line: int) -> "ForkServer":
        """Start one, which takes seconds to be ready. Raises `OSError` if no process can be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = "backboned.server.training.fork_server"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), *plugin_modules],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a plugin prints is no answer
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        ours.setblocking(False)
        return cls(process, ours, longest_line)

    @property
    def lives(self) -> bool:
        """Whether it hasn't ended."""
        return self._channel.fileno() >= 0

    async def fork(self) -> ForkedProcess | None:
        """A new trainer, as soon as the server is ready; None if it can't make any."""
        if not await asyncio.shield(self._ready) or not self.lives:
            return None
        (for_input, stdin), (stdout, for_output), (stderr, for_errors) = (os.pipe() for _ in range(3))
        began: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        readers = await self._reader(stdout), await self._reader(stderr)
        process = ForkedProcess(os.fdopen(stdin, "wb", 0), *readers)
        try:
            socket.send_fds(self._channel, [b"fork"], [for_input, for_output, for_errors])
            self._beginning.append((process, began))
        except OSError:
            began.set_result(False)
        finally:
            for descriptor in (for_input, for_output, for_errors):
                os.close(descriptor)
        if await asyncio.shield(began):
            return process
        process.stdin.close()
        return None

    def close(self) -> None:
        """End it. The trainers that it has forked live on."""
        if self.lives:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
            self._process.kill()
            self._process.wait()
            self._lost()

    def _receive(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._channel, 256, 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self.close()
            return
        told: dict[str, Any] = json.loads(message)
        if "ready" in told:
            self.refuses = not told["ready"]
            self._ready.set_result(told["ready"])
        elif "code" in told:
            self._running.pop(told["pid"]).end(told["code"])
        else:
            process, began = self._beginning.pop(0)
            process.began(told["pid"], descriptors[0])
            self._running[process.pid] = process
            began.set_result(True)

    def _lost(self) -> None:
        if not self._ready.done():
            self._ready.set_result(False)
        for _, began in self._beginning:
            began.set_result(False)
        for process in self._running.values():
            process.orphaned()
        self._beginning, self._running = [], {}

    async def _reader(self, descriptor: int) -> asyncio.StreamReader:
        reader = asyncio.StreamReader(self._longest_line)
        pipe = os.fdopen(descriptor, "rb", 0)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        return reader
