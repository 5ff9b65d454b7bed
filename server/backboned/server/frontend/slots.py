"""Memory that a front end and the daemon share: slots of one size, a prepared image in each.

It has no name in any file system: the daemon makes it and hands it down as a file descriptor, so it is gone with the
last process that has it. Pages that were never written to take no memory.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(size_bytes: int) -> int:
    """Shared memory of a size that can't be changed, as a file descriptor, for the caller to close."""
    descriptor = os.memfd_create("backboned-images", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)  # a process that shrank it would kill the others
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def map_for_reading(descriptor: int) -> mmap.mmap:
    """All of it, to read from. It stays as long as something refers to it."""
    return mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)


class Slots:
    """The front end's side: which slots are free, and how to fill them. For one event loop; `write` for any thread."""

    def __init__(self, descriptor: int, slot_bytes: int) -> None:
        memory = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._memory: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self._slot_bytes = slot_bytes
        # The slot that was freed last is taken first: few are ever written to where few are needed.
        self._free = list(reversed(range(len(memory) // slot_bytes)))

    @property
    def free_count(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, count: int, image_bytes: int) -> list[int] | None:
        """`count` free slots, or none if so many aren't free or an image of `image_bytes` doesn't fit into one."""
        if count > len(self._free) or image_bytes > self._slot_bytes:
            return None
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def release(self, slots: Sequence[int]) -> None:
        """Free slots that were taken."""
        self._free += slots

    def write(self, slot: int, image: NDArray[np.uint8]) -> None:
        """Copy an image `[height, width, 3]` into a slot, row by row."""
        start = slot * self._slot_bytes
        self._memory[start : start + image.size].reshape(image.shape)[...] = image
