"""Checkpoints and models: rows and snapshots to messages, and what may be filtered and ordered by."""

from collections.abc import Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics
from backboned.registry.query import Field
from backboned.registry.task import Task
from backboned.server.serving.listing import CheckpointRow, version_rows
from backboned.server.serving.snapshot import KnownModel, State
from backboned.v1 import model_service_pb2 as pb

TASKS = {
    Task.SINGLE_LABEL: pb.TASK_SINGLE_LABEL,
    Task.BINARY: pb.TASK_BINARY,
    Task.MULTI_LABEL: pb.TASK_MULTI_LABEL,
}


def timestamp(unix_seconds: float | None) -> Timestamp | None:
    """A timestamp message; None for what hasn't happened."""
    if unix_seconds is None:
        return None
    message = Timestamp()
    message.FromNanoseconds(round(unix_seconds * 1e9))
    return message


def checkpoint_message(row: CheckpointRow) -> pb.Checkpoint:
    """A row as a message."""
    m: EpochMetrics = row.metrics
    return pb.Checkpoint(
        model=row.model,
        version=row.version,
        epoch=row.epoch,
        uri=row.path.absolute().as_uri(),
        backbone=row.backbone,
        task=TASKS[row.task] if row.task else pb.TASK_UNSPECIFIED,
        classes=row.classes,
        train_loss=m.train_loss,
        train_accuracy=m.train_accuracy,
        val_loss=m.val_loss,
        val_accuracy=m.val_accuracy,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        create_time=timestamp(row.create_time or None),
        best=row.best,
        state=pb.CheckpointState.Value(f"CHECKPOINT_STATE_{row.state.value}"),
        reason=row.reason,
        aliases=row.aliases,
    )


def model_message(
    model: KnownModel, directory: CheckpointDirectory, aliases: Mapping[str, int], traffic: Mapping[str, int]
) -> pb.Model:
    """A model as a message, newest version first."""
    return pb.Model(
        name=model.name,
        serving_version=model.serving,
        versions=[_version(model, v, directory, aliases) for v in sorted(model.versions, reverse=True)],
        aliases=dict(aliases),
        policy=pb.VersionPolicy.Value(f"VERSION_POLICY_{model.policy.kind.value}"),
        policy_version=model.policy.version or 0,
        traffic=dict(traffic),
    )


def _version(
    model: KnownModel, number: int, directory: CheckpointDirectory, aliases: Mapping[str, int]
) -> pb.ModelVersion:
    version = model.versions[number]
    pointing = tuple(sorted(a for a, v in aliases.items() if v == number))
    best = next(row for row in version_rows(version, directory, pointing) if row.best)
    return pb.ModelVersion(
        version=number,
        checkpoint=checkpoint_message(best),
        complete=version.manifest.complete,
        loaded=version.loaded is not None,
        shared_stages=version.loaded.shared if version.loaded else (),
        rejected=model.policy.rejected.get(number, ""),
    )


def checkpoint_fields() -> list[Field[CheckpointRow]]:
    """What checkpoints may be filtered and ordered by."""
    return [
        Field("model", "string", lambda r: r.model),
        Field("version", "number", lambda r: r.version),
        Field("epoch", "number", lambda r: r.epoch),
        Field("uri", "string", lambda r: r.path.absolute().as_uri()),
        Field("backbone", "string", lambda r: r.backbone),
        Field("task", "enum", lambda r: r.task.name if r.task else None, tuple(t.name for t in Task), "TASK_"),
        Field("classes", "strings", lambda r: r.classes),
        Field("train_loss", "number", lambda r: r.metrics.train_loss),
        Field("train_accuracy", "number", lambda r: r.metrics.train_accuracy),
        Field("val_loss", "number", lambda r: r.metrics.val_loss),
        Field("val_accuracy", "number", lambda r: r.metrics.val_accuracy),
        Field("sha256", "string", lambda r: r.sha256),
        Field("size_bytes", "number", lambda r: r.size_bytes),
        Field("create_time", "time", lambda r: datetime.fromtimestamp(r.create_time, UTC) if r.create_time else None),
        Field("best", "boolean", lambda r: r.best),
        Field("state", "enum", lambda r: r.state.value, tuple(s.value for s in State), "CHECKPOINT_STATE_"),
        Field("reason", "string", lambda r: r.reason),
        Field("aliases", "strings", lambda r: r.aliases),
    ]
