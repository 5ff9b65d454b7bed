"""Files of the checkpoint directory, opened only if they are files and lie within it."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_NO_FILE = (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)
"""Opening what is there fails so at every try: a link to itself, a socket, a name that no file can have."""


def leads_out(path: Path, root: Path | str) -> bool:
    """Whether `path` is a link, or lies behind one, that leads out of `root`."""
    # `Path.resolve` raises for a link to itself
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def open_inside(path: Path, root: Path) -> BinaryIO:
    """Open a file to read. Raises `ValueError` if it is no file or leads out of `root`, and `OSError`.

    A pipe without a writer would keep its reader for ever: opening it returns at once.
    """
    if leads_out(path, root):
        raise ValueError("it is a link that leads out of the checkpoint directory")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise ValueError(f"it is not a file: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_inside(path: Path, root: Path, *, most_bytes: int) -> bytes:
    """The content of a small file. Raises `ValueError` as `open_inside` does, or if it is too large, and `OSError`."""
    with open_inside(path, root) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    return content
