"""What the frozen stages make of images: computed once a job, then read batch by batch."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError
from backboned.server.compute.decode import decode
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import augment, normalise, read
from backboned.server.compute.stages import LoadedStage, run_path
from backboned.server.training.datasets import Dataset, Sample

_ROWS_AT_ONCE = {"cpu": 16, "cuda": 64}


class Features(Protocol):
    """The activations at the freezing boundary for a list of images, in one or more views each.

    For one thread. An implementation may keep them in memory, on disk, or between jobs.
    """

    def prepare(self, done: Callable[[int], None]) -> dict[int, str]:
        """Read all images once, and return why those that can't be read can't be, by index.

        `done(count)` is called in this thread after every few rows; what it raises ends the work.
        """

    def batch(self, images: Tensor, views: Tensor) -> Tensor:
        """`[n]` indices of images and of their views → `[n, …]` float32 on the device, ready for autograd."""


@dataclass(frozen=True)
class Frozen:
    """The stages below the boundary; none if everything trains."""

    path: Sequence[LoadedStage]
    preprocessing: Preprocessing
    device: Device

    def __call__(self, pixels: Tensor) -> Tensor:
        """`[n, 3, crop, crop]` uint8 → `[n, …]` float32 on the device. May be called from any thread."""
        with torch.inference_mode():
            x = normalise(pixels.to(self.device.device), self.preprocessing)
            x = x.to(self.device.dtype, memory_format=torch.channels_last)  # a quarter faster on the CPU
            return run_path(self.path, x).float()


@dataclass(frozen=True)
class Images:
    """Image files and the views that are taken of each. View 0 is the image as it is served."""

    dataset: Dataset
    samples: Sequence[Sample]
    views: int
    preprocessing: Preprocessing
    seed: int
    max_pixels: int

    def read(self, index: int) -> Tensor:
        """All views of an image: `[views, 3, crop, crop]` uint8. Raises `BackbonedError` or `OSError`."""
        path = PurePosixPath(self.samples[index].path)
        data = self.dataset.read(self.samples[index])
        served = read(data, self.preprocessing, max_pixels=self.max_pixels)
        if self.views == 1:
            return served[None]
        image = decode(data, max_pixels=self.max_pixels)
        others = (augment(image, self.preprocessing, self._seed(path, view)) for view in range(1, self.views))
        return torch.stack([served, *others])

    def _seed(self, path: PurePosixPath, view: int) -> int:
        name = f"{self.seed}\0{view}\0{path.parent.name}/{path.name}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


class MappedFeatures:
    """`Features` in a memory-mapped file: the activations, or if these are too large the pixels, to be run each time.

    Each worker thread decodes a few images and runs them with one thread of torch: on two cores that is twice as fast
    as one pass over both, and a busy neighbour doesn't stall it.
    """

    def __init__(self, images: Images, frozen: Frozen, file: Path, *, budget_bytes: int, workers: int) -> None:
        """Reserve the file. Raises `OSError` if there is no room for it.

        Activations are kept if they take `budget_bytes` at most.
        """
        self._images = images
        self._frozen = frozen
        self._workers = workers
        pixels = torch.zeros(1, *frozen.preprocessing.input_shape, dtype=torch.uint8)
        activations = frozen(pixels).cpu()
        rows = len(images.samples) * images.views
        self.keeps_activations = bool(frozen.path) and rows * activations.nbytes <= budget_bytes
        row = activations if self.keeps_activations else pixels
        with file.open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, max(rows * row.nbytes, 1))  # a map without room behind it kills
        mapped = torch.from_file(str(file), shared=True, size=rows * row.numel(), dtype=row.dtype)
        self._rows = mapped.view(rows, *row.shape[1:])

    def prepare(self, done: Callable[[int], None]) -> dict[int, str]:
        """Read all images once, in parallel. See `Features.prepare`."""
        reasons: dict[int, str] = {}
        with ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(self._fill, chunk) for chunk in self._chunks()]
            try:
                for future in as_completed(futures):
                    rows, failed = future.result()
                    reasons |= failed
                    done(rows)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return reasons

    def batch(self, images: Tensor, views: Tensor) -> Tensor:
        """Rows of the file, on the device. See `Features.batch`."""
        rows = self._rows[views * len(self._images.samples) + images]
        if self.keeps_activations:
            return rows.to(self._frozen.device.device)
        return self._frozen(rows).clone()  # a clone is no inference tensor

    def _chunks(self) -> Iterator[range]:
        count = len(self._images.samples)
        size = max(1, _ROWS_AT_ONCE[self._frozen.device.device.type] // self._images.views)
        return (range(start, min(start + size, count)) for start in range(0, count, size))

    def _fill(self, chunk: range) -> tuple[int, dict[int, str]]:
        reasons: dict[int, str] = {}
        pixels: list[Tensor] = []
        rows: list[int] = []
        for index in chunk:
            try:
                pixels.append(self._images.read(index))
                rows += range(index, len(self._rows), len(self._images.samples))
            except BackbonedError as error:
                reasons[index] = error.message
            except OSError as error:
                reasons[index] = f"can't be read: {error.strerror}"
        if pixels:
            content = torch.cat(pixels)
            self._rows[torch.tensor(rows)] = self._frozen(content).cpu() if self.keeps_activations else content
        return len(chunk) * self._images.views, reasons
