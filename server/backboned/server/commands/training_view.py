"""How a job is shown while it runs: what the dataset holds, a bar for features, a bar and a line for each epoch."""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from backboned.server.commands.dataset_view import class_table, report_lines
from backboned.server.commands.output import console, duration, label, print_json, runs, show, table
from backboned.v1 import model_service_pb2 as pb

DEFAULT_EPOCHS = 20
BAR_WIDTH = 20
"""So that a line fits into 80 columns."""


class TrainingView:
    """Shows the events of one job: lines on stdout and, in a terminal, bars below them."""

    def __init__(self, job: pb.Job) -> None:
        self._console = console()
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        options = job.request.options
        self._max_epochs = options.max_epochs if options.HasField("max_epochs") else DEFAULT_EPOCHS
        if list(options.trainable_stages) == ["auto"]:
            self._max_epochs += 1  # the first is the head alone
        self._features: TaskID | None = None
        self._features_told = False
        self._epochs: TaskID | None = None
        self._first_epoch: pb.JobEvent | None = None
        self._stages: list[str] = []
        self._images = 0
        self._told: set[str] = set()

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
                self._show_epoch(event)
            case "evaluation":
                self._show_evaluation(event.evaluation)
            case "log":
                self._say(event.log)
            case _:  # a checkpoint follows from its epoch
                pass

    def _say(self, text: str, *, style: str = "") -> None:
        self._progress.console.print(text, style=style)

    def _show_table(self, filled: Table) -> None:
        if self._console.is_terminal:
            self._progress.console.print(filled)
        else:
            show(filled)

    def _show_report(self, report: pb.DatasetReport) -> None:
        """The table once; of a later report, which tells what was seen in the images, what is new."""
        if not self._images:
            self._show_table(class_table(report))
        self._images = report.train_images + report.validation_images + report.test_images
        for line in report_lines(report):
            if line not in self._told:
                self._told.add(line)
                self._say(line, style="yellow")

    def _show_features(self, progress: pb.FeatureProgress) -> None:
        if self._features_told:  # the last of several, or those of a trainer that goes on for another one
            return
        left = ""
        if progress.images_per_second:
            left = duration((progress.total - progress.done) / progress.images_per_second)
            left = f"{progress.images_per_second:.0f} images/s, {left} left"
        if self._features is None:
            self._features = self._progress.add_task("features", total=progress.total, speed="")
        self._progress.update(self._features, completed=progress.done, total=progress.total, speed=left)
        if progress.done >= progress.total:
            self._features_told = True
            self._progress.update(self._features, visible=False)
            self._progress.refresh()
            self._say(features_line(progress, self._images), style="dim")

    def _show_epoch(self, event: pb.JobEvent) -> None:
        epoch = event.epoch
        if self._epochs is None:
            self._epochs = self._progress.add_task("epochs", total=self._max_epochs, speed="")
        self._progress.update(self._epochs, completed=epoch.epoch, speed=self._speed(event))
        if (stages := list(epoch.trainable_stages)) and stages != self._stages:
            self._stages = stages
            self._say(f"{runs(stages)} and the head train together:", style="dim")
        self._say(
            f"epoch {epoch.epoch:>{len(str(self._max_epochs))}}/{self._max_epochs}"
            f"  train loss {epoch.train_loss:.4f} acc {epoch.train_accuracy:.3f}"
            f"  val loss {epoch.val_loss:.4f} acc {epoch.val_accuracy:.3f}{'  best' if epoch.best else ''}"
        )

    def _speed(self, event: pb.JobEvent) -> str:
        """Images a second, and how long all epochs to come would take, from the times of those that were shown."""
        speed = f"{event.epoch.images_per_second:.0f} images/s"
        first = self._first_epoch
        if first is None or first.epoch.trainable_stages != event.epoch.trainable_stages:
            self._first_epoch = event
            return speed
        seconds = (event.time.ToNanoseconds() - first.time.ToNanoseconds()) / 1e9
        a_piece = seconds / max(event.epoch.epoch - first.epoch.epoch, 1)
        return f"{speed}, up to {duration(a_piece * max(self._max_epochs - event.epoch.epoch, 0))} left"

    def _show_evaluation(self, evaluation: pb.Evaluation) -> None:
        parts = [("validation", evaluation.validation)]
        if evaluation.HasField("test"):
            parts.append(("test, held back", evaluation.test))
        columns = [
            f"epoch {evaluation.epoch}",
            ">images",
            ">accuracy",
            ">95% interval",
            ">guessing",
            ">calibration error",
        ]
        self._show_table(table(columns, [[name, *_figures(judgement)] for name, judgement in parts]))
        self._say(f"an answer with a probability below {evaluation.uncertain_below:.1%} is uncertain", style="dim")


def features_line(progress: pb.FeatureProgress, images: int) -> str:
    """What became of the features, when all are there; `images` are counted without further views."""
    views = ["each view counted"] if progress.total > images > 0 else []
    if progress.cached >= progress.total:
        return f"features of {_of(progress.total, views)} from the cache"
    cached = [f"{progress.cached} cached"] if progress.cached else []
    speed = f" at {progress.images_per_second:.0f} images/s" if progress.images_per_second else ""
    return f"features of {_of(progress.total, views + cached)}{speed}"


def _of(images: int, remarks: list[str]) -> str:
    return f"{images} images" + (f" ({'; '.join(remarks)})" if remarks else "")


def _figures(judgement: pb.Judgement) -> list[str]:
    return [
        str(judgement.images),
        f"{judgement.accuracy:.1%}",
        f"{judgement.accuracy_low:.1%} - {judgement.accuracy_high:.1%}",
        f"{judgement.majority_accuracy:.1%}",
        f"{judgement.calibration_error:.1%}",
    ]


class JsonView:
    """Prints the events of one job as they are, a JSON object a line."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def show(self, event: pb.JobEvent) -> None:
        """Print one event."""
        print_json(event)
