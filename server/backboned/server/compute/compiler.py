"""Compiling stages aside: eager code serves until the compiled one is there, and again if there can't be any.

Which stages are compiled, and for which sizes of batch, is told by two pure functions, `worth_compiling` and
`next_size`. A stage that is one model's own among many runs eagerly: a compile takes some ten seconds of a core, for a
gain of a third (ResNet-50's stages, 2 cores of an AMD EPYC with AVX512-BF16).
"""

import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import uuid4

import torch

from backboned.registry.errors import BackbonedError
from backboned.server.compute.artefacts import Artefact, ArtefactKey, ArtefactStore, platform_of
from backboned.server.compute.compile_process import Order, Report
from backboned.server.compute.compiled import CompiledBatch, CompiledStage
from backboned.server.compute.device import Device
from backboned.server.compute.stages import LoadedStage
from backboned.server.compute.toolchain import missing_for_compiling

log = logging.getLogger(__name__)

_SETTLE_SECONDS = 3.0
_WORTH_DOUBLING = 1.05
"""A size is worth its compile where an image then takes 5 % less than in half of it."""

_HEAVY_BYTES = 64 * 2**20

_Chain = Sequence[LoadedStage]


def worth_compiling(paths: Iterable[_Chain]) -> list[LoadedStage]:
    """For each stage of each backbone, the one that most models stand on; most used first. Never a head.

    A stage counts that has weights, and has been called.
    """
    uses: Counter[LoadedStage] = Counter(stage for path in paths for stage in path)
    chosen: dict[tuple[str, str, torch.dtype], LoadedStage] = {}
    for stage, _ in uses.most_common():
        if not stage.is_head and stage.layout is not None and stage.size_bytes:
            chosen.setdefault((stage.key.backbone, stage.key.stage, stage.key.dtype), stage)
    return list(chosen.values())


