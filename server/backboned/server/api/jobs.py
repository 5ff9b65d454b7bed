"""Jobs: requests to options, jobs and events to messages."""

from collections.abc import Callable
from datetime import UTC, datetime

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, invalid
from backboned.registry.manifest import Manifest
from backboned.registry.query import Field
from backboned.registry.task import Task
from backboned.server.api.checkpoints import TASKS, checkpoint_message, timestamp
from backboned.server.serving.listing import epoch_row
from backboned.server.serving.snapshot import Snapshot, State
from backboned.server.training import events
from backboned.server.training.jobs import Job, JobEvent, JobRequest
from backboned.server.training.options import TrainingOptions
from backboned.v1 import model_service_pb2 as pb

_PLAIN_OPTIONS = (
    "max_epochs",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "patience",
    "validation_fraction",
    "seed",
    "views",
    "warm_start_version",
    "test_fraction",
    "label_smoothing",
    "ema_decay",
    "max_gradient_norm",
)
MAX_REQUEST_ID_LENGTH = 128


def to_options(message: pb.TrainingOptions) -> TrainingOptions:
    """The options that are set, and defaults for the rest; ranges are checked later, against the backbone."""
    tasks: dict[int, Task] = {pb.TASK_UNSPECIFIED: Task.SINGLE_LABEL}
    tasks.update((value, task) for task, value in TASKS.items())
    if message.task not in tasks:
        raise invalid(f"options.task is {message.task}, which is no Task", field="options.task")
    given = {name: getattr(message, name) for name in _PLAIN_OPTIONS if message.HasField(name)}  # type: ignore[arg-type]
    return TrainingOptions(task=tasks[message.task], trainable_stages=tuple(message.trainable_stages), **given)


def job_message(job: Job, snapshot: Snapshot, directory: CheckpointDirectory) -> pb.Job:
    """A job as a message, with its best checkpoint if there is one yet."""
    return pb.Job(
        id=job.id,
        model=job.model,
        version=job.version,
        state=_state(job.state),
        error=job.error,
        create_time=timestamp(job.create_time),
        start_time=timestamp(job.start_time),
        end_time=timestamp(job.end_time),
        best=_best(job, snapshot, directory),
        request=_request(job.request),
    )


def event_message(event: JobEvent, job: Job, directory: CheckpointDirectory) -> pb.JobEvent:
    """An event as a message."""
    message = pb.JobEvent(sequence=event.sequence, time=timestamp(event.time))
    match event.payload:
        case events.StateChanged(state):
            message.state = _state(state)
        case events.DatasetReport() as report:
            message.dataset_report.CopyFrom(_report(report))
        case events.FeatureProgress() as progress:
            message.feature_progress.CopyFrom(pb.FeatureProgress(**vars(progress)))
        case events.EpochDone() as epoch:
            message.epoch.CopyFrom(pb.EpochMetrics(**vars(epoch)))
        case events.CheckpointWritten() as written:
            message.checkpoint.CopyFrom(_written(written, job, directory))
        case events.Evaluation() as evaluation:
            message.evaluation.CopyFrom(_evaluation(evaluation))
        case events.LogLine(text):
            message.log = text
    return message


def job_fields() -> list[Field[Job]]:
    """What jobs may be filtered by."""
    return [
        Field("id", "string", lambda j: j.id),
        Field("model", "string", lambda j: j.model),
        Field("version", "number", lambda j: j.version),
        Field("state", "enum", lambda j: j.state.name, tuple(s.name for s in events.JobState), "JOB_STATE_"),
        Field("create_time", "time", _time(lambda j: j.create_time)),
        Field("end_time", "time", _time(lambda j: j.end_time)),
    ]


def _time(get: Callable[[Job], float | None]) -> Callable[[Job], datetime | None]:
    def read(job: Job) -> datetime | None:
        seconds = get(job)
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

    return read


def _state(state: events.JobState) -> "pb.JobState.ValueType":
    return pb.JobState.Value(f"JOB_STATE_{state.name}")


def _request(request: JobRequest) -> pb.FineTuneRequest:
    options = request.options
    message = pb.TrainingOptions(task=TASKS[options.task], trainable_stages=options.trainable_stages)
    for name in _PLAIN_OPTIONS:
        if (value := getattr(options, name)) is not None:
            setattr(message, name, value)
    return pb.FineTuneRequest(
        model=request.model,
        backbone=request.backbone,
        dataset=request.dataset,
        request_id=request.request_id,
        options=message,
    )


def _best(job: Job, snapshot: Snapshot, directory: CheckpointDirectory) -> pb.Checkpoint | None:
    model = snapshot.models.get(job.model)
    known = model.versions.get(job.version) if model else None
    if known is not None:
        return checkpoint_message(
            epoch_row(known.manifest, known.manifest.best, directory, state=known.state, reason=known.reason)
        )
    try:
        manifest = Manifest.read(directory.version(job.model, job.version))
    except BackbonedError:
        return None
    return checkpoint_message(epoch_row(manifest, manifest.best, directory, state=State.AVAILABLE))


def _report(report: events.DatasetReport) -> pb.DatasetReport:
    return pb.DatasetReport(
        classes=[pb.ClassCount(**vars(c)) for c in report.classes],
        train_images=report.train_images,
        validation_images=report.validation_images,
        unreadable=[pb.SkippedFile(**vars(f)) for f in report.unreadable],
        skipped=[pb.SkippedFile(**vars(f)) for f in report.skipped],
        unreadable_count=report.unreadable_count,
        skipped_count=report.skipped_count,
        warnings=report.warnings,
        test_images=report.test_images,
        duplicates=[pb.Duplicates(**vars(d)) for d in report.duplicates],
        duplicates_count=report.duplicates_count,
    )


def _evaluation(evaluation: events.Evaluation) -> pb.Evaluation:
    return pb.Evaluation(
        validation=_judgement(evaluation.validation),
        test=None if evaluation.test is None else _judgement(evaluation.test),
        temperature=evaluation.temperature,
        uncertain_below=evaluation.uncertain_below,
        epoch=evaluation.epoch,
    )


def _judgement(judgement: events.Judgement) -> pb.Judgement:
    classes = [pb.ClassJudgement(**vars(c)) for c in judgement.classes]
    return pb.Judgement(**{**vars(judgement), "classes": classes})


def _written(written: events.CheckpointWritten, job: Job, directory: CheckpointDirectory) -> pb.Checkpoint:
    path = directory.version(job.model, job.version) / written.file
    return pb.Checkpoint(
        model=job.model,
        version=job.version,
        epoch=written.epoch,
        uri=path.absolute().as_uri(),
        backbone=job.request.backbone,
        task=TASKS[job.request.options.task],
        sha256=written.sha256,
        size_bytes=written.size_bytes,
        create_time=timestamp(written.create_time),
        best=written.best,
        state=pb.CHECKPOINT_STATE_AVAILABLE,
    )
