"""When Python looks for cycles among all objects: every call that waits is a hundred of them, and stands still."""

import asyncio
import gc
import time
from collections.abc import Callable
from typing import NoReturn

_PAUSE_SECONDS = 30.0
_PATIENCE_SECONDS = 600.0
_PAUSE_FOR_WORK = 2000.0
"""So many times as long as a collection takes is the pause after it, at least."""
_FEW_IMAGES = 64
_NEVER = 1_000_000


async def collect_when_idle(
    waiting: Callable[[], int], *, pause_seconds: float = _PAUSE_SECONDS, patience_seconds: float = _PATIENCE_SECONDS
) -> NoReturn:
    """Keep Python from full collections while many images wait, and make them in between; until this is cancelled.

    With 2,000 calls one takes 0.1 s, in which nobody is answered; with a few, some milliseconds. Young objects are
    collected as ever. Where many always wait, there is a collection after `patience_seconds`.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], _NEVER)
    pause, since = pause_seconds, time.monotonic()
    try:
        while True:
            await asyncio.sleep(pause)
            began = time.monotonic()
            if waiting() < _FEW_IMAGES or began - since >= patience_seconds:
                gc.collect()
                since = time.monotonic()
                pause = max(pause_seconds, _PAUSE_FOR_WORK * (since - began))
    finally:
        gc.set_threshold(*before)
