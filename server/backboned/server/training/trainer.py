"""The trainer process: a fork of the fork server, or `trainer_alone.py`; its arguments are modules of plugins.

It reads one line of JSON from standard input, a `TrainerSpec`, and writes events to standard
output, one line of JSON each; the last is the final state. SIGTERM ends it after the current batch. It ends by itself
when its standard input does, which the daemon holds open while it lives.
"""

import fcntl
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import BinaryIO

from backboned.registry.catalogue import Catalogue
from backboned.registry.errors import BackbonedError
from backboned.server.training.events import JobEventPayload, JobState, StateChanged, to_json
from backboned.server.training.finetune import finetune
from backboned.server.training.priority import yield_to_serving
from backboned.server.training.reason import reason
from backboned.server.training.spec import TrainerSpec

LOCK_NAME = "lock"

_SECONDS_AFTER_THE_DAEMON = 5.0
_SECONDS_BETWEEN_TRIES = 0.05


class _Stopped(Exception):
    pass


def main() -> int:
    """Run one job. Returns 0 whatever its final state is: that is in the last event."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    events = _take_standard_output()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    yield_to_serving()
    Catalogue.installed(sys.argv[1:])  # plugins import what takes long: then a job can begin at once
    line = sys.stdin.readline()
    if not line:
        return 0  # the daemon has ended, and there was no job
    spec = TrainerSpec.from_json(line)
    threading.Thread(target=_stop_without_daemon, args=(stop,), daemon=True).start()

    def emit(payload: JobEventPayload) -> None:
        events.write(to_json(payload).encode() + b"\n")
        events.flush()

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    try:
        with (spec.work_dir / LOCK_NAME).open("wb") as lock:
            _take(lock, stop, check)
            finetune(spec, emit, check)
        final = StateChanged(JobState.SUCCEEDED)
    except _Stopped:
        final = StateChanged(JobState.CANCELLED)
    except BrokenPipeError:
        return 1  # nobody listens any more
    except Exception as error:
        if not isinstance(error, BackbonedError):
            traceback.print_exc()  # for the daemon's log
        final = StateChanged(JobState.FAILED, reason(error))
    emit(final)
    return 0


def _take_standard_output() -> BinaryIO:
    """Standard output for events alone: what libraries print goes to standard error from now on."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return events


def _take(lock: BinaryIO, stop: threading.Event, check: Callable[[], None]) -> None:
    """Wait until no other trainer has the job: one that outlived its daemon ends within seconds."""
    while True:
        check()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop.wait(_SECONDS_BETWEEN_TRIES)
        else:
            return


def _stop_without_daemon(stop: threading.Event) -> None:
    """Wait for the end of standard input; then stop as on SIGTERM, and if that takes too long, at once."""
    while os.read(0, 2**16):  # not through `sys.stdin`, whose lock the interpreter wants when it ends
        pass
    stop.set()
    threading.Event().wait(_SECONDS_AFTER_THE_DAEMON)
    os._exit(1)
