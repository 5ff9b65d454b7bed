"""A dataset: images with labels, those that train, those that validate and those that test."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backboned.registry.task import Task
from backboned.server.training.datasets.checks import count_labels
from backboned.server.training.datasets.findings import Findings
from backboned.server.training.datasets.samples import Sample
from backboned.server.training.datasets.sources import Source
from backboned.server.training.events import ClassCount, DatasetReport, SkippedFile

_LISTED = 1000


@dataclass(frozen=True)
class Dataset:
    """Images by part. `classes` are in the order of the logits; for a binary task negative, then positive.

    `location` is a path or a URI, as it may be told; `test` is held back from every choice, and may be empty.
    `fingerprint` is the SHA-256, in hex, over the paths, sizes and modification times (or what else marks a change) of
    its images, and its labels. Safe to use from several threads.
    """

    location: str
    task: Task
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    skipped: tuple[SkippedFile, ...]
    warnings: tuple[str, ...]
    fingerprint: str
    source: Source = field(compare=False, repr=False)

    def read(self, sample: Sample) -> bytes:
        """The bytes of an image file. Raises `OSError`, or `BackbonedError` for what can't be had from an archive."""
        return self.source.read(sample.path)

    def targets(self, samples: Sequence[Sample]) -> Tensor:
        """`[n]` int64 class indices; for a multi-label task `[n, classes]` float32 of 0 and 1."""
        if self.task is not Task.MULTI_LABEL:
            return torch.tensor([s.labels[0] for s in samples], dtype=torch.int64)
        target = torch.zeros(len(samples), len(self.classes))
        for row, sample in enumerate(samples):
            target[row, list(sample.labels)] = 1
        return target

    def report(self, unreadable: Sequence[SkippedFile] = (), findings: Findings | None = None) -> DatasetReport:
        """What it holds, for people. `unreadable` are images left out since, `findings` what was seen in the others."""
        findings = findings or Findings()
        train, validation, test = (count_labels(part) for part in (self.train, self.validation, self.test))
        return DatasetReport(
            classes=tuple(ClassCount(name, train[i], validation[i], test[i]) for i, name in enumerate(self.classes)),
            train_images=len(self.train),
            validation_images=len(self.validation),
            test_images=len(self.test),
            unreadable=tuple(unreadable[:_LISTED]),
            skipped=self.skipped[:_LISTED],
            unreadable_count=len(unreadable),
            skipped_count=len(self.skipped),
            warnings=(*self.warnings, *findings.warnings),
            duplicates=findings.duplicates[:_LISTED],
            duplicates_count=len(findings.duplicates),
        )
