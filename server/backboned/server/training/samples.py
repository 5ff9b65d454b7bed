"""An image and its labels, and what a scan of a folder finds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backboned.registry.errors import BackbonedError, invalid
from backboned.server.training.events import SkippedFile

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Names of images end so, in any case."""


@dataclass(frozen=True)
class Sample:
    """An image: its path within the dataset, with `/`, and the indices of its classes (one, unless multi-label)."""

    path: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """What a scan found. `validation` is None where the dataset leaves the split to us."""

    folder: Path
    classes: tuple[str, ...]
    train: Sequence[Sample]
    validation: Sequence[Sample] | None
    skipped: Sequence[SkippedFile]


def not_an_image(name: str) -> str:
    """Why a file of this name is no image; empty if it may be one."""
    suffix = Path(name).suffix
    if suffix.lower() in SUFFIXES:
        return ""
    return f"not an image: its name ends in {suffix!r}" if suffix else "not an image: its name has no ending"


def unusable(folder: Path, reason: str) -> BackbonedError:
    """The error for a dataset that the caller must change."""
    return invalid(f"dataset {str(folder)!r} can't be used: {reason}", field="dataset")
