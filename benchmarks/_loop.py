"""One loop of the limit: photos in, probabilities out, on the threads that it was given."""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backboned.registry import Catalogue
from backboned.server.compute.device import Device
from benchmarks._network import prepared, stacked

_Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Times:
    """What a run took: the seconds of each batch, of all of it, and those of the CPU."""

    seconds: list[float]
    elapsed: float
    cpu: float


class Loop:
    """A frozen, compiled network and what feeds it. For the thread that made it."""

    def __init__(
        self, backbone: str, weights: Path, photos: Path, device: str, *, cores: Sequence[int], threads: int
    ) -> None:
        """Pin this process to `cores`, and let torch use `threads`: before it compiles, which depends on it."""
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        torch._inductor.config.freezing = True
        described = Catalogue.from_entry_points().get(backbone)
        self._preprocessing = described.preprocessing
        self._device = Device.choose(device)
        network = described.module()
        network.load_state_dict(torch.load(weights, weights_only=True))
        network = network.eval().requires_grad_(False).to(self._device.device, self._device.dtype)
        self._network = network.to(memory_format=torch.channels_last)
        self._compiled: dict[int, _Network] = {}
        self._photos = [path.read_bytes() for path in sorted(photos.iterdir())]
        self._pool = ThreadPoolExecutor(len(cores)) if self._device.device.type == "cuda" else None

    @torch.inference_mode()
    def compile(self, batch: int) -> None:
        """Make the code for batches of this size, and warm it."""
        self._compiled[batch] = torch.compile(self._network, dynamic=False)
        for images in itertools.islice(self._batches(batch), 5):
            self._compute(images)

    @torch.inference_mode()
    def run(self, batch: int, begin: float, seconds: float, pause: float) -> Times:
        """Decode and compute batch after batch, from the monotonic time `begin` on, `pause` seconds between them."""
        taken: list[float] = []
        batches = self._batches(batch)
        time.sleep(max(0.0, begin - time.monotonic()))
        cpu, started = time.process_time(), time.monotonic()
        while (now := time.monotonic()) < started + seconds:
            self._compute(next(batches))
            taken.append(time.monotonic() - now)
            if pause:
                time.sleep(pause)
        return Times(taken, time.monotonic() - started, time.process_time() - cpu)

    def _compute(self, images: list[Tensor]) -> Tensor:
        x = stacked(images, self._preprocessing, self._device)
        return self._compiled[len(images)](x).softmax(1).cpu()

    def _batches(self, size: int) -> Iterator[list[Tensor]]:
        """Prepared images; with a pool, the next two batches are made while one is computed."""
        photos = itertools.cycle(self._photos)
        if self._pool is None:
            while True:
                yield [prepared(next(photos), self._preprocessing) for _ in range(size)]
        ahead = [
            [self._pool.submit(prepared, next(photos), self._preprocessing) for _ in range(size)]
            for _ in range(2 if size > 1 else 0)
        ]
        while True:
            ahead.append([self._pool.submit(prepared, next(photos), self._preprocessing) for _ in range(size)])
            yield [future.result() for future in ahead.pop(0)]
