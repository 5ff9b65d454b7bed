"""A daemon that a command starts for itself: `backboned serve` as a process of its own, stopped when it is done."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_SECONDS = 120.0
STOP_SECONDS = 30.0


class LocalDaemonError(Exception):
    """The daemon didn't start; the message is what it said last."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class LocalDaemon:
    """A running daemon. `grpc` is its address as `host:port`, `http` the URL of its metrics, `log` what it prints.

    It is no member of the terminal's foreground group: Ctrl-C reaches the command alone, which then decides.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, grpc: str, http: str) -> None:
        self._process = process
        self.log = log
        self.grpc = grpc
        self.http = http

    @classmethod
    def start(cls, flags: Sequence[str], folder: Path) -> Self:
        """Start `backboned serve` with `flags`, wait until it is ready; its log goes to `folder`.

        Raises `LocalDaemonError` when it ends, or isn't ready within two minutes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        log, ready = folder / "daemon.log", folder / "daemon.json"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "backboned.server.commands", "serve", "--ready-file", str(ready), *flags]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            addresses = _wait_until_ready(process, ready, log)
        except BaseException:
            _stop(process)
            raise
        return cls(process, log, addresses["grpc"], addresses["http"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until it ends by itself."""
        self._process.wait()

    def stop(self) -> int:
        """Ask it to stop, and make sure of it; returns its exit code."""
        return _stop(self._process)


def is_listening(address: str) -> bool:
    """Whether something accepts connections at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def free_port(host: str, wanted: int) -> int:
    """`wanted` if nobody has it, else 0, which lets the daemon pick one."""
    try:
        socket.create_server((host, wanted)).close()
    except (OSError, OverflowError):
        return 0
    return wanted


def _wait_until_ready(process: "subprocess.Popen[bytes]", ready: Path, log: Path) -> dict[str, str]:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            addresses: dict[str, str] = json.loads(ready.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.05)
        else:
            return addresses
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    state = "isn't ready after two minutes" if process.poll() is None else f"ended with exit code {process.returncode}"
    raise LocalDaemonError(f"the daemon that was started here {state}: {said} (log: {log})")


def _stop(process: "subprocess.Popen[bytes]") -> int:
    process.terminate()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make a hang-up or a request to stop end the command as Ctrl-C does, so that the daemon isn't left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
