"""The engine: one thread that runs batches of whatever queued while the device was busy. No timer."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.compute.device import Device
from backboned.server.compute.preprocess import normalise
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.serving.tree import Row, run_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What one image gets: logits `[outputs]` and pooled features `[feature_size]`, on the CPU in float32."""

    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class Item:
    """One prepared image `[3, crop, crop]` uint8 on its way through a model; `future` belongs to the event loop."""

    model: LoadedModel
    image: Tensor
    future: "asyncio.Future[Answer]"
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def group(self) -> tuple[str, Preprocessing]:
        """Items of one group can ride in one batch."""
        return self.model.path[0].key[0], self.model.manifest.preprocessing


class Engine:
    """Runs items in batches on one device. `submit` is for the event loop it was made in."""

    def __init__(self, device: Device, telemetry: ServingTelemetry, *, max_batch_size: int = 32) -> None:
        self._device = device
        self._telemetry = telemetry
        self._max_batch_size = max_batch_size
        self._queue: deque[Item] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._images_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Compute what is queued, then stop."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def submit(self, model: LoadedModel, image: Tensor) -> "asyncio.Future[Answer]":
        """Queue one prepared image. Cancelling the future leaves it out, unless its batch has begun."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._queue.append(Item(model, image, future))
            self._changed.notify()
        return future

    def depth(self) -> int:
        """How many images wait."""
        return len(self._queue)

    def seconds_to_clear(self, images: int) -> float:
        """About how long `images` take at the speed of the last batches."""
        return images / self._images_per_second if self._images_per_second else 1.0

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            if not batch:
                continue
            started = time.monotonic()
            try:
                answers: Sequence[Answer | Exception] = self._compute(batch)
            except Exception as error:  # nothing that a batch does may end the engine
                log.exception("a batch of %d images failed", len(batch))
                answers = [error] * len(batch)
            self._tell(batch, started)
            batch[0].future.get_loop().call_soon_threadsafe(_deliver, batch, answers)

    def _take(self) -> list[Item] | None:
        """The next batch: the oldest item, and those behind it that can ride along. None when it is time to stop."""
        with self._changed:
            while not self._queue:
                if self._stopping:
                    return None
                self._changed.wait()
            batch: list[Item] = []
            rest: list[Item] = []
            while self._queue and len(batch) < self._max_batch_size:
                item = self._queue.popleft()
                if item.future.cancelled():
                    continue
                (rest if batch and item.group != batch[0].group else batch).append(item)
            self._queue.extendleft(reversed(rest))
            return batch

    @torch.inference_mode()
    def _compute(self, batch: Sequence[Item]) -> list[Answer | Exception]:
        images = torch.stack([item.image for item in batch]).to(self._device.device, non_blocking=True)
        x = normalise(images, batch[0].model.manifest.preprocessing).to(self._device.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        return [_answer(row) for row in run_tree([item.model for item in batch], x)]

    def _tell(self, batch: Sequence[Item], started: float) -> None:
        seconds = time.monotonic() - started
        speed = len(batch) / max(seconds, 1e-6)
        self._images_per_second = speed if not self._images_per_second else 0.8 * self._images_per_second + 0.2 * speed
        self._telemetry.batch(len(batch))
        self._telemetry.predict_phase("compute", seconds)
        for item in batch:
            self._telemetry.predict_phase("queue", started - item.queued_at)


def _answer(row: Row | Exception) -> Answer | Exception:
    if isinstance(row, torch.OutOfMemoryError):
        return BackbonedError(
            ErrorKind.RESOURCE_EXHAUSTED, "the device is out of memory; try again", retry_delay_seconds=1.0
        )
    if isinstance(row, Exception):
        return row
    features, logits = row
    pooled = features.float().flatten(1).mean(dim=1) if features.dim() > 1 else features.float()
    return Answer(logits.cpu(), pooled.cpu())


def _deliver(batch: Sequence[Item], answers: Sequence[Answer | Exception]) -> None:
    for item, answer in zip(batch, answers, strict=True):
        if item.future.done():
            continue
        if isinstance(answer, Exception):
            item.future.set_exception(answer)
        else:
            item.future.set_result(answer)
