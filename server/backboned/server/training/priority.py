"""The place of a trainer behind serving."""

import os
from contextlib import suppress
from pathlib import Path

_NICENESS = 15
"""Where all cores are wanted, a trainer gets about a thirtieth of what serving does."""

_OOM_SCORE = 500


def yield_to_serving() -> None:
    """Take what is left of the CPU, and be the first to go when memory runs out. Where it isn't allowed, never mind.

    Linux may share the CPU out between sessions first, and by niceness only within each: a trainer has one of its own.
    """
    for file, value in (("autogroup", _NICENESS), ("oom_score_adj", _OOM_SCORE)):
        with suppress(OSError):
            Path("/proc/self", file).write_text(str(value), encoding="ascii")
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
