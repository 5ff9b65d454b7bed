"""A daemon under steady calls, into whose directory the worst files come in a burst: it answers as before."""

import logging
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from backboned.client import Client
from backboned.server.commands.local_daemon import LocalDaemon
from tests.chaos.good import good, saved, state
from tests.chaos.mutation import Expected
from tests.chaos.trial import kinds, plant
from tests.chaos.verdict import fault

_logger = logging.getLogger(__name__)
SEEDS = 5 if "BACKBONED_CHAOS" in os.environ else 1
PATIENCE_SECONDS = 60.0 + 30.0 * SEEDS
MORE_BYTES = 640 * 2**20
"""So much more memory than before may the daemon take at most, whose allocator keeps what is freed.

The largest single file takes 300 MB; the peak of dropping such files one after another stays there.
"""


class Caller:
    """Asks for one prediction after another, and keeps the different answers."""

    def __init__(self, client: Client, photo: bytes) -> None:
        self.answers: set[tuple[int, tuple[tuple[str, float], ...]]] = set()
        self.calls = 0
        self._client, self._photo = client, photo
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._call)

    def __enter__(self) -> "Caller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def runs(self) -> bool:
        """Whether it still asks: it stops at an error."""
        return self._thread.is_alive()

    def _call(self) -> None:
        try:
            while not self._over.is_set():
                answer = self._client.predict("steady", [self._photo])
                classes = tuple((c.label, round(c.probability, 4)) for c in answer.predictions[0].classes)
                self.answers.add((answer.version, classes))
                self.calls += 1
        except BaseException as error:
            self._error = error


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def metric(page: str, name: str) -> float:
    return float(next(line for line in page.splitlines() if line.startswith(name)).rpartition(" ")[2])


@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_a_burst_of_the_worst_files_changes_no_answer(
    start_daemon: Callable[..., LocalDaemon],
    connect: Callable[[LocalDaemon], Client],
    photo: bytes,
    tmp_path: Path,
) -> None:
    root, staging = tmp_path / "checkpoints", tmp_path / "staging" / "root"
    (root / "steady").mkdir(parents=True)
    staging.mkdir(parents=True)
    files = good(tmp_path / "good")
    (tmp_path / "digits.pth").write_bytes(saved(state()))
    (root / "steady" / "good.pt").write_bytes(files.full)

    daemon = start_daemon(f"--weights=digits={tmp_path / 'digits.pth'}", "--settle-seconds=0.5")
    client = connect(daemon)
    deadline = time.monotonic() + PATIENCE_SECONDS

    def wait_for(condition: Callable[[], object]) -> None:
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.05)

    wait_for(lambda: any(m.name == "steady" and m.serving_version for m in client.list_models()))
    bad: dict[str, str] = {}
    with Caller(client, photo) as caller:
        wait_for(lambda: caller.calls >= 10)
        before = peak_bytes(daemon.pid)
        for number, (name, seed) in enumerate((n, s) for s in range(SEEDS) for n in kinds()):
            _, expected, made = plant(name, seed, staging, number, files)
            if expected is Expected.REFUSED:
                bad |= {place.absolute().as_uri(): f"{name}:{seed}" for place in moved(name, made, root)}

        def reasons() -> dict[str, list[str]]:
            rows = list(client.list_checkpoints(filter="state = QUARANTINED"))
            return {uri: [r.reason for r in rows if r.uri == uri or r.uri.startswith(f"{uri}/")] for uri in bad}

        wait_for(lambda: all(reasons().values()) or not caller.runs)
        calls = caller.calls
        wait_for(lambda: caller.calls > calls)
    assert len(caller.answers) == 1, "what served serves on"
    faults = {bad[uri]: why for uri, told in reasons().items() if (why := fault(Expected.REFUSED, False, True, told))}
    assert not faults
    assert not (tmp_path / "staging" / "mark").exists(), "something ran"
    grown = peak_bytes(daemon.pid) - before
    assert grown < MORE_BYTES
    _logger.warning("%d bad files, %d calls, %d MB more at most", len(bad), caller.calls, grown >> 20)
    with urllib.request.urlopen(f"{daemon.http}/metrics", timeout=10) as page:  # noqa: S310 - http, on loopback
        counted = metric(page.read().decode(), 'backboned_checkpoint_loads_total{result="quarantined"}')
    assert counted >= sum("/steady/" in uri for uri in bad)
    assert daemon.stop() == 0
    log = daemon.log.read_text(errors="replace")
    assert "Traceback" not in log and "the loader failed" not in log, log[-4000:]


def moved(name: str, made: set[Path], root: Path) -> list[Path]:
    """Moves a mutation into the daemon's directory, in one stroke: files beside the good one, or a model's folder."""
    if not name.startswith(("bytes.", "zip.", "pickle.", "safetensors.")):
        return [folder.rename(root / folder.name) for folder in made]
    return [file.rename(root / "steady" / file.name) for folder in made for file in folder.iterdir()]