def next_size(seconds: Mapping[int, float], largest: int, *, heavy: bool = False) -> int | None:
    """The size of batch to compile next, given the seconds that a batch of each compiled size takes; None: enough.

    1 and 8 always; the rest where batching pays, unless the stage is `heavy`: each size has a copy of the weights.
    """
    for size in (1, min(8, largest)):
        if size not in seconds:
            return size
    if heavy:
        return None
    top = max(seconds)
    if seconds[1] * 8 < _WORTH_DOUBLING**3 * seconds[min(8, largest)] * 8 / min(8, largest):
        return None
    for size in (4, 2):
        if size < largest and size not in seconds:
            return size
    doubled = 2 * top
    if doubled <= largest and 2 * seconds[top // 2] >= _WORTH_DOUBLING * seconds[top]:
        return doubled
    return None


class StageCompiler:
    """Compiles what is worth it, one piece at a time, in a process apart. `consider` is for one thread."""

    def __init__(
        self,
        device: Device,
        artefacts: ArtefactStore,
        *,
        plugins: tuple[str, ...] = (),
        concurrency: int,
        largest_batch: int,
        enabled: bool = True,
    ) -> None:
        """`concurrency` threads may run a stage at once; no batch will be larger than `largest_batch`."""
        self._device = device
        self._artefacts = artefacts
        self._plugins = plugins
        self._concurrency = concurrency
        self._largest_batch = largest_batch
        self._enabled = enabled
        self._platform = platform_of(device)
        self._progress: weakref.WeakKeyDictionary[LoadedStage, _Progress] = weakref.WeakKeyDictionary()
        self._queue: list[weakref.ref[LoadedStage]] = []
        self._changed = threading.Condition()
        self._settled_at = 0.0
        self._stopping = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)
        self.unavailable = missing_for_compiling()

    def start(self) -> None:
        """Start the thread, unless nothing is to be compiled, or can be: then say so."""
        if not self._enabled:
            return
        if self.unavailable:
            log.warning("%s", self.unavailable)
        else:
            self._thread.start()

    def stop(self) -> None:
        """End at once, with whatever is being compiled."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if (process := self._process) is not None:
            process.kill()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def consider(self, paths: Iterable[_Chain]) -> None:
        """Take in what is loaded: use what is compiled on disk already, and queue the rest."""
        if not self._enabled:
            return
        missing = []
        for stage in worth_compiling(paths):
            if stage not in self._progress:
                self._progress[stage] = _Progress({}, {}, {})
                self._use_known(stage)
            if not self._progress[stage].done:
                missing.append(weakref.ref(stage))
        with self._changed:
            if {r() for r in missing} != {r() for r in self._queue}:
                self._settled_at = time.monotonic() + _SETTLE_SECONDS
            self._queue = missing
            self._changed.notify()

    def pending(self) -> int:
        """How many stages wait to be compiled, or are being."""
        return 0 if self.unavailable else sum(reference() is not None for reference in list(self._queue))

    def compiled(self) -> int:
        """How many stages run compiled."""
        return sum(stage.compiled is not None for stage in list(self._progress))

    def _use_known(self, stage: LoadedStage) -> None:
        progress = self._progress[stage]
        while (size := self._next_size(stage)) is not None:
            found = self._artefacts.find(self._key(stage, size))
            if found is None or not self._take(stage, size, found):
                break
        progress.done = progress.done or size is None
        self._install(stage)

    def _take(self, stage: LoadedStage, size: int, artefact: Artefact) -> bool:
        progress = self._progress[stage]
        try:
            batch = CompiledBatch(artefact.library, self._device.device, concurrency=self._concurrency)
        except BackbonedError as error:
            log.warning("%s of %s runs uncompiled: %s", stage.key.stage, stage.key.backbone, error.message)
            progress.done = True
            return False
        progress.batches[size], progress.seconds[size] = batch, artefact.seconds
        progress.libraries[size] = artefact.library
        return True

    def _next_size(self, stage: LoadedStage) -> int | None:
        heavy = stage.size_bytes > _HEAVY_BYTES
        return next_size(self._progress[stage].seconds, self._largest_batch, heavy=heavy)

    def _install(self, stage: LoadedStage) -> None:
        progress = self._progress[stage]
        if stage.layout is not None and progress.batches:
            stage.use(CompiledStage(stage.layout, progress.batches, progress.seconds))

    def _key(self, stage: LoadedStage, size: int) -> ArtefactKey:
        return ArtefactKey.of(stage, size, self._platform)

    def _run(self) -> None:
        """Compile as long as there is something to, then let the process end."""
        while (stage := self._next()) is not None:
            try:
                with self._artefacts.work_folder() as folder, _Worker(folder) as worker:
                    self._process = worker.process
                    while stage is not None and not self._stopping and worker.alive():
                        self._compile(stage, folder, worker)
                        del stage
                        stage = self._next(wait=False)
            except OSError as error:
                self.unavailable = f"networks run uncompiled: {error}"
                log.warning("%s", self.unavailable)
                return
            finally:
                self._process = None
            del stage

    def _next(self, *, wait: bool = True) -> LoadedStage | None:
        with self._changed:
            while not self._stopping:
                rest = self._settled_at - time.monotonic()
                left = [s for r in self._queue if (s := r()) is not None and not self._progress[s].done]
                self._queue = [weakref.ref(stage) for stage in left]
                if left and rest <= 0:
                    return left[0]
                left.clear()
                if not wait and not self._queue:
                    return None
                self._changed.wait(rest if self._queue else None)
            return None

    def _compile(self, stage: LoadedStage, folder: Path, worker: "_Worker") -> None:
        """One size of one stage."""
        progress = self._progress[stage]
        size = self._next_size(stage)
        assert size is not None and stage.layout is not None
        # A library that has been loaded may stay, and its name with it: no two have one.
        weights, library = folder / "weights.pt", folder / f"{uuid4().hex}.so"
        others = {other: path for other, path in progress.libraries.items() if path.exists()}
        started = time.monotonic()
        try:
            torch.save({name: tensor.cpu() for name, tensor in stage.tensors().items()}, weights)
            report = worker.compile(
                Order(
                    stage.key.backbone, stage.key.stage, self._plugins, weights, stage.layout, size,
                    str(self._device), library, others,
                )
            )  # fmt: skip
            if self._stopping:
                return
            if report.error:
                raise ValueError(report.error)
            artefact = self._artefacts.add(self._key(stage, size), Artefact(library, report.seconds[size]))
            for other in others:
                progress.seconds[other] = report.seconds[other]
                with suppress(OSError, ValueError):  # gone, to make room: what is loaded runs on all the same
                    self._artefacts.retime(self._key(stage, other), report.seconds[other])
        except (OSError, ValueError, RuntimeError) as error:  # a full disk; what torch says of one
            if self._stopping:
                return
            log.warning("%s of %s runs uncompiled: %s", stage.key.stage, stage.key.backbone, error)
            progress.done = True
            return
        if self._take(stage, size, artefact):
            self._install(stage)
            progress.done = self._next_size(stage) is None
        log.info(
            "%s of %s is compiled for batches of %d, in %.0f s: %.1f ms an image",
            stage.key.stage, stage.key.backbone, size, time.monotonic() - started, report.seconds[size] / size * 1e3,
        )  # fmt: skip


@dataclass
class _Progress:
    """What of a stage is compiled, by size of batch; `done` when no more will be."""

    batches: dict[int, CompiledBatch]
    seconds: dict[int, float]
    libraries: dict[int, Path]
    done: bool = False


class _Worker:
    """The process, while it lasts."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "log").open("wb")
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "backboned.server.compute.compile_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in _streams(self.process):
            with suppress(OSError):
                stream.close()
        self.process.kill()
        self.process.wait()
        self._log.close()

    def alive(self) -> bool:
        """Whether the process can take another order."""
        return self.process.poll() is None

    def compile(self, order: Order) -> Report:
        """Wait for what becomes of an order. Raises `OSError` if the process has ended."""
        given, told = _streams(self.process)
        given.write(order.to_json() + "\n")
        given.flush()
        line = told.readline()
        if not line:
            self.process.wait()
            raise OSError(f"the process that compiles ended, with {self.process.returncode}")
        return Report.from_json(line)


def _streams(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None  # both were asked for
    return process.stdin, process.stdout
