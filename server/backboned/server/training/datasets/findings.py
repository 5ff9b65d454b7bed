"""What was seen in images, for the report."""

from dataclasses import dataclass

from backboned.server.training.events import Duplicates


@dataclass(frozen=True)
class Findings:
    """Groups of images that show the same, those across parts first, and warnings in words."""

    duplicates: tuple[Duplicates, ...] = ()
    warnings: tuple[str, ...] = ()
