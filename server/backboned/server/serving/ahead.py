"""Threads that prepare images ahead of a device, which would wait for them otherwise."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from backboned.server.serving.queue import FairQueue, Item


class Ahead:
    """Prepares images in turn of their models, several at once. Thread-safe."""

    def __init__(self, threads: int, prepare: Callable[[Item], bool], ready: Callable[[Sequence[Item]], None]) -> None:
        """`prepare` tells whether an item is prepared now; `ready` takes those that are, in any of the threads."""
        self._prepare, self._ready = prepare, ready
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._waiting = FairQueue()
        self._lock = threading.Lock()
        self._at_work = 0

    def __len__(self) -> int:
        """How many images aren't ready."""
        return len(self._waiting) + self._at_work

    def add(self, items: Sequence[Item]) -> None:
        """Prepare `items` some time."""
        with self._lock:
            self._waiting.add(items)
        for _ in items:
            self._pool.submit(self._next)

    def stop(self) -> None:
        """Prepare what waits, then stop."""
        self._pool.shutdown(wait=True)

    def _next(self) -> None:
        with self._lock:
            item = self._waiting.take()
            if item is None:  # those that were cancelled are left out
                return
            self._at_work += 1
        prepared = self._prepare(item)
        with self._lock:
            self._at_work -= 1
        if prepared:
            self._ready([item])
