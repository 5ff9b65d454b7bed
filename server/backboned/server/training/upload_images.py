"""Images that were uploaded, each kept once under the SHA-256 of its bytes.

`ab/abcdef…` is an image that is whole, and `ab/abcdef….part` the beginning of one. Datasets hold hard links to them, so
that the file system itself counts who needs an image.
"""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backboned.registry.digest import file_digest
from backboned.registry.errors import BackbonedError, ErrorKind, invalid
from backboned.server.training.upload_declaration import Entry

MAX_PIECE_BYTES = 2**20
ORPHAN_SECONDS = 24 * 3600.0
PART_SUFFIX = ".part"

_FULL = (errno.ENOSPC, errno.EDQUOT)
_STRIPES = 64
_FILES = "[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]*"


@contextmanager
def disk() -> Iterator[None]:
    """Turns a full disk into `BackbonedError` `RESOURCE_EXHAUSTED`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise BackbonedError(
            ErrorKind.RESOURCE_EXHAUSTED, "disk full: the daemon has no room for more images; delete datasets"
        ) from error


class Writer:
    """A call that sends images, one after another; `image` is the digest of the one that it began last."""

    def __init__(self) -> None:
        self.image = ""


class ImageStore:
    """Takes images piece by piece, at most `quota_bytes` in all. Safe to use from several threads.

    Of several calls that send one image at once, the one that began it last writes it; what the others send of it is
    passed over.
    """

    def __init__(self, folder: Path, quota_bytes: int) -> None:
        self._folder = folder
        self._quota_bytes = quota_bytes
        self._used_bytes = 0
        self._counting = threading.Lock()
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self._writers: dict[str, Writer] = {}
        self._claiming = threading.Lock()

    def open(self, now: float | None = None) -> None:
        """Count what is there, and sweep it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._used_bytes = sum(file.stat().st_size for file in self._folder.glob(_FILES))
        self.sweep(now)

    def sweep(self, now: float | None = None) -> None:
        """Remove images, whole or begun, that no dataset has held for a day."""
        before = (now or time.time()) - ORPHAN_SECONDS
        for file in self._folder.glob(_FILES):
            with self._lock(file.name), suppress(FileNotFoundError):
                stat = file.stat()
                if stat.st_nlink == 1 and stat.st_mtime < before:
                    file.unlink()
                    self._count(-stat.st_size)

    @property
    def used_bytes(self) -> int:
        """Of all images, and of those that haven't come whole."""
        return self._used_bytes

    def path(self, sha256: str) -> Path:
        """Where an image is, or will be."""
        return self._folder / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether an image is there and whole."""
        return self.path(sha256).exists()

    def received(self, sha256: str) -> int:
        """How many bytes have come of an image that isn't whole yet."""
        return _size(self._part(sha256))

    def make_room(self, size_bytes: int) -> None:
        """See to it that so much more is within the quota. Raises `BackbonedError` `RESOURCE_EXHAUSTED`."""
        if self._used_bytes + size_bytes > self._quota_bytes:
            self.sweep()
        self._check_room(size_bytes)

    def write(self, writer: Writer, entry: Entry, offset: int, data: bytes) -> None:
        """Take a piece of an image; the last one makes it whole, if its digest is right.

        `offset` is at most how much of it has come: what is there from `offset` on is given up. `writer` stands for the
        call that sends it. Raises `BackbonedError`: `INVALID_ARGUMENT` naming the image, or `RESOURCE_EXHAUSTED`.
        """
        if not 0 < len(data) <= MAX_PIECE_BYTES:
            raise _wrong(entry, f"a piece has {len(data)} bytes, expected 1 to {MAX_PIECE_BYTES}", "data")
        with self._lock(entry.sha256), disk():
            if self.has(entry.sha256) or self._overtaken(writer, entry.sha256, offset):
                return
            self._append(entry, offset, data)

    def release(self, writer: Writer) -> None:
        """Forget a writer: its call has ended, or goes on with another image."""
        with self._claiming:
            if self._writers.get(writer.image) is writer:
                del self._writers[writer.image]

    def drop(self, sha256: str) -> None:
        """Remove an image that no dataset holds; one that is held stays."""
        path = self.path(sha256)
        with self._lock(sha256), suppress(FileNotFoundError):
            stat = path.stat()
            if stat.st_nlink == 1:
                path.unlink()
                self._count(-stat.st_size)

    def _overtaken(self, writer: Writer, sha256: str, offset: int) -> bool:
        """Whether another call has begun this image since `writer` did; if not, `writer` has it now."""
        if self._writers.get(sha256) is writer:
            return False
        if offset and writer.image == sha256:
            return True
        self.release(writer)
        with self._claiming:
            writer.image = sha256
            self._writers[sha256] = writer
        return False

    def _check_room(self, size_bytes: int) -> None:
        if self._used_bytes + size_bytes > self._quota_bytes:
            raise BackbonedError(
                ErrorKind.RESOURCE_EXHAUSTED,
                f"the quota of uploads is full: {self._used_bytes} of {self._quota_bytes} bytes are used, and "
                f"{size_bytes} more would come; delete datasets, or start the daemon with a larger --upload-quota",
            )

    def _append(self, entry: Entry, offset: int, data: bytes) -> None:
        part = self._part(entry.sha256)
        there = _size(part)
        end = offset + len(data)
        if not 0 <= offset <= there:
            raise _wrong(
                entry, f"a piece begins at byte {offset}, and {there} have come: go on there, or at 0", "offset"
            )
        if end > entry.size_bytes:
            self._forget(part)
            raise _wrong(entry, f"more than the declared {entry.size_bytes} bytes came", "data")
        self._check_room(end - there)
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("r+b" if there else "wb") as file:
                file.truncate(offset)
                file.seek(offset)
                file.write(data)
                if end == entry.size_bytes:
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            self._count(_size(part) - there)
        if end == entry.size_bytes:
            self._complete(entry, part, data if offset == 0 else None)

    def _complete(self, entry: Entry, part: Path, data: bytes | None) -> None:
        found = file_digest(part) if data is None else hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            self._forget(part)
            raise _wrong(entry, f"its bytes have the SHA-256 {found}, not {entry.sha256}", "sha256")
        part.chmod(0o444)
        part.rename(self.path(entry.sha256))

    def _forget(self, part: Path) -> None:
        self._count(-_size(part))
        part.unlink(missing_ok=True)

    def _count(self, size_bytes: int) -> None:
        with self._counting:
            self._used_bytes += size_bytes

    def _part(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / (sha256 + PART_SUFFIX)

    def _lock(self, sha256: str) -> threading.Lock:
        return self._stripes[int(sha256[:2], 16) % _STRIPES]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _wrong(entry: Entry, message: str, field: str) -> BackbonedError:
    return invalid(f"image {entry.path!r}: {message}", field=f"chunk.{field}")
