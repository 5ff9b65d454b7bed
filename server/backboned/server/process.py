"""What pays for a server of networks in its process, done by the command before the daemon's modules are imported.

glibc gives large blocks back to the kernel as soon as they are freed, and gets them back page by page: a network's
activations are such blocks, batch after batch. The settings here keep them, in few arenas, on huge pages.

Python's collector looks at all objects again and again, and everyone waits for it: at those of torch for 0.2 s, every
ten seconds under load. What is there to stay is left out.
"""

import ctypes
import gc
import importlib
import os
import sys
from types import ModuleType
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_KEPT_BYTES = 512 * 2**20
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_WANTED = "torch._dynamo.utils"


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


def import_torchvision() -> None:
    """Import torchvision without torch's compiler, of which its operators want one function: half of a daemon's start.

    The compiler comes when that function is called, or anything else of its module is asked for.
    """
    if _WANTED not in sys.modules:
        sys.modules[_WANTED] = _Later(_WANTED)
        gc.disable()
        try:
            importlib.import_module("torchvision")
        finally:
            gc.enable()
            _Later.forget()
        collect_no_more()


def collect_no_more() -> None:
    """Leave all objects that are there now out of later collections. Such as nobody uses any more are freed all the
    same, but for cycles.
    """
    gc.freeze()


class _Later(ModuleType):
    """Stands for a module until that is needed."""

    @staticmethod
    def forget() -> None:
        if isinstance(sys.modules.get(_WANTED), _Later):
            del sys.modules[_WANTED]

    @staticmethod
    def is_compile_supported(device_type: Any) -> bool:
        _Later.forget()
        return bool(importlib.import_module(_WANTED).is_compile_supported(device_type))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.forget()
        return getattr(importlib.import_module(_WANTED), name)
