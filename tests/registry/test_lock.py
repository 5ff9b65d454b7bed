"""A lock is held by one process at a time, and let go when its holder ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from backboned.registry.lock import abandoned, locked

HOLDER = """
import sys, time
from pathlib import Path
from backboned.registry.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_is_held_cannot_be_had_until_its_holder_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert not abandoned(file)
        with pytest.raises(BlockingIOError, match="another process holds lock"), locked(file, wait_seconds=0.05):
            pass
        os.kill(other.pid, signal.SIGKILL)
    assert abandoned(file)
    with locked(file):
        assert not abandoned(file)
    assert abandoned(file)


def test_what_is_not_there_is_not_abandoned_and_cannot_be_made_nowhere(tmp_path: Path) -> None:
    assert not abandoned(tmp_path / "lock")
    with pytest.raises(FileNotFoundError), locked(tmp_path / "gone" / "lock"):
        pass
