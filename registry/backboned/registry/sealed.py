"""Files in memory: they have no name that anyone else could put something under, and can be sealed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@contextmanager
def in_memory() -> Iterator[Path]:
    """A path to an empty file in memory, for this process and for as long as the context lasts. Raises `OSError`."""
    descriptor = os.memfd_create("backboned", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextmanager
def sealed(path: Path) -> Iterator[Path]:
    """A path to a copy of a file, in memory, that nobody can change any more: what was checked is what is read.

    Raises `OSError`. It takes as much memory as the file is large.
    """
    with in_memory() as copy:
        shutil.copyfile(path, copy)
        fcntl.fcntl(int(copy.name), fcntl.F_ADD_SEALS, _SEALS)
        yield copy
