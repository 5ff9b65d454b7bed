"""What the loader is to look at next, and who waits for it."""

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from backboned.registry.look import Part
from backboned.server.serving.snapshot import Snapshot


@dataclass(frozen=True)
class Turn:
    """What has come up since the last look: parts to look at (None: everything), and files that were closed.

    `waiters` get the snapshot after the look.
    """

    parts: frozenset[Part] | None
    closed: frozenset[Path]
    waiters: tuple["Future[Snapshot]", ...]


class Agenda:
    """Thread-safe: anyone may add to it; the loader takes from it, and waits for more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._all = False
        self._parts: set[Part] = set()
        self._closed: set[Path] = set()
        self._waiters: list[Future[Snapshot]] = []

    @property
    def has_more(self) -> bool:
        """Whether something has come up since the last look began."""
        return self._wake.is_set()

    @property
    def waited_for(self) -> bool:
        """Whether someone waits for the next look."""
        return bool(self._waiters)

    def everything(self) -> None:
        """Anything may have changed."""
        with self._lock:
            self._all = True
        self._wake.set()

    def changed(self, parts: Iterable[Part], closed: Path | None = None) -> None:
        """Something of these has; whoever wrote the file `closed` has closed it, or renamed it to what it is."""
        with self._lock:
            self._parts.update(parts)
            if closed is not None:
                self._closed.add(closed)
        self._wake.set()

    def asked(self, models: Iterable[str] | None) -> "Future[Snapshot]":
        """Someone wants to know what is there now, of some models or of all; the snapshot after a look at these."""
        future: Future[Snapshot] = Future()
        with self._lock:
            self._waiters.append(future)
            self._all = self._all or models is None
            self._parts.update((model, None) for model in models or ())
        self._wake.set()
        return future

    def take(self) -> Turn:
        """All that has come up: the next look is to see to it."""
        self._wake.clear()
        with self._lock:
            turn = Turn(None if self._all else frozenset(self._parts), frozenset(self._closed), tuple(self._waiters))
            self._all, self._parts, self._closed, self._waiters = False, set(), set(), []
        return turn

    def wait(self, seconds: float) -> bool:
        """Wait until something has come up, or so long; whether something has."""
        return self._wake.wait(seconds)

    def close(self) -> None:
        """Nobody looks any more: whoever waits needn't."""
        self._wake.set()
        with self._lock:
            for waiter in self._waiters:
                waiter.cancel()
