"""Checkpoints as rows, for listing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import Epoch, EpochMetrics, Manifest
from backboned.registry.task import Task
from backboned.server.serving.snapshot import KnownVersion, RefusedFile, Snapshot, State


@dataclass(frozen=True)
class CheckpointRow:
    """One epoch of one version, or a refused file; see `Checkpoint` in the proto. Times are Unix seconds."""

    model: str
    version: int
    epoch: int
    path: Path
    backbone: str = ""
    task: Task | None = None
    classes: tuple[str, ...] = ()
    metrics: EpochMetrics = field(default_factory=EpochMetrics)
    sha256: str = ""
    size_bytes: int = 0
    create_time: float = 0.0
    best: bool = False
    state: State = State.AVAILABLE
    reason: str = ""
    aliases: tuple[str, ...] = ()


def checkpoint_rows(
    snapshot: Snapshot, directory: CheckpointDirectory, aliases: Mapping[str, Mapping[str, int]], model: str = ""
) -> list[CheckpointRow]:
    """All checkpoints, or those of `model`: newest version and epoch first, refused files before."""
    rows = [_refused(f) for f in snapshot.refused if not model or f.model == model]
    for name, known in snapshot.models.items():
        if not model or name == model:
            for number in sorted(known.versions, reverse=True):
                pointing = tuple(sorted(a for a, v in aliases.get(name, {}).items() if v == number))
                rows.extend(version_rows(known.versions[number], directory, pointing))
    return rows


def version_rows(
    version: KnownVersion, directory: CheckpointDirectory, aliases: tuple[str, ...] = ()
) -> Iterator[CheckpointRow]:
    """The epochs of a version, newest first."""
    serving = version.loaded.manifest.best_epoch if version.loaded else None
    for epoch in sorted(version.manifest.epochs, key=lambda e: -e.epoch):
        best = epoch.epoch == version.manifest.best_epoch
        state, reason = State.AVAILABLE, ""
        if best:
            state, reason = version.state, version.reason
        elif epoch.epoch == serving:
            state = State.SERVING
        yield epoch_row(version.manifest, epoch, directory, state=state, reason=reason, aliases=aliases if best else ())


def epoch_row(
    manifest: Manifest,
    epoch: Epoch,
    directory: CheckpointDirectory,
    *,
    state: State,
    reason: str = "",
    aliases: tuple[str, ...] = (),
) -> CheckpointRow:
    """One epoch of a version."""
    return CheckpointRow(
        model=manifest.model,
        version=manifest.version,
        epoch=epoch.epoch,
        path=directory.version(manifest.model, manifest.version) / epoch.file,
        backbone=manifest.backbone,
        task=manifest.task,
        classes=manifest.classes,
        metrics=epoch.metrics,
        sha256=epoch.sha256,
        size_bytes=epoch.size_bytes,
        create_time=epoch.create_time,
        best=epoch.epoch == manifest.best_epoch,
        state=state,
        reason=reason,
        aliases=aliases,
    )


def _refused(file: RefusedFile) -> CheckpointRow:
    return CheckpointRow(
        model=file.model,
        version=0,
        epoch=0,
        path=file.path,
        size_bytes=file.size_bytes,
        create_time=file.create_time,
        state=file.state,
        reason=file.reason,
    )
