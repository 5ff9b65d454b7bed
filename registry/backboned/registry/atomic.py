"""Files that are either whole or not there."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".writing-"
"""Names of files being written begin so; whatever looks into a checkpoint directory passes over names with a dot."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a new file that then takes the place of `path`: flushed to disk, renamed, and the folder too.

    On any error nothing is left behind and what was at `path` stays. Raises `OSError` as the file system does.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
