"""What was fetched or unpacked, on disk, for this job and the next ones."""

import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from backboned.registry.atomic import TEMPORARY_PREFIX

KEPT_BYTES = 64 * 2**30
_ABANDONED_SECONDS = 3600


class Store:
    """Files by key. A file is there as a whole or not at all. Safe to use from several threads.

    Once there are more than `kept_bytes`, those that were used longest ago go, but none that this object was asked for.
    """

    def __init__(self, folder: Path, kept_bytes: int = KEPT_BYTES) -> None:
        """`folder` is made if it isn't there; what an interrupted job was writing is removed. Raises `OSError`."""
        self._folder = folder
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self._used: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(f"{TEMPORARY_PREFIX}*"):
            with suppress(OSError):
                if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                    file.unlink()

    def get(self, key: str, size_bytes: int | None = None) -> Path | None:
        """The file of this key, if it is there and, where a size is given, has it."""
        path = self._path(key)
        try:
            if size_bytes is not None and path.stat().st_size != size_bytes:
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        with self._lock:
            self._used.add(path)
        return path

    def add(self, key: str, write: Callable[[Path], None]) -> Path:
        """Have `write` make a file, which then is the one of this key. What it raises leaves nothing behind."""
        path = self._path(key)
        temporary = self._folder / (TEMPORARY_PREFIX + secrets.token_hex(8))
        try:
            write(temporary)
            path.parent.mkdir(exist_ok=True)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        with self._lock:
            self._used.add(path)
        return path

    def room_bytes(self) -> int:
        """How much may be added: half of the free disk."""
        return shutil.disk_usage(self._folder).free // 2

    def prune(self) -> None:
        """Remove what is too much. An `OSError` ends that quietly: there is always a next time."""
        with suppress(OSError):
            files = sorted(self._files(), key=lambda f: f[0], reverse=True)
            total = 0
            for _, size_bytes, path in files:
                total += size_bytes
                if total > self._kept_bytes and path not in self._used:
                    path.unlink()

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for folder in self._folder.iterdir():
            if folder.is_dir():
                for path in folder.iterdir():
                    stat = path.stat()
                    yield stat.st_mtime, stat.st_size, path

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / digest[:2] / digest
