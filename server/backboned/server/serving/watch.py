"""Watching the checkpoint directory: every event is a hint to look, and nothing more."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from watchdog.events import (
    EVENT_TYPE_CLOSED,
    EVENT_TYPE_CLOSED_NO_WRITE,
    EVENT_TYPE_MOVED,
    EVENT_TYPE_OPENED,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

log = logging.getLogger(__name__)

WatchMode = Literal["auto", "inotify", "polling"]

_REMOTE = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "fuse", "gluster", "lustre", "vboxsf", "virtiofs")
"""Beginnings of file system names whose changes on another machine inotify doesn't see."""


def needs_polling(path: Path, mounts: str) -> bool:
    """Whether `path` lies on a file system whose remote changes inotify doesn't see; `mounts` is /proc/mounts."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind.startswith(_REMOTE)


class Watcher:
    """Calls `hint` soon after something below `root` changed, where the file system can tell.

    Its owner looks regularly all the same; `ensure` (called by it, from one thread) mends a watch that was lost, as
    when the directory was replaced. `polling` says that the regular look is all there is.
    """

    def __init__(self, root: Path, hint: Callable[[], None], mode: WatchMode = "auto") -> None:
        self._root = root
        self._handler = _Hints(hint)
        self._real_root = root
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None
        self.polling = mode == "polling" or (mode == "auto" and needs_polling(root.resolve(), _mounts()))

    def closed(self) -> frozenset[Path]:
        """The files that whoever wrote them has closed, or renamed to what they are, since the last call."""
        real = self._real_root
        return frozenset(
            self._root / p.relative_to(real) for p in self._handler.take_closed() if p.is_relative_to(real)
        )

    def ensure(self) -> None:
        """Watch the directory that is at `root` now."""
        if self.polling:
            return
        try:
            stat = self._root.stat()
        except OSError:
            return
        identity = (stat.st_dev, stat.st_ino)
        if self._observer is not None and self._observer.is_alive() and identity == self._watched:
            return
        self.stop()
        observer = Observer()
        try:
            self._real_root = Path(os.path.realpath(self._root))
            observer.schedule(self._handler, str(self._real_root), recursive=True)  # it follows no link
            observer.start()
        except OSError as error:  # such as the limit of inotify watches
            log.warning("can't watch %s (%s): looking every second instead", self._root, error)
            self.polling = True
            return
        self._observer, self._watched = observer, identity

    def stop(self) -> None:
        """Stop watching; wait for the observer's threads."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(timeout=5)
            self._observer = None


class _Hints(FileSystemEventHandler):
    def __init__(self, hint: Callable[[], None]) -> None:
        self._hint = hint
        self._closed: set[Path] = set()
        self._lock = threading.Lock()

    def on_any_event(self, event: FileSystemEvent) -> None:
        # Our own looks open and close files: to take these for changes would never end.
        if event.event_type in (EVENT_TYPE_OPENED, EVENT_TYPE_CLOSED_NO_WRITE):
            return
        if event.event_type in (EVENT_TYPE_CLOSED, EVENT_TYPE_MOVED) and not event.is_directory:
            with self._lock:
                self._closed.add(Path(os.fsdecode(event.dest_path or event.src_path)))
        self._hint()

    def take_closed(self) -> frozenset[Path]:
        with self._lock:
            closed, self._closed = self._closed, set()
        return frozenset(closed)


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
