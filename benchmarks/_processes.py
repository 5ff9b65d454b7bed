"""Processes of the benchmark: workers that answer lines of JSON, and what the kernel tells about any process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

ROOT = Path(__file__).resolve().parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class WorkerFailed(Exception):
    """A worker ended before it answered; its log tells why."""


class Worker:
    """`python -m MODULE ARGUMENTS` as a process that answers questions, one line of JSON each. For one thread."""

    def __init__(self, module: str, *arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """What it prints beside its answers is appended to `log`."""
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                text=True,
            )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def send(self, **question: Any) -> None:
        """Ask without waiting for the answer."""
        _stream(self._process.stdin).write(json.dumps(question) + "\n")
        _stream(self._process.stdin).flush()

    def receive(self) -> dict[str, Any]:
        """The next answer. Raises `WorkerFailed` when there won't be any."""
        line = _stream(self._process.stdout).readline()
        if not line:
            raise WorkerFailed(f"a worker ended with exit code {self._process.wait()}: see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **question: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self.send(**question)
        return self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End it, at once if something failed here."""
        if kind is not None:
            self._process.kill()
        _stream(self._process.stdin).close()
        self._process.wait()
        _stream(self._process.stdout).close()


def answer_questions(answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """A worker's main loop: `answer` each question until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for member in found:
        found += parents.get(member, [])
    return found


def cpu_seconds(pid: int) -> float:
    """What a process, its descendants, and those that have ended, have computed so far."""
    return sum(sum(map(int, fields[11:15])) for p in family(pid) if (fields := _stat(p))) / _TICKS


def proportional_bytes(pid: int) -> int:
    """The memory of a process and its descendants: what several of them share is counted once (PSS)."""
    return sum(_proportional_bytes(p) for p in family(pid))


def resident_bytes(pid: int) -> int:
    """The resident memory of a process and its descendants; cheap, but what is shared is counted for each."""
    return sum(int(_read(f"/proc/{p}/statm", "0 0").split()[1]) for p in family(pid)) * _PAGE_BYTES


def _proportional_bytes(pid: int) -> int:
    lines = _read(f"/proc/{pid}/smaps_rollup", "").splitlines()
    return 1024 * int(next((line.split()[1] for line in lines if line.startswith("Pss:")), 0))


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, from `state` on; empty where it has ended."""
    return _read(f"/proc/{pid}/stat", "").rpartition(")")[2].split()


def _read(path: str, otherwise: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return otherwise


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
