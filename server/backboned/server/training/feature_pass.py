"""The first part of a job: every image through the frozen stages, and what can't be read left out."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.training.datasets import Dataset, Sample
from backboned.server.training.events import FeatureProgress, SkippedFile
from backboned.server.training.features import Features, Frozen, Images, MappedFeatures
from backboned.server.training.loop import Split
from backboned.server.training.options import TrainingOptions

_SECONDS_BETWEEN_REPORTS = 1.0


class FeaturePass:
    """Computes the features of a dataset. For one thread, and for one dataset."""

    def __init__(
        self,
        frozen: Frozen,
        options: TrainingOptions,
        *,
        folder: Path,
        budget_bytes: int,
        workers: int,
        max_image_pixels: int,
    ) -> None:
        """`folder` takes the files; activations are kept while they take `budget_bytes`, and half the disk, at most."""
        self._frozen = frozen
        self._options = options
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._workers = workers
        self._max_pixels = max_image_pixels

    def run(
        self, dataset: Dataset, report: Callable[[FeatureProgress], None], check: Callable[[], None]
    ) -> tuple[Split, Split, list[SkippedFile]]:
        """The features of the images that train and of those that validate, and what can't be read.

        `report` is called about once a second, `check` after every few images; what it raises ends the pass.
        """
        views = self._options.views
        progress = _Progress(len(dataset.train) * views + len(dataset.validation), report, check)
        train, first = self._part(dataset, dataset.train, views, "train", progress)
        validation, second = self._part(dataset, dataset.validation, 1, "validation", progress)
        return train, validation, [*first, *second]

    def _part(
        self, dataset: Dataset, samples: Sequence[Sample], views: int, name: str, progress: "_Progress"
    ) -> tuple[Split, list[SkippedFile]]:
        features: Features = MappedFeatures(
            Images(dataset, samples, views, self._frozen.preprocessing, self._options.seed, self._max_pixels),
            self._frozen,
            self._folder / name,
            budget_bytes=min(self._budget_bytes, shutil.disk_usage(self._folder).free // 2),
            workers=self._workers,
        )
        reasons = features.prepare(progress.done)
        kept = torch.tensor([i for i in range(len(samples)) if i not in reasons], dtype=torch.int64)
        targets = dataset.targets(samples)[kept].to(self._frozen.device.device)
        unreadable = [SkippedFile(samples[i].path, reasons[i]) for i in sorted(reasons)]
        return Split(features, kept, targets, views), unreadable


def without(dataset: Dataset, unreadable: Sequence[SkippedFile]) -> Dataset:
    """`dataset` without what can't be read."""
    lost = {file.path for file in unreadable}
    train, validation = (tuple(s for s in part if s.path not in lost) for part in (dataset.train, dataset.validation))
    return replace(dataset, train=train, validation=validation)


def check_whole(dataset: Dataset, unreadable: Sequence[SkippedFile]) -> None:
    """Raise `BackbonedError` `INVALID_ARGUMENT` if a class has no training image left, or nothing validates."""
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
    def __init__(self, total: int, report: Callable[[FeatureProgress], None], check: Callable[[], None]) -> None:
        self._total = total
        self._report = report
        self._check = check
        self._done = 0
        self._start = self._reported = time.monotonic()

    def done(self, rows: int) -> None:
        self._check()
        self._done += rows
        now = time.monotonic()
        if self._done == self._total or now - self._reported >= _SECONDS_BETWEEN_REPORTS:
            self._reported = now
            self._report(FeatureProgress(self._done, self._total, self._done / max(now - self._start, 1e-9)))
