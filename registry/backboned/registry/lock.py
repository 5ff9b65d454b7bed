"""Locks among processes that share a folder: let go by the kernel when their holder ends, however it does."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAUSE_SECONDS = 0.02
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(path: Path, wait_seconds: float = 10.0) -> Iterator[None]:
    """Hold the lock of the file at `path`, which is made if it isn't there, and stays.

    Other machines respect it where their file system has such locks, as NFS does; where there are none, nothing is
    held. Raises `OSError`: `EAGAIN` if another one holds it all the time.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + wait_seconds
        while not _taken(descriptor):
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, f"another process holds {path.name}", str(path))
            time.sleep(_PAUSE_SECONDS)
        yield
    finally:
        os.close(descriptor)


def abandoned(path: Path) -> bool:
    """Whether nobody holds the file at `path`. Where there are no locks, that can't be told: then it isn't."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
