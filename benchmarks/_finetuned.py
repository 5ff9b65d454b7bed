"""A FineTune as its caller sees it: from the call to the first prediction of the new version."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backboned.client import Client, TrainingOptions
from backboned.v1 import model_service_pb2 as pb
from benchmarks._albums import labelled

_PATIENCE_SECONDS = 60.0
_AT_ONCE = 32


@dataclass
class FineTuned:
    """What a job took, in seconds since the call; accuracies are 0…1. `judged` is of predictions over gRPC."""

    version: int = 0
    computed: int = 0
    cached: int = 0
    features_seconds: float = 0.0
    succeeded_seconds: float = 0.0
    seconds: float = 0.0
    val_accuracy: float = 0.0
    judged: float | None = None
    epochs: list[dict[str, float]] = field(default_factory=list)

    def note(self, event: pb.JobEvent, seconds: float) -> None:
        """Something happened `seconds` after the call."""
        kind = event.WhichOneof("event")
        if kind == "feature_progress":
            done = event.feature_progress
            self.cached = int(done.cached)
            self.computed, self.features_seconds = int(done.done) - self.cached, seconds
        elif kind == "epoch":
            told = event.epoch
            self.epochs.append({"epoch": told.epoch, "seconds": seconds, "val_accuracy": told.val_accuracy})
        elif event.state == pb.JOB_STATE_SUCCEEDED:
            self.succeeded_seconds = seconds


def fine_tuned(
    client: Client, model: str, backbone: str, dataset: Path, judge: Path | None = None, **options: Any
) -> FineTuned:
    """Fine-tune `model` and ask the new version about a photo. Raises `SystemExit` if the job fails.

    `judge` is a folder of photos by class, on which the new version is judged afterwards, outside the time.
    """
    photo = labelled(dataset / "val")[0][1].read_bytes()
    told, start = FineTuned(), time.monotonic()
    asked: TrainingOptions = options  # type: ignore[assignment]  # whatever the caller names
    job = client.fine_tune(model, backbone, dataset, **asked)
    for event in client.watch(job.id):
        told.note(event, time.monotonic() - start)
    if not told.succeeded_seconds:
        raise SystemExit(f"FineTune of {backbone} on {dataset} failed: {client.get_job(job.id).error}")
    while client.predict(model, [photo], top_k=1).version != job.version:
        if time.monotonic() > start + told.succeeded_seconds + _PATIENCE_SECONDS:
            raise SystemExit(f"version {job.version} of {model} isn't served a minute after it succeeded")
    told.seconds = time.monotonic() - start
    told.version = job.version
    told.val_accuracy = client.get_job(job.id).best.val_accuracy
    if judge is not None:
        told.judged = accuracy(client, model, judge)
    return told


def accuracy(client: Client, model: str, folder: Path) -> float:
    """How many of the photos in `folder`, by class, the served version of a model gets right."""
    photos = labelled(folder)
    right = 0
    for i in range(0, len(photos), _AT_ONCE):
        some = photos[i : i + _AT_ONCE]
        answered = client.predict(model, [path for _, path in some], top_k=1).predictions
        right += sum(a.classes[0].label == label for a, (label, _) in zip(answered, some, strict=True))
    return right / len(photos)
