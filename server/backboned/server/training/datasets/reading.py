"""A dataset is read: found, checked, and split into parts, by names and labels alone.

No image is opened here. What can't be decoded is found when features are computed.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from backboned.server.training.datasets.checks import check_classes, check_parts, warnings
from backboned.server.training.datasets.data_roots import MANIFESTS, is_pattern
from backboned.server.training.datasets.dataset import Dataset
from backboned.server.training.datasets.fetching import RemoteFiles
from backboned.server.training.datasets.opening import Access, find_samples
from backboned.server.training.datasets.remote import is_remote, shown
from backboned.server.training.datasets.samples import Found, Sample, unusable
from backboned.server.training.datasets.sources import Source
from backboned.server.training.datasets.split import split
from backboned.server.training.options import TrainingOptions

Parts = tuple[Sequence[Sample], Sequence[Sample], Sequence[Sample]]


def read_dataset(location: str | Path, options: TrainingOptions, access: Access) -> Dataset:
    """The dataset at `location`: a real path below one of the data roots, or a URI that `access` allows.

    Where it doesn't say what validates or tests, images are split by the hash of seed and path: a new one doesn't move
    the others much. What lies elsewhere is fetched first. Raises `BackbonedError`, mostly `INVALID_ARGUMENT`, saying
    what to do.
    """
    location = str(location)
    where = shown(location)
    try:
        source, found = find_samples(location, options.task, access)
        train, validation, test = _parts(where, found, options)
        if isinstance(source, RemoteFiles):
            source.fetch_all([s.path for part in (train, validation, test) for s in part], access.check)
        if access.store is not None:
            access.store.prune()
        return Dataset(
            location=where,
            task=options.task,
            classes=found.classes,
            train=tuple(train),
            validation=tuple(validation),
            test=tuple(test),
            skipped=tuple(found.skipped),
            warnings=(*found.warnings, *warnings(found.classes, train, validation, test)),
            fingerprint=_fingerprint(source, (*train, *validation, *test)),
            source=source,
        )
    except OSError as error:
        raise unusable(where, f"{error.filename} can't be read: {error.strerror}") from error


def check_dataset(location: str, options: TrainingOptions, access: Access) -> None:
    """Look as far as it is quick: at names in folders, manifests and zips, but not into tars or anywhere else.

    Raises `BackbonedError` as `read_dataset` does.
    """
    if is_remote(location) or is_pattern(location):
        return
    path = Path(location)
    if path.is_dir() or path.name.lower().endswith((".zip", *MANIFESTS)):
        read_dataset(location, options, access)


def _parts(where: str, found: Found, options: TrainingOptions) -> Parts:
    """The images that train, validate and test."""
    holds_back = options.test_fraction > 0
    check_classes(where, found, options.task, tests=holds_back)
    train, validation, test = found.train, found.validation, found.test or ()
    if found.test is None and holds_back:
        train, test = split(train, options.test_fraction, options.seed, leave=1 if validation is not None else 2)
    if validation is None:
        train, validation = split(train, options.validation_fraction, options.seed)
    check_parts(where, found.classes, train, validation, options.task)
    return train, validation, test


def _fingerprint(source: Source, samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in sorted(samples, key=lambda s: s.path):
        digest.update(f"{sample.path}\0{source.stamp(sample.path)}\0{sample.labels}\n".encode())
    return digest.hexdigest()
