"""The first part of a job: the features of every image, and what can't be read left out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.training.datasets import Dataset, Findings, Inspector, Sample
from backboned.server.training.events import FeatureProgress, SkippedFile
from backboned.server.training.feature_cache import FeatureCache
from backboned.server.training.features import Features, Images, Prepared
from backboned.server.training.frozen_stages import Frozen
from backboned.server.training.splits import Split

_SECONDS_BETWEEN_REPORTS = 1.0


@dataclass(frozen=True)
class Parts:
    """A dataset without what can't be read, the features of its parts, and what was seen on the way.

    `test` is None where nothing is held back. `cached` tells whether all features lie in the cache.
    """

    dataset: Dataset
    train: Split
    validation: Split
    test: Split | None
    unreadable: tuple[SkippedFile, ...]
    findings: Findings
    cached: bool


class FeaturePass:
    """Computes the features of a dataset. For one thread, and for one dataset."""

    def __init__(self, frozen: Frozen, cache: FeatureCache, *, views: int, workers: int, max_image_pixels: int) -> None:
        """`views` are taken of the images that train."""
        self._frozen = frozen
        self._cache = cache
        self._views = views
        self._workers = workers
        self._max_pixels = max_image_pixels

    def run(self, dataset: Dataset, report: Callable[[FeatureProgress], None], check: Callable[[], None]) -> Parts:
        """The features of all images of all parts.

        `report` is called about once a second, `check` after every few images; what it raises ends the pass. Raises
        `BackbonedError` `INVALID_ARGUMENT` if a class has no training image left, or nothing validates.
        """
        progress = _Progress(
            len(dataset.train) * self._views + len(dataset.validation) + len(dataset.test), report, check
        )
        inspector = Inspector(dataset, crop_size=self._frozen.preprocessing.crop_size)
        unreadable: list[SkippedFile] = []

        def part(samples: Sequence[Sample], views: int) -> tuple[Split, bool]:
            images = Images(
                lambda index: dataset.read(samples[index]),
                len(samples),
                views,
                self._frozen.preprocessing,
                self._max_pixels,
            )
            features = Features(images, self._frozen, self._cache, workers=self._workers)
            done = features.prepare(progress.within_part)
            progress.part_done(done, len(samples) * views)
            unreadable.extend(SkippedFile(samples[i].path, done.unreadable[i]) for i in sorted(done.unreadable))
            for index, record in done.records.items():
                inspector.add(samples[index], record)
            kept = torch.tensor([i for i in range(len(samples)) if i not in done.unreadable], dtype=torch.int64)
            targets = dataset.targets(samples)[kept].to(self._frozen.device.device)
            return Split(features, kept, targets, views), features.cached

        train, first = part(dataset.train, self._views)
        validation, second = part(dataset.validation, 1)
        test, third = part(dataset.test, 1) if dataset.test else (None, True)
        rest = _without(dataset, unreadable)
        _check_whole(rest, unreadable)
        return Parts(
            rest,
            train,
            validation,
            test if test is not None and len(test) else None,
            tuple(unreadable),
            inspector.findings(),
            first and second and third,
        )


def _without(dataset: Dataset, unreadable: Sequence[SkippedFile]) -> Dataset:
    lost = {file.path for file in unreadable}
    train, validation, test = (
        tuple(s for s in part if s.path not in lost) for part in (dataset.train, dataset.validation, dataset.test)
    )
    return replace(dataset, train=train, validation=validation, test=test)


def _check_whole(dataset: Dataset, unreadable: Sequence[SkippedFile]) -> None:
    left = {label for s in dataset.train for label in s.labels}
    gone = [name for i, name in enumerate(dataset.classes) if i not in left]
    if dataset.validation and not gone:
        return
    what = f"training image of class {gone[0]!r}" if gone else "validation image"
    example = f"{unreadable[0].path}: {unreadable[0].reason}"
    raise BackbonedError(
        ErrorKind.INVALID_ARGUMENT, f"no {what} can be read ({example}); mend or add some", field="dataset"
    )


class _Progress:
    """Tells how far the pass is, over all parts."""

    def __init__(self, total: int, report: Callable[[FeatureProgress], None], check: Callable[[], None]) -> None:
        self._total = total
        self._report = report
        self._check = check
        self._rows = self._cached = self._computed = 0
        self._reported = time.monotonic()
        self._begun: float | None = None

    def within_part(self, done: Prepared) -> None:
        """So far in the part under way."""
        self._check()
        now = time.monotonic()
        if done.computed and self._begun is None:
            self._begun = self._reported
        if now - self._reported >= _SECONDS_BETWEEN_REPORTS:
            self._tell(self._rows + done.cached + done.computed, done, now)

    def part_done(self, done: Prepared, rows: int) -> None:
        """A part is done: so many rows of it, whatever became of them."""
        self._rows += rows
        self._tell(self._rows, done, time.monotonic())
        self._cached += done.cached
        self._computed += done.computed

    def _tell(self, rows: int, done: Prepared, now: float) -> None:
        self._reported = now
        seconds = 0.0 if self._begun is None else now - self._begun
        speed = (self._computed + done.computed) / seconds if seconds > 0 else 0.0
        self._report(FeatureProgress(rows, self._total, speed, self._cached + done.cached))
