"""The engine: threads that each take what is waiting, prepare it, and run it through the tree. No timer anywhere.

On a CPU there is one lane for each core, single-threaded while the others work: no barrier at every operator, and all
read the same weights. A lane decodes an image and then looks whether more have come meanwhile, up to its share of all
that is under way: so a batch is what queued while the device worked, and a call that is alone doesn't wait. On CUDA a
pool of threads decodes ahead, and two lanes, each with a stream and a pinned buffer, overlap copies and kernels.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.server.compute.device import Device, usable_cores
from backboned.server.compute.stages import LoadedStage
from backboned.server.serving.ahead import Ahead
from backboned.server.serving.calls import Pixels, Prepared
from backboned.server.serving.cores import Cores
from backboned.server.serving.lane import Lane, as_told
from backboned.server.serving.queue import FairQueue, Group, Item
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.serving.tree import Answer

log = logging.getLogger(__name__)

Prepare = Callable[[bytes | Pixels | Prepared, Preprocessing], Tensor]
_Outcomes = Sequence[tuple[Answer, ...] | Exception]

_EAGER_BATCH_ON_CPU = 8
_NICENESS = 5
"""Of a lane on a CPU, beyond that of the daemon: where all want the cores, it gets a third of what others do."""

_CUDA_LANES = 2


class Engine:
    """Runs images through models on one device. `submit` is for the event loop that it is called in."""

    def __init__(
        self,
        device: Device,
        telemetry: ServingTelemetry,
        prepare: Prepare,
        *,
        max_batch_size: int = 32,
        threads: int = 0,
    ) -> None:
        """`prepare` makes `[3, crop, crop]` uint8 of an image, in any thread; `threads` 0 chooses the lanes."""
        self._device = device
        self._telemetry = telemetry
        self._prepare = prepare
        self._max_batch_size = max_batch_size
        self._on_cpu = device.device.type == "cpu"
        cores = usable_cores()
        self._lanes = threads or (cores if self._on_cpu else _CUDA_LANES)
        self._cores = Cores(cores, self._lanes)
        self._ahead = None if self._on_cpu else Ahead(cores, self._prepare_now, self._add)
        self._queue = FairQueue()
        self._lock = threading.Lock()
        self._idle: dict[int, threading.Condition] = {}
        self._renewed: set[int] = set()
        self._taken = 0
        self._stopping = False
        self._images_per_second = 0.0
        self._threads = [self._thread(i) for i in range(self._lanes)]

    @property
    def lanes(self) -> int:
        """How many batches can run at once."""
        return self._lanes

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Compute what is queued, then stop."""
        if self._ahead is not None:
            self._ahead.stop()
        with self._lock:
            self._stopping = True
            self._wake(len(self._idle))
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=60)

    def submit(
        self,
        models: Sequence[LoadedModel],
        sources: Sequence[bytes | Pixels | Prepared],
        tap: int | None = None,
        shadows: Sequence[LoadedModel] = (),
    ) -> "list[asyncio.Future[tuple[Answer, ...]]]":
        """Queue images, each to be answered by every one of `models`, which are of one group, and then of `shadows`.

        `tap` is the place in their paths whose pooled output is the embedding. Cancelling a future leaves its image
        out, unless its batch has begun.
        """
        loop = asyncio.get_running_loop()
        items = [Item(tuple(models), source, loop.create_future(), tap, tuple(shadows)) for source in sources]
        if self._ahead is None:
            self._add(items)
        else:
            self._ahead.add(items)
        return [item.future for item in items]

    def depth(self) -> int:
        """How many images wait."""
        return len(self._queue) + (len(self._ahead) if self._ahead is not None else 0)

    def taken(self) -> int:
        """How many images lanes have taken, and not answered."""
        return self._taken

    def seconds_to_clear(self, images: int) -> float:
        """About how long `images` take at the speed of the last batches."""
        return images / (self._images_per_second * self._lanes) if self._images_per_second else 1.0

    def _add(self, items: Sequence[Item]) -> None:
        with self._lock:
            self._queue.add(items)
            self._wake(len(items))

    def _wake(self, lanes: int) -> None:
        """The lanes that have waited least: their threads and caches are still warm."""
        for _ in range(min(lanes, len(self._idle))):
            self._idle.popitem()[1].notify()

    def _thread(self, number: int) -> threading.Thread:
        return threading.Thread(target=self._run, args=(number,), name=f"engine-{number}", daemon=True)

    def _run(self, number: int) -> None:
        if self._on_cpu:
            torch.get_num_threads()  # the first time in a thread, torch gives it what any other one has set last
            torch.set_num_threads(1)
            _stand_back()
        lane = Lane(self._device, self._max_batch_size)
        while self._step(number, lane) or not self._hand_over(number):
            pass

    def _hand_over(self, number: int) -> bool:
        """Give the lane a new thread, if that is why this one is to end; False if there is none to be had."""
        with self._lock:
            if number not in self._renewed or self._stopping:
                return True
            self._renewed.discard(number)
            successor = self._thread(number)
            try:
                successor.start()
            except RuntimeError:  # the system gives no more threads
                return False
            self._threads[number] = successor
            return True

    def _step(self, number: int, lane: Lane) -> bool:
        """Wait for a batch and run it; whoever waits here holds no model. False when the thread's time is over."""
        gathered = self._gather(number)
        if gathered is None:
            return False
        begun, batch = gathered
        started = time.monotonic()
        live = [item for item in batch if not item.future.done()]
        if live:
            if self._on_cpu:
                torch.set_num_threads(self._threads_for(number, len(batch)))
            try:
                outcomes: _Outcomes = lane.run(live)
            except Exception as error:  # nothing that a batch does may end a lane
                log.exception("a batch of %d images failed", len(live))
                outcomes = [as_told(error)] * len(live)
            self._tell(live, begun, started)
        with self._lock:
            self._taken -= len(batch)  # before its callers are answered, and ask for more
        if live:
            deliver(live, outcomes)
        return True

    def _gather(self, number: int) -> tuple[float, list[Item]] | None:
        """When work on the next batch began, and that batch, prepared. None when the lane's thread is to end."""
        batch: list[Item] = []
        group, begun = None, 0.0
        while True:
            with self._lock:
                while not batch and not len(self._queue) and not self._stopping:
                    self._idle[number] = threading.Condition(self._lock)
                    self._idle[number].wait()
                    if number in self._renewed:
                        return None
                item = self._queue.take(group) if len(batch) < self._share(batch) else None
                if item is None:
                    if batch:
                        return begun, batch
                    if self._stopping:
                        return None
                    continue
                self._taken += 1
            begun = begun if batch else time.monotonic()
            if item.image is not None or self._prepare_now(item):
                batch.append(item)
                group = group or Group.of(item.models[0])
            else:
                del item
                with self._lock:
                    self._taken -= 1

    def _share(self, batch: Sequence[Item]) -> int:
        """How many images a batch that begins with these should have: as many as the other lanes', in a good size."""
        if not batch:
            return 1
        under_way = len(self._queue) + self._taken
        return good_size(batch[0].models[0].path, -(-under_way // self._lanes), self._max_batch_size, self._on_cpu)

    def _threads_for(self, number: int, images: int) -> int:
        """The threads for a lane's batch of so many images; lanes that wait with too many are given a new thread."""
        with self._lock:
            threads = self._cores.take(number, images, len(self._queue) + self._taken)
            for other in self._cores.too_many(number):
                waiting = self._idle.pop(other, None)
                if waiting is not None:
                    self._cores.give_back(other)
                    self._renewed.add(other)
                    waiting.notify()
        return threads

    def _prepare_now(self, item: Item) -> bool:
        started = time.monotonic()
        try:
            item.image = self._prepare(item.source, item.models[0].manifest.preprocessing)
        except Exception as error:  # a bad image costs its own call alone
            deliver([item], [as_told(error)])
            return False
        if not isinstance(item.source, Prepared):  # whose front end tells the time that it took
            self._telemetry.predict_phase("decode", time.monotonic() - started)
        return True

    def _tell(self, batch: Sequence[Item], begun: float, started: float) -> None:
        now = time.monotonic()
        speed = len(batch) / max(now - begun, 1e-6)
        self._images_per_second = speed if not self._images_per_second else 0.8 * self._images_per_second + 0.2 * speed
        self._telemetry.batch(len(batch))
        self._telemetry.predict_phase("compute", now - started)
        for item in batch:
            self._telemetry.predict_phase("queue", started - item.queued_at)


def _stand_back() -> None:
    """Let the thread that takes calls, which needs a moment for each, go before this one, which has much to do."""
    thread = threading.get_native_id()
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)


def good_size(path: Sequence[LoadedStage], images: int, largest: int, on_cpu: bool) -> int:
    """The size of batch to make of `images` that wait: the largest of the pieces in which they are computed soonest."""
    compiled = [stage.compiled for stage in path if stage.compiled is not None]
    if not compiled:
        return max(1, min(images, _EAGER_BATCH_ON_CPU if on_cpu else largest, largest))
    images = max(1, min(images, max(each.best_size for each in compiled), largest))
    return max(each.pieces(images)[0] for each in compiled)


def deliver(batch: Sequence[Item], outcomes: _Outcomes) -> None:
    """Hand outcomes to the event loop that waits for them."""
    batch[0].future.get_loop().call_soon_threadsafe(_deliver, batch, outcomes)


def _deliver(batch: Sequence[Item], outcomes: _Outcomes) -> None:
    for item, outcome in zip(batch, outcomes, strict=True):
        if item.future.done():
            continue
        if isinstance(outcome, Exception):
            item.future.set_exception(outcome)
        else:
            item.future.set_result(outcome)
