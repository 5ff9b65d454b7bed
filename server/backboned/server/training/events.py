"""What happens in a job, as plain values: written by the trainer as JSON lines, kept in job rows, sent to watchers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any


class JobState(Enum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether a job in this state has ended."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class ClassCount:
    """A class and its images."""

    label: str
    train_images: int
    validation_images: int
    test_images: int = 0


@dataclass(frozen=True)
class SkippedFile:
    """A file that isn't used: its path within the dataset, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Duplicates:
    """Images, by path, that show the same: of equal bytes if `exact`, else only alike."""

    paths: tuple[str, ...]
    exact: bool
    across_parts: bool
    labels_differ: bool


@dataclass(frozen=True)
class DatasetReport:
    """The dataset was read. At most 1,000 files of each kind are listed; the counts are of all."""

    classes: tuple[ClassCount, ...]
    train_images: int
    validation_images: int
    unreadable: tuple[SkippedFile, ...]
    skipped: tuple[SkippedFile, ...]
    unreadable_count: int
    skipped_count: int
    warnings: tuple[str, ...]
    test_images: int = 0
    duplicates: tuple[Duplicates, ...] = ()
    duplicates_count: int = 0


@dataclass(frozen=True)
class FeatureProgress:
    """How many images, over all views, have gone through the frozen stages or came from the cache.

    `images_per_second` is that of the computed ones, since the beginning.
    """

    done: int
    total: int
    images_per_second: float
    cached: int = 0


@dataclass(frozen=True)
class EpochDone:
    """An epoch's figures: unweighted mean losses an image, accuracies 0…1, the head's learning rate at its end."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    images_per_second: float
    best: bool
    trainable_stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointWritten:
    """A checkpoint file is whole on disk, and in the manifest. `create_time` is in seconds since 1970."""

    epoch: int
    file: str
    sha256: str
    size_bytes: int
    create_time: float
    best: bool


@dataclass(frozen=True)
class ClassJudgement:
    """A class's figures: images that are of it, and precision and recall 0…1."""

    label: str
    images: int
    precision: float
    recall: float


@dataclass(frozen=True)
class Judgement:
    """Figures over some images, after calibration: see the message of this name in the proto."""

    images: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    calibration_error: float
    majority_accuracy: float
    classes: tuple[ClassJudgement, ...]


@dataclass(frozen=True)
class Evaluation:
    """How good the best checkpoint is on the images that validate, and on those that no choice has seen, if any."""

    epoch: int
    validation: Judgement
    test: Judgement | None
    temperature: float
    uncertain_below: float


@dataclass(frozen=True)
class StateChanged:
    """The job is in another state; `error` says why it failed and what to do."""

    state: JobState
    error: str = ""


@dataclass(frozen=True)
class LogLine:
    """Something worth telling."""

    text: str


JobEventPayload = DatasetReport | FeatureProgress | EpochDone | CheckpointWritten | Evaluation | StateChanged | LogLine

_KINDS: Mapping[str, type[JobEventPayload]] = {
    "dataset_report": DatasetReport,
    "feature_progress": FeatureProgress,
    "epoch": EpochDone,
    "checkpoint": CheckpointWritten,
    "evaluation": Evaluation,
    "state": StateChanged,
    "log": LogLine,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_json(payload: JobEventPayload) -> str:
    """One line of JSON. NaN and infinity are not JSON: no event may hold them."""
    values = asdict(payload)
    if isinstance(payload, StateChanged):
        values["state"] = payload.state.value
    return json.dumps({"kind": _NAMES[type(payload)], **values}, ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> JobEventPayload:
    """The inverse of `to_json`. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
    values: dict[str, Any] = json.loads(text)
    kind = _KINDS[values.pop("kind")]
    if kind is StateChanged:
        return StateChanged(JobState(values["state"]), values["error"])
    if kind is DatasetReport:
        values["classes"] = tuple(ClassCount(**c) for c in values["classes"])
        for name in ("unreadable", "skipped"):
            values[name] = tuple(SkippedFile(**s) for s in values[name])
        values["warnings"] = tuple(values["warnings"])
        values["duplicates"] = tuple(Duplicates(**{**d, "paths": tuple(d["paths"])}) for d in values["duplicates"])
    if kind is EpochDone:
        values["trainable_stages"] = tuple(values["trainable_stages"])
    if kind is Evaluation:
        values["validation"] = _judgement(values["validation"])
        values["test"] = None if values["test"] is None else _judgement(values["test"])
    if set(values) != {f.name for f in fields(kind)}:
        raise ValueError(f"not the fields of {kind.__name__}: {sorted(values)}")
    return kind(**values)


def _judgement(values: dict[str, Any]) -> Judgement:
    return Judgement(**{**values, "classes": tuple(ClassJudgement(**c) for c in values["classes"])})
