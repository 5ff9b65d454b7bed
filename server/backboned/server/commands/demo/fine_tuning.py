"""The demo's own side of transfer learning: FineTune and Predict over gRPC, as any client would call them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backboned.client import Client, ClientError
from backboned.registry import BackbonedError, ErrorKind
from backboned.server.commands.demo.plain_training import Budget, Curve
from backboned.server.commands.jobs import took_seconds
from backboned.v1 import model_service_pb2 as pb

MODEL = "digits-5-to-9"
LEARNING_RATE = 0.01
IMAGES_A_CALL = 32
SERVING_SECONDS = 60.0


@dataclass(frozen=True)
class FineTuned:
    """A version that serves: how its training went, and how long its whole job took, its process's start included."""

    version: int
    curve: Curve
    job_seconds: float


def fine_tune(
    client: Client,
    labelled: Path,
    held_out: Sequence[Path],
    budget: Budget,
    *,
    seed: int,
    say: Callable[[str], None],
) -> FineTuned:
    """Train a head over gRPC, tell `say` of each epoch and what serves meanwhile, and ask it of the held-out images."""
    job = client.fine_tune(
        MODEL,
        "digits",
        labelled,
        max_epochs=budget.epochs,
        batch_size=budget.batch_size,
        learning_rate=LEARNING_RATE,
        patience=0,
        seed=seed,
    )
    epochs: list[pb.EpochMetrics] = []
    feature_seconds = 0.0
    in_memory = 0
    for event in client.watch(job.id):
        kind = event.WhichOneof("event")
        if kind == "feature_progress" and event.feature_progress.images_per_second > 0:
            progress = event.feature_progress
            feature_seconds = (progress.done - progress.cached) / progress.images_per_second
        elif kind == "epoch":
            epochs.append(event.epoch)
            say(f"epoch {event.epoch.epoch:>2}/{budget.epochs}  validation accuracy {event.epoch.val_accuracy:.3f}")
        elif kind == "checkpoint":
            in_memory = _tell_loaded(client, job.version, in_memory, say)
        elif kind == "log":
            say(event.log)
    job = client.get_job(job.id)
    if job.state != pb.JOB_STATE_SUCCEEDED:
        raise BackbonedError(ErrorKind.INTERNAL, f"the job ended as {pb.JobState.Name(job.state)}: {job.error}")
    _wait_until_serving(client, job.version)
    _tell_loaded(client, job.version, in_memory, say)
    train_seconds = sum(job_epoch_seconds(epoch, _train_images(labelled)) for epoch in epochs)
    curve = Curve(
        [epoch.val_loss for epoch in epochs],
        [epoch.val_accuracy for epoch in epochs],
        feature_seconds + train_seconds,
        _accuracy(client, held_out, job.version),
    )
    return FineTuned(job.version, curve, took_seconds(job))


def job_epoch_seconds(epoch: pb.EpochMetrics, train_images: int) -> float:
    """How long an epoch computed."""
    return train_images / epoch.images_per_second if epoch.images_per_second > 0 else 0.0


def _train_images(labelled: Path) -> int:
    return sum(1 for _ in labelled.glob("train/*/*.png"))


def _tell_loaded(client: Client, version: int, known: int, say: Callable[[str], None]) -> int:
    """Tell which epoch of `version` the watcher has loaded by now, if it isn't the one that is `known`; return it."""
    try:
        versions = client.get_model(MODEL).versions
    except ClientError:  # the model isn't known before its first checkpoint was seen
        return known
    epoch = next((v.checkpoint.epoch for v in versions if v.loaded and v.version == version), known)
    if epoch != known:
        say(f"  hot-loaded: version {version} answers with what epoch {epoch} left")
    return epoch


def _wait_until_serving(client: Client, version: int) -> None:
    deadline = time.monotonic() + SERVING_SECONDS
    while client.get_model(MODEL).serving_version != version:
        if time.monotonic() > deadline:
            raise BackbonedError(
                ErrorKind.INTERNAL, f"version {version} of {MODEL} doesn't serve after {SERVING_SECONDS:.0f} s"
            )
        time.sleep(0.05)


def _accuracy(client: Client, files: Sequence[Path], version: int) -> float:
    """Over gRPC, with the true labels sent along: the daemon counts its serving loss from them."""
    labels = [file.parent.name for file in files]
    replies = client.predict_stream(MODEL, files, version=version, top_k=1, labels=labels, batch_size=IMAGES_A_CALL)
    answers = [prediction.classes[0].label for reply in replies for prediction in reply.predictions]
    return sum(a == b for a, b in zip(answers, labels, strict=True)) / len(files)
