"""Part `interference`: what callers notice of a FineTune that computes features.

Windows with and without it alternate, in turns of order. The job's photos are new each time, and enough: a window in
which the features were finished doesn't count, and is repeated with twice as many.
"""

import shutil
import threading
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backboned.client import Client
from benchmarks._bench import median, median_ratio
from benchmarks._daemon import Daemon
from benchmarks._models import Models
from benchmarks._plan import Course
from benchmarks._throughput import in_rounds

OPEN_LOAD = 0.3
"""Of what the daemon answers at best."""
CALLERS = {"32 callers": 32, "8 callers": 8}
_RATE = "images_per_second"
_VALIDATION_IMAGES = 10
_TRIES = 4
_PATIENCE_SECONDS = 120.0


class TooFewPhotos(Exception):
    """The job had computed all features before the window was over."""


class FeaturesUnderWay:
    """A job that computes features while the block runs, and is cancelled after it. For one thread."""

    def __init__(self, client: Client, backbone: str, dataset: Path, *, views: int) -> None:
        self._client = client
        self._job = client.fine_tune("fresh", backbone, dataset, views=views, max_epochs=1)
        self._began = threading.Event()
        self._over = threading.Event()
        self._progress: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        """Wait for the first features. Raises `SystemExit` if none come."""
        self._thread.start()
        if not self._began.wait(_PATIENCE_SECONDS):
            self._end()
            raise SystemExit(f"no features after {_PATIENCE_SECONDS:.0f} s of job {self._job.id}")
        return self

    def check(self) -> None:
        """Raise `TooFewPhotos` if it has done with the features, `SystemExit` if it failed."""
        if self._over.is_set():
            error = self._client.get_job(self._job.id).error
            raise SystemExit(f"the FineTune failed: {error}") if error else TooFewPhotos

    def rate(self, begin: float, end: float) -> float:
        """Images, over all views, whose features were computed a second between two moments."""
        inside = [(at, done) for at, done in self._progress if begin <= at <= end]
        if len(inside) < 2:
            return 0.0
        (first, before), (last, after) = inside[0], inside[-1]
        return (after - before) / (last - first)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self._client.cancel_job(self._job.id)
        self._thread.join()

    def _watch(self) -> None:
        for event in self._client.watch(self._job.id):
            progress = event.feature_progress
            if event.WhichOneof("event") == "feature_progress":
                self._progress.append((time.monotonic(), progress.done))
                self._began.set()
            if event.WhichOneof("event") == "epoch" or (progress.total and progress.done == progress.total):
                self._over.set()
        self._over.set()
        self._began.set()


class _Rounds:
    """Idle and busy windows of one daemon. For one thread."""

    def __init__(self, course: Course, daemon: Daemon, client: Client, models: Models, photos: Path) -> None:
        self._course = course
        self._daemon = daemon
        self._client = client
        self._models = models
        self._photos = photos
        self._images = course.plan.fresh_images
        self._numbers = count(1)
        self._open_rate = 0.0

    def settle(self) -> None:
        """Learn what the daemon answers at best, when it is warm."""
        best = self._load(callers=32)[_RATE]
        self._open_rate = OPEN_LOAD * best

    def idle(self) -> dict[str, Any]:
        """Nothing but the callers."""
        return self._windows()

    def busy(self) -> dict[str, Any]:
        """A FineTune that computes features meanwhile."""
        for _ in range(_TRIES):
            number = next(self._numbers)
            counts = {"train": self._images, "val": _VALIDATION_IMAGES}
            dataset = self._course.album.take(self._photos / f"fresh-{number}", counts, seed=1_000_000 + number)
            try:
                return self._beside(dataset)
            except TooFewPhotos:
                self._images *= 2
                print(f"  the features were done too early: again with {self._images} photos", flush=True)
            finally:
                shutil.rmtree(dataset)
        raise SystemExit(f"features of {self._images // 2} photos were done too early: lower --seconds")

    def _beside(self, dataset: Path) -> dict[str, Any]:
        plan = self._course.plan
        with FeaturesUnderWay(self._client, plan.served, dataset, views=plan.views) as job:
            alone = time.monotonic()
            time.sleep(min(4.0, self._course.bench.settings.seconds))
            begin = time.monotonic()
            windows = self._windows(job)
            end = time.monotonic()
            rates = {"features_alone": job.rate(alone, begin), "features_beside": job.rate(begin, end)}
        return {**windows, **rates}

    def _windows(self, job: FeaturesUnderWay | None = None) -> dict[str, Any]:
        asked: dict[str, dict[str, Any]] = {name: {"callers": number} for name, number in CALLERS.items()}
        seconds = 2 * self._course.bench.settings.seconds  # fewer calls a second need more of them
        asked["open"] = {"rate": self._open_rate, "seconds": seconds}
        found: dict[str, Any] = {}
        for name, question in asked.items():
            found[name] = self._load(**question)
            if job is not None:
                job.check()
        return found

    def _load(self, **question: Any) -> dict[str, Any]:
        answer = self._course.bench.load(self._daemon, self._course.plan.served, self._models, **question)
        return {**answer, "p50": answer["latency_ms"]["OK"]["p50"], "p99": answer["latency_ms"]["OK"]["p99"]}


def interference(course: Course) -> None:
    """Callers alone and beside a FineTune, in turns."""
    bench, served = course.bench, course.plan.served
    models, photos = bench.maker(served).heads(1), bench.work / "fresh"
    photos.mkdir()
    with (
        bench.daemon(f"{served}-interference", served, models, f"--data-root={photos}") as daemon,
        Client(daemon.grpc, timeout_seconds=600) as client,
    ):
        rounds = _Rounds(course, daemon, client, models, photos)
        rounds.settle()
        daemon.wait_until_compiled()
        found = in_rounds(bench.settings.rounds, {"idle": rounds.idle, "busy": rounds.busy})
    bench.found.measurements[f"interference {served}"] = found
    _tell(course, found)


def _tell(course: Course, found: dict[str, list[dict[str, Any]]]) -> None:
    add, served = course.bench.found.add, course.plan.served
    group = f"{served}, callers beside a FineTune"
    for name in (*CALLERS, "open"):
        idle, busy = ([r[name] for r in found[when]] for when in ("idle", "busy"))
        shown = f"{100 * OPEN_LOAD:.0f} % of the best" if name == "open" else name
        both = partial(_both, idle, busy)
        if name == "32 callers":
            ratio = median_ratio(busy, idle, _RATE)
            add(group, shown, median(busy, _RATE), "images/s", ratio=ratio, wanted="≥ 0.85", note=both(_RATE))
        ratio = median_ratio(busy, idle, "p99")
        add(group, f"{shown}, p99", median(busy, "p99"), "ms", ratio=ratio, wanted="≤ 2", note=both("p99"))
        add(group, f"{shown}, p50", median(busy, "p50"), "ms", ratio=median_ratio(busy, idle, "p50"), note=both("p50"))
    jobs = found["busy"]
    alone = median(jobs, "features_alone")
    note = f"{alone:.1f} without callers"
    add(group, "features meanwhile", median(jobs, "features_beside"), "images/s", note=note)


def _both(idle: list[dict[str, Any]], busy: list[dict[str, Any]], key: str) -> str:
    each = " ".join(f"{i[key]:.0f}→{b[key]:.0f}" for i, b in zip(idle, busy, strict=True))
    return f"idle {median(idle, key):.1f}; each round {each}"
