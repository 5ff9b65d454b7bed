"""The trainer process: `python -m backboned.server.training.trainer PLUGIN_MODULE…`.

It imports what it needs, reads one line of JSON from standard input, a `TrainerSpec`, and writes events to standard
output, one line of JSON each; the last is the final state. SIGTERM ends it after the current batch. It ends by itself
when its standard input does, which the daemon holds open while it lives.
"""

import errno
import fcntl
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import BinaryIO

from backboned.registry.catalogue import Catalogue
from backboned.registry.errors import BackbonedError
from backboned.server.training.events import JobEventPayload, JobState, StateChanged, to_json
from backboned.server.training.finetune import finetune
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.stages_trainer import is_out_of_memory

LOCK_NAME = "lock"

_SECONDS_AFTER_THE_DAEMON = 5.0
_NICENESS = 10
_OOM_SCORE = "500"


class _Stopped(Exception):
    pass


def main() -> int:
    """Run one job. Returns 0 whatever its final state is: that is in the last event."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    events = _take_standard_output()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    _yield_to_serving()
    Catalogue.installed(sys.argv[1:])  # plugins import what takes long: then a job can begin at once
    line = sys.stdin.readline()
    if not line:
        return 0  # the daemon has ended, and there was no job
    spec = TrainerSpec.from_json(line)
    threading.Thread(target=_stop_without_daemon, args=(stop,), daemon=True).start()
    lock = (spec.work_dir / LOCK_NAME).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)  # a trainer that outlived its daemon ends within seconds

    def emit(payload: JobEventPayload) -> None:
        events.write(to_json(payload).encode() + b"\n")
        events.flush()

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    try:
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


def _yield_to_serving() -> None:
    """Take what is left of the CPU, and be the first to go when memory runs out. Where it isn't allowed, never mind."""
    os.nice(_NICENESS)
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    except (OSError, AttributeError):
        pass


def _stop_without_daemon(stop: threading.Event) -> None:
    """Wait for the end of standard input; then stop as on SIGTERM, and if that takes too long, at once."""
    sys.stdin.read()
    stop.set()
    threading.Event().wait(_SECONDS_AFTER_THE_DAEMON)
    os._exit(1)


def reason(error: Exception) -> str:
    """One line for the job's owner."""
    if isinstance(error, BackbonedError):
        return error.message
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return f"disk full{where}: make room, or give --state-dir and --checkpoint-dir a larger disk"
    if is_out_of_memory(error):
        return "out of memory: lower batch_size, or train fewer stages"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    sys.exit(main())
