"""Compiled stages: libraries that torch's AOTInductor made, run through their C interface.

The interface is declared in torch/csrc/inductor/aoti_runtime/interface.h. It is called by ctypes, which lets other
threads of Python run meanwhile (torch's own binding does not: a thread beside it waited 310 ms where it now waits 5,
torch 2.15), and needs no Dynamo in this process.
"""

import _ctypes
import ctypes
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from backboned.registry.errors import BackbonedError, ErrorKind

_NEARLY = 1.03

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


@dataclass(frozen=True)
class Layout:
    """What a stage reads, one image at a time: `shape` without the batch, and whether channels come last in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> "Layout":
        """That of a batch `[n, …]`."""
        return cls(tuple(x.shape[1:]), x.dtype, x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))

    def matches(self, x: Tensor) -> bool:
        """Whether a batch has this shape and type."""
        return x.shape[1:] == self.shape and x.dtype == self.dtype

    def arrange(self, x: Tensor) -> Tensor:
        """A batch with its values where compiled code looks for them; the same tensor if they are there already."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


class CompiledBatch:
    """A stage compiled for one shape of input, `[bucket, …]`, its weights included. May be called from any thread."""

    def __init__(self, library: Path, device: torch.device, *, concurrency: int) -> None:
        """Load it; up to `concurrency` threads can run it at once. Raises `BackbonedError` if it can't be loaded."""
        self._library = library
        self.size_bytes = library.stat().st_size if library.exists() else 0
        """Of the library, which is nearly all weights."""
        self._cuda = device.type == "cuda"
        try:
            loaded = ctypes.CDLL(str(library))
            container = ctypes.c_void_p()
            error = loaded.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(container), ctypes.c_size_t(concurrency), str(device).encode(), None
            )
        except (OSError, AttributeError) as problem:
            raise BackbonedError(ErrorKind.INTERNAL, f"{library} can't be loaded: {problem}") from problem
        self._finalizer = weakref.finalize(self, _free, loaded, container)
        if error:
            raise BackbonedError(ErrorKind.INTERNAL, f"{library} can't be loaded: its weights could not be placed")
        self._container = container
        self._run = loaded.AOTInductorModelContainerRun

    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[bucket, …]`, of the layout that it was compiled for, to `[bucket, …]`."""
        given = (ctypes.c_void_p * 1)(_capsule_pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(x), None))
        got = (ctypes.c_void_p * 1)()
        stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream if self._cuda else None)
        one = ctypes.c_size_t(1)
        if self._run(self._container, given, one, got, one, stream, None):
            raise BackbonedError(ErrorKind.INTERNAL, f"{self._library} failed; the reason is on the daemon's stderr")
        # The function for one tensor of the same name leaves the handle, and with it the memory, to nobody.
        result: Tensor
        (result,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_new_capsule(got[0], None, None)])
        return result


def _free(loaded: ctypes.CDLL, container: ctypes.c_void_p) -> None:
    if container.value:
        loaded.AOTInductorModelContainerDelete(container)
    with suppress(OSError):
        _ctypes.dlclose(loaded._handle)


class CompiledStage:
    """A stage compiled for some sizes of batch; it runs any number of images in pieces of those sizes."""

    def __init__(self, layout: Layout, batches: Mapping[int, CompiledBatch], seconds: Mapping[int, float]) -> None:
        """`batches` and the `seconds` that each takes are by size of the batch."""
        self.layout = layout
        self._batches = dict(batches)
        self._sizes = tuple(sorted(batches))
        self._seconds = tuple(sorted((size, seconds[size]) for size in batches))

    @property
    def size_bytes(self) -> int:
        """Memory of its copies of the stage's weights: one for each size of batch."""
        return sum(batch.size_bytes for batch in self._batches.values())

    @property
    def best_size(self) -> int:
        """The smallest size in which an image takes little more than in any other."""
        fastest = min(seconds / size for size, seconds in self._seconds)
        return next(size for size, seconds in self._seconds if seconds / size <= _NEARLY * fastest)

    def pieces(self, images: int) -> tuple[int, ...]:
        """The sizes, largest first, in which so many images are computed soonest; the last may have room to spare."""
        return pieces(self._seconds, images)

    def parts(self, images: int) -> tuple[int, ...]:
        """The same, without the room to spare: they make up exactly `images`."""
        sizes = self.pieces(images)
        return (*sizes[:-1], images - sum(sizes[:-1]))

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, …]` of its layout's shape and type → `[n, …]`."""
        x = self.layout.arrange(x)
        done = [self._piece(part) for part in x.split(self.parts(len(x)))]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _piece(self, x: Tensor) -> Tensor:
        """At most as many images as the largest size: by the smallest size that has room for them."""
        images = len(x)
        size = next(size for size in self._sizes if size >= images)
        if size > images:
            filler = x[-1:].expand(size - images, *x.shape[1:])
            x = self.layout.arrange(torch.cat([x, filler]))
        return self._batches[size](x)[:images]


@lru_cache(4096)
def pieces(seconds: Sequence[tuple[int, float]], images: int) -> tuple[int, ...]:
    """The cheapest sizes that make up at least `images`, from `(size, seconds)` pairs; largest first."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for wanted in range(1, images + 1):
        best.append(
            min(
                (cost + best[max(0, wanted - size)][0], (size, *best[max(0, wanted - size)][1]))
                for size, cost in seconds
            )
        )
    return tuple(sorted(best[images][1], reverse=True))
