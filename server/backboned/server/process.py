"""Settings of this process that pay for a server of networks, made by the command before torch is imported.

glibc gives large blocks back to the kernel as soon as they are freed, and gets them back page by page: a network's
activations are such blocks, batch after batch. The settings here keep them, in few arenas, on huge pages.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_KEPT_BYTES = 512 * 2**20
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def tune_process() -> None:
    """Apply what isn't set by the environment already. Does nothing where the C library isn't glibc."""
    # Threads of OpenMP that wait for the next parallel region spin for some milliseconds, and then leave the core to
    # others: who asks for one image after another finds them awake. A lane beside another has no such threads.
    os.environ.setdefault("GOMP_SPINCOUNT", "200000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 4)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TOP_PAD, 16 * 2**20)
