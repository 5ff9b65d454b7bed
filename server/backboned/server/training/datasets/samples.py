"""An image and its labels, and what a scan of a dataset finds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from backboned.registry.errors import BackbonedError, invalid
from backboned.server.training.events import SkippedFile

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Names of images end so, in any case."""

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What the parts of a dataset may be called."""


@dataclass(frozen=True)
class Sample:
    """An image: its path within the dataset, with `/`, and the indices of its classes (one, unless multi-label)."""

    path: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """What a scan found. `validation` and `test` are None where the dataset leaves that part to us.

    `kind` is what a class is there, for errors: a folder or a label.
    """

    classes: tuple[str, ...]
    train: Sequence[Sample]
    validation: Sequence[Sample] | None
    test: Sequence[Sample] | None
    skipped: Sequence[SkippedFile]
    warnings: tuple[str, ...] = ()
    kind: str = "label"


def not_an_image(name: str) -> str:
    """Why a file of this name is no image; empty if it may be one."""
    suffix = PurePosixPath(name).suffix
    if suffix.lower() in SUFFIXES:
        return ""
    return f"not an image: its name ends in {suffix!r}" if suffix else "not an image: its name has no ending"


def unusable(where: str | Path, reason: str) -> BackbonedError:
    """The error for a dataset that the caller must change."""
    return invalid(f"dataset {str(where)!r} can't be used: {reason}", field="dataset")
