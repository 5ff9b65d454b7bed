"""What training needs to know of the daemon it runs in, and what it tells it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from backboned.server.training.events import JobState


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of all jobs. `work_dir` takes what a job needs to go on, a folder a job, deleted when it ends.

    `threads` compute in a trainer. Features are cached in `cache_dir` while they take `cache_bytes` at most; beyond
    that they are computed in each epoch. `compiled_dir` has compiled stages. `remote_data` are schemes, and beginnings
    of URIs, from which data may be fetched; `fetched_dir` keeps that, and archives that had to be unpacked. A job may
    read the uploaded dataset that it is for, which is a folder in `uploads`, and no other one. Checkpoints are signed
    by the key in `signing_key`; with `trusted_keys`, a warm start is from a signed one alone.
    """

    work_dir: Path
    cache_dir: Path
    data_roots: tuple[Path, ...] = ()
    uploads: Path | None = None
    weight_files: Mapping[str, Path] = field(default_factory=dict)
    plugin_modules: tuple[str, ...] = ()
    device: str = "auto"
    precision: str = "auto"
    threads: int = 1
    max_queued_jobs: int = 100
    max_image_pixels: int = 100_000_000
    cache_bytes: int = 16 * 2**30
    compiled_dir: Path | None = None
    remote_data: tuple[str, ...] = ()
    fetched_dir: Path | None = None
    signing_key: Path | None = None
    trusted_keys: tuple[Path, ...] = ()

    def roots_for(self, location: str) -> tuple[Path, ...]:
        """What a job on the dataset at `location` may read: the data roots, and its folder if it was uploaded."""
        uploaded = self.uploads is not None and Path(location).parent == self.uploads
        return (*self.data_roots, Path(location)) if uploaded else self.data_roots


class TrainingTelemetry(Protocol):
    """Where figures go. Called from the event loop's thread."""

    def training_epoch(  # noqa: PLR0917 - the figures of an epoch
        self,
        model: str,
        epoch: int,
        train_loss: float,
        train_accuracy: float,
        val_loss: float,
        val_accuracy: float,
    ) -> None:
        """An epoch ended."""

    def training_jobs(self, counts: Mapping[JobState, int]) -> None:
        """So many jobs are in each state now."""

    def job_duration(self, seconds: float) -> None:
        """A job ended that ran so long."""

    def feature_images(self, source: str, count: int) -> None:
        """Features of `count` more images were had from `source`: `computed` or `cache`."""
