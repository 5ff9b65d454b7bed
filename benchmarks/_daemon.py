"""A daemon under measurement: `backboned serve` as a process of its own, on free ports of loopback."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks._processes import proportional_bytes

_PATIENCE_SECONDS = 600.0
_NOT_COPIED = ("lock", "*.sqlite*", "work*")
_IMPORTS = (
    "from backboned.server.process import import_torchvision; import_torchvision()\n"
    "import backboned.server.commands, backboned.server.daemon"
)


def import_seconds() -> float:
    """How long a process takes that imports what a daemon does, in its way, and nothing else."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
    return time.monotonic() - begin


class Daemon:
    """A daemon that is ready. `grpc` is its address, `pid` its process, which was ready after `seconds_to_ready`."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        """Start it on `folder`'s `checkpoints` and `state`, and wait until it is ready. Raises `SystemExit`."""
        self.folder = folder
        self._log, ready = folder / "daemon.log", folder / "daemon.json"
        ready.unlink(missing_ok=True)
        own = [f"--checkpoint-dir={folder / 'checkpoints'}", f"--state-dir={folder / 'state'}", f"--ready-file={ready}"]
        command = [sys.executable, "-m", "backboned.server.commands", "serve", "--grpc-port=0", "--http-port=0"]
        started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *own, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid = self._process.pid
        while not ready.is_file():
            self.check()
            if time.monotonic() > started + _PATIENCE_SECONDS:
                self.stop()
                raise SystemExit(f"the daemon isn't ready after ten minutes: see {self._log}")
            time.sleep(0.005)
        self.seconds_to_ready = time.monotonic() - started
        addresses = json.loads(ready.read_text())
        self.grpc: str = addresses["grpc"]
        self._http: str = addresses["http"]

    def check(self) -> None:
        """Raise `SystemExit` if it has ended."""
        if self._process.poll() is not None:
            raise SystemExit(f"the daemon ended with exit code {self._process.returncode}: see {self._log}")

    def metric(self, name: str) -> float | None:
        """The sum of a metric's series; None if it has none of that name."""
        with urllib.request.urlopen(f"{self._http}/metrics", timeout=60) as response:  # noqa: S310 - on loopback
            lines = response.read().decode().splitlines()
        values = [line.rpartition(" ")[2] for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(map(float, values)) if values else None

    def wait_until_compiled(self) -> float:
        """Wait until nothing is being compiled any more; the seconds that this took."""
        started = time.monotonic()
        while self.metric("backboned_stages_compiling"):
            self.check()
            if time.monotonic() > started + _PATIENCE_SECONDS:
                raise SystemExit(f"the daemon still compiles after ten minutes: see {self._log}")
            time.sleep(1.0)
        return time.monotonic() - started

    def memory_bytes(self) -> int:
        """Its memory and that of its processes, what they share counted once."""
        return proportional_bytes(self.pid)

    def stop(self) -> None:
        """Stop it, and make sure of it."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def copy_state(source: Path, target: Path) -> None:
    """Give a new daemon what an earlier one has compiled, and nothing else that it knows."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_NOT_COPIED), dirs_exist_ok=True)
