"""A dataset: images with labels, those that train and those that validate, found by names alone.

The scan opens no image, so that it is quick enough for the call that starts a job. What can't be decoded is found when
features are computed.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backboned.registry.task import Task
from backboned.server.training.events import ClassCount, DatasetReport, SkippedFile
from backboned.server.training.folders import scan_folders
from backboned.server.training.labels import read_labels
from backboned.server.training.options import TrainingOptions
from backboned.server.training.samples import Found, Sample, unusable
from backboned.server.training.split import split

FEW_IMAGES = 5
STRONG_IMBALANCE = 10
_LISTED = 1000


@dataclass(frozen=True)
class Dataset:
    """What a folder holds. `classes` are in the order of the logits; for a binary task negative, then positive.

    `fingerprint` is the SHA-256, in hex, over the paths, sizes and modification times of its images and its labels.
    """

    root: Path
    task: Task
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    skipped: tuple[SkippedFile, ...]
    warnings: tuple[str, ...]
    fingerprint: str

    def paths(self, samples: Sequence[Sample]) -> list[Path]:
        """Where the images are."""
        return [self.root / s.path for s in samples]

    def targets(self, samples: Sequence[Sample]) -> Tensor:
        """`[n]` int64 class indices; for a multi-label task `[n, classes]` float32 of 0 and 1."""
        if self.task is not Task.MULTI_LABEL:
            return torch.tensor([s.labels[0] for s in samples])
        target = torch.zeros(len(samples), len(self.classes))
        for row, sample in enumerate(samples):
            target[row, list(sample.labels)] = 1
        return target

    def report(self, unreadable: Sequence[SkippedFile] = ()) -> DatasetReport:
        """What it holds, for people. `unreadable` are images left out since."""
        train, validation = _counts(self.train), _counts(self.validation)
        return DatasetReport(
            classes=tuple(ClassCount(name, train[i], validation[i]) for i, name in enumerate(self.classes)),
            train_images=len(self.train),
            validation_images=len(self.validation),
            unreadable=tuple(unreadable[:_LISTED]),
            skipped=self.skipped[:_LISTED],
            unreadable_count=len(unreadable),
            skipped_count=len(self.skipped),
            warnings=self.warnings,
        )


def read_dataset(folder: Path, options: TrainingOptions, roots: Sequence[Path]) -> Dataset:
    """The dataset in `folder`, a real path below one of the `roots`; links that lead out of these are skipped.

    A folder a class, or `train/` and `val/` with a folder a class each; for a multi-label task `labels.csv`. Without a
    `val/` the images are split by the hash of seed and path: a new image doesn't move the others much. Raises
    `BackbonedError` `INVALID_ARGUMENT` saying what to do.
    """
    try:
        multi = options.task is Task.MULTI_LABEL
        found = read_labels(folder, roots) if multi else scan_folders(folder, roots)
        _check_classes(found, options.task)
        train, validation = found.train, found.validation
        if validation is None:
            train, validation = split(train, options.validation_fraction, options.seed)
        _check_parts(found, train, validation, options.task)
        return Dataset(
            root=folder,
            task=options.task,
            classes=found.classes,
            train=tuple(train),
            validation=tuple(validation),
            skipped=tuple(found.skipped),
            warnings=tuple(_warnings(found.classes, train, validation)),
            fingerprint=_fingerprint(folder, (*train, *validation)),
        )
    except OSError as error:
        raise unusable(folder, f"{error.filename} can't be read: {error.strerror}") from error


def _check_classes(found: Found, task: Task) -> None:
    names = ", ".join(found.classes[:8]) + (", …" if len(found.classes) > 8 else "")
    if task is Task.BINARY and len(found.classes) != 2:
        raise unusable(
            found.folder, f"a binary task needs exactly two class folders, negative and positive, and it has "
            f"{len(found.classes)} ({names})"
        )  # fmt: skip
    if task is Task.SINGLE_LABEL and len(found.classes) == 1:
        raise unusable(found.folder, f"it has one class only ({names}): add a folder of images that are something else")
    if found.validation is None and task is not Task.MULTI_LABEL:
        counts = _counts(found.train)
        lonely = [name for i, name in enumerate(found.classes) if counts[i] == 1]
        if lonely:
            raise unusable(
                found.folder, f"class {lonely[0]!r} has 1 image, and one must train and another validate: add more"
            )


def _check_parts(found: Found, train: Sequence[Sample], validation: Sequence[Sample], task: Task) -> None:
    if not train or not validation:
        part = "validation" if train else "training"
        raise unusable(found.folder, f"it has no {part} images: at least two images are needed, one for each")
    if task is Task.MULTI_LABEL:
        counts = _counts(train)
        for i, name in enumerate(found.classes):
            if not counts[i]:
                raise unusable(found.folder, f"no training image has the label {name!r}: add one, or remove the label")


def _warnings(classes: Sequence[str], train: Sequence[Sample], validation: Sequence[Sample]) -> list[str]:
    counts, validating = _counts(train), _counts(validation)
    by_count = sorted(range(len(classes)), key=lambda i: counts[i])
    fewest, most = by_count[0], by_count[-1]
    warnings = []
    if counts[most] > STRONG_IMBALANCE * counts[fewest]:
        warnings.append(
            f"strong imbalance: {counts[most]} training images of {classes[most]!r}, {counts[fewest]} of "
            f"{classes[fewest]!r}; the loss is weighted for it"
        )
    few = [f"{classes[i]!r} ({counts[i]})" for i in by_count if counts[i] < FEW_IMAGES]
    if few:
        warnings.append(f"fewer than {FEW_IMAGES} training images of {_listed(few)}")
    unseen = [repr(name) for i, name in enumerate(classes) if not validating[i]]
    if unseen:
        warnings.append(f"no validation images of {_listed(unseen)}")
    folded = Counter(name.casefold() for name in classes)
    twins = [repr(name) for name in classes if folded[name.casefold()] > 1]
    if twins:
        warnings.append(f"classes that differ by case only: {_listed(twins)}")
    return warnings


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more classes" if len(items) > 5 else "")


def _counts(samples: Sequence[Sample]) -> Counter[int]:
    return Counter(label for s in samples for label in s.labels)


def _fingerprint(folder: Path, samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in sorted(samples, key=lambda s: s.path):
        stat = (folder / sample.path).stat()
        digest.update(f"{sample.path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{sample.labels}\n".encode())
    return digest.hexdigest()
