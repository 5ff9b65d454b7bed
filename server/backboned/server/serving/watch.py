"""Watching the checkpoint directory: every event is a hint where to look, and nothing more."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from backboned.registry.look import Part, version_number

log = logging.getLogger(__name__)

_EVENTS = [
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
]
"""The others say nothing new, cost their time, or come of our own looks."""

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


class Told(Protocol):
    """Who is told what has changed. Called from the observer's thread."""

    def everything(self) -> None:
        """Anything may have."""

    def changed(self, parts: Iterable[Part], closed: Path | None = None) -> None:
        """Something of these; whoever wrote the file `closed` has closed it, or renamed it to what it is.

        Without parts: something that links may lead to.
        """


class Watcher:
    """Tells of changes below `root` soon after they were made, where the file system can tell.

    Its owner looks regularly all the same; `ensure` (called by it, from one thread) mends a watch that was lost, as
    when the directory was replaced. `polling` says that the regular look is all there is.
    """

    def __init__(self, root: Path, told: Told, mode: WatchMode = "auto") -> None:
        self._root = root
        self._told = told
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None
        self.polling = mode == "polling" or (mode == "auto" and needs_polling(root.resolve(), _mounts()))

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
            real = os.path.realpath(self._root)
            handler = _Handler(self._root, real, self._told)
            observer.schedule(handler, real, recursive=True, event_filter=_EVENTS)  # it follows no link
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


class _Handler(FileSystemEventHandler):
    """`root` is where the directory is for its owner, `real` where links lead to from there."""

    def __init__(self, root: Path, real: str, told: Told) -> None:
        self._root = root
        self._real = real.rstrip(os.sep) + os.sep
        self._told = told

    def on_any_event(self, event: FileSystemEvent) -> None:
        paths = [os.fsdecode(path) for path in (event.src_path, event.dest_path) if path]
        if not all(path.startswith(self._real) for path in paths):
            self._told.everything()
            return
        within = [Path(path[len(self._real) :]) for path in paths]
        seen = [path for path in within if len(path.parts) == 1 or not path.name.startswith(".")]
        if not seen:
            return  # a file that is still being written under a name of its own
        closed = self._root / within[-1] if isinstance(event, FileClosedEvent | FileMovedEvent) else None
        parts = [_part(path, is_directory=event.is_directory) for path in seen]
        self._told.changed([part for part in parts if not part[0].startswith(".")], closed)


def _part(path: Path, *, is_directory: bool) -> Part:
    """The version that a path is of, or the model, where it is of no version, or could be a link to one."""
    model, *names = path.parts
    inside = len(names) > 1 or (names and is_directory)
    return model, version_number(names[0]) if inside else None


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
