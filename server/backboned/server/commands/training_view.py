"""How a job is shown while it runs: what the dataset holds, a bar for features, a bar and a line for each epoch."""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from backboned.server.commands.output import console, label, print_json, table
from backboned.v1 import model_service_pb2 as pb

DEFAULT_EPOCHS = 20
SHOWN_CLASSES = 20
SHOWN_FILES = 5


class TrainingView:
    """Shows the events of one job: lines on stdout and, in a terminal, bars below them."""

    def __init__(self, job: pb.Job) -> None:
        self._console = console()
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        options = job.request.options
        self._max_epochs = options.max_epochs if options.HasField("max_epochs") else DEFAULT_EPOCHS
        self._features: TaskID | None = None
        self._epochs: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, event: pb.JobEvent) -> None:
        """Show one event."""
        match event.WhichOneof("event"):
            case "state":
                self._say(label(pb.JobState.Name(event.state), "JOB_STATE_"), style="dim")
            case "dataset_report":
                self._show_report(event.dataset_report)
            case "feature_progress":
                self._show_features(event.feature_progress)
            case "epoch":
                self._show_epoch(event.epoch)
            case "evaluation":
                self._show_evaluation(event.evaluation)
            case "log":
                self._say(event.log, style="yellow")
            case _:  # a checkpoint follows from its epoch
                pass

    def _say(self, text: str, *, style: str = "") -> None:
        self._progress.console.print(text, style=style)

    def _show_report(self, report: pb.DatasetReport) -> None:
        rows = [[c.label, str(c.train_images), str(c.validation_images)] for c in report.classes[:SHOWN_CLASSES]]
        if (more := len(report.classes) - SHOWN_CLASSES) > 0:
            rows.append([f"… {more} more", "", ""])
        rows.append(["all", str(report.train_images), str(report.validation_images)])
        self._progress.console.print(table(["class", ">train", ">validation"], rows))
        for what, files, count in (
            ("unreadable", report.unreadable, report.unreadable_count),
            ("skipped", report.skipped, report.skipped_count),
        ):
            for file in files[:SHOWN_FILES]:
                self._say(f"{what}: {file.path}: {file.reason}", style="yellow")
            if (more := count - SHOWN_FILES) > 0:
                self._say(f"{what}: {more} more", style="yellow")
        for warning in report.warnings:
            self._say(warning, style="yellow")

    def _show_features(self, progress: pb.FeatureProgress) -> None:
        speed = f"{progress.images_per_second:.0f} images/s"
        if self._features is None:
            self._features = self._progress.add_task("features", total=progress.total, speed="")
        self._progress.update(self._features, completed=progress.done, total=progress.total, speed=speed)
        if progress.done >= progress.total:
            self._say(f"features of {progress.total} images at {speed}", style="dim")

    def _show_epoch(self, epoch: pb.EpochMetrics) -> None:
        if self._epochs is None:
            self._epochs = self._progress.add_task("epochs", total=self._max_epochs, speed="")
        speed = f"{epoch.images_per_second:.0f} images/s"
        self._progress.update(self._epochs, completed=epoch.epoch, speed=speed)
        self._say(
            f"epoch {epoch.epoch:>{len(str(self._max_epochs))}}/{self._max_epochs}"
            f"  train loss {epoch.train_loss:.4f} acc {epoch.train_accuracy:.3f}"
            f"  val loss {epoch.val_loss:.4f} acc {epoch.val_accuracy:.3f}{'  best' if epoch.best else ''}"
        )

    def _show_evaluation(self, evaluation: pb.Evaluation) -> None:
        self._say(f"epoch {evaluation.epoch} judged: {_judged('validation', evaluation.validation)}", style="bold")
        if evaluation.HasField("test"):
            self._say(f"held back from all choices: {_judged('test', evaluation.test)}", style="bold")
        shown = evaluation.test if evaluation.HasField("test") else evaluation.validation
        self._say(
            f"probabilities are off by {shown.calibration_error:.1%} (temperature {evaluation.temperature:.2f}); "
            f"an answer below {evaluation.uncertain_below:.1%} is uncertain"
        )


def _judged(part: str, judgement: pb.Judgement) -> str:
    return (
        f"accuracy {judgement.accuracy:.1%} on {judgement.images} {part} images (95 % interval "
        f"{judgement.accuracy_low:.1%} to {judgement.accuracy_high:.1%}; guessing gives "
        f"{judgement.majority_accuracy:.1%})"
    )


class JsonView:
    """Prints the events of one job as they are, a JSON object a line."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def show(self, event: pb.JobEvent) -> None:
        """Print one event."""
        print_json(event)
