"""What a report tells of."""

from dataclasses import dataclass

from torch import Tensor

from backboned.registry.answers import Answers
from backboned.registry.manifest import Manifest
from backboned.registry.task import Task
from backboned.server.training.events import DatasetReport, Evaluation, Judgement
from backboned.server.training.report.photos import Judged, Photo


@dataclass(frozen=True)
class Contents:
    """A version, what its evaluation came to, and the answers that it came from.

    `mistakes` is how many answers are wrong, over both parts; `photos` show the worst of them.
    """

    manifest: Manifest
    answers: Answers
    evaluation: Evaluation
    validation: Judged
    test: Judged | None
    dataset: DatasetReport | None
    mistakes: int = 0
    photos: tuple[Photo, ...] = ()

    @property
    def task(self) -> Task:
        """What is told apart."""
        return self.manifest.task

    @property
    def shown(self) -> tuple[str, Judgement, Judged]:
        """The part that figures are told of: that held back to test if there is one, else the one that validates."""
        if self.test is not None and self.evaluation.test is not None:
            return "test", self.evaluation.test, self.test
        return "validation", self.evaluation.validation, self.validation

    def probabilities(self, judged: Judged) -> Tensor:
        """Calibrated, `[n, classes]`."""
        return self.task.probabilities(judged.outputs.logits / self.answers.temperature)
