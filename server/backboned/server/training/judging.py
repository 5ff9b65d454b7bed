"""How good a version is: what its answers to the images that validate, and to those held back, come to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.registry.answers import Answers
from backboned.registry.reference import Reference
from backboned.registry.task import Task
from backboned.server.training.calibration import doubt_below, fit_temperature, right
from backboned.server.training.events import ClassJudgement, Evaluation, Judgement
from backboned.server.training.familiarity import Familiarity, unfamiliar_beyond

BINS = 15
_Z = 1.959963984540054
"""The standard normal's quantile of 97.5 %."""


@dataclass(frozen=True)
class Outputs:
    """What a version makes of some images, on the CPU.

    `logits` `[n, outputs]` float32; `targets` as of `Dataset.targets`, `[n]` int64 or `[n, classes]`; `features`
    `[n, d]` float32: what the head reads, averaged over positions, as Predict returns it for an embedding.
    """

    logits: Tensor
    targets: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.logits)


@dataclass(frozen=True)
class Bin:
    """Decisions of like confidence: how many, the mean probability that they were given, the part that is right."""

    count: int
    confidence: float
    accuracy: float


def answers_of(task: Task, validation: Outputs, familiarity: Familiarity) -> Answers:
    """What serving needs to know to give answers worth trusting.

    `familiarity` is of the training images' features as they are served (not augmented), by the same stages as those of
    `validation`: below a frozen boundary it is the same in every epoch.
    """
    temperature = fit_temperature(task, validation.logits, validation.targets)
    probabilities = task.probabilities(validation.logits / temperature)
    answers = Answers(
        temperature=temperature,
        uncertain_below=doubt_below(task, probabilities, validation.targets),
        unfamiliar_beyond=0.0,
        centres=familiarity.centres,
        scale=familiarity.scale,
    )
    certainties, distances = task.certainty(probabilities), answers.distances(validation.features.float())
    return replace(
        answers,
        unfamiliar_beyond=unfamiliar_beyond(answers, validation.features),
        reference=Reference.of(certainties.tolist(), distances.tolist()),
    )


def evaluate(
    task: Task, classes: Sequence[str], answers: Answers, epoch: int, *, validation: Outputs, test: Outputs | None
) -> Evaluation:
    """The figures of an epoch's checkpoint, over the images that validate and over those held back, if any."""
    return Evaluation(
        epoch=epoch,
        validation=judge(task, classes, answers.temperature, validation),
        test=judge(task, classes, answers.temperature, test) if test is not None and len(test) else None,
        temperature=answers.temperature,
        uncertain_below=answers.uncertain_below,
    )


def judge(task: Task, classes: Sequence[str], temperature: float, outputs: Outputs) -> Judgement:
    """Figures over one or more images. Multi-label: accuracy is the mean over labels, loss too."""
    probabilities = task.probabilities(outputs.logits / temperature)
    said, true = decisions(task, probabilities), truths(task, outputs.targets, len(classes))
    n = len(outputs)
    accuracy = _accuracy(task, said, true)
    low, high = wilson(accuracy, n)
    return Judgement(
        images=n,
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        loss=task.loss_of(outputs.logits.double() / temperature, outputs.targets).item(),
        calibration_error=calibration_error(reliability(task, probabilities, outputs.targets)),
        majority_accuracy=_majority(task, true),
        classes=tuple(_class(name, said[:, i], true[:, i]) for i, name in enumerate(classes)),
    )


def decisions(task: Task, probabilities: Tensor) -> Tensor:
    """What is said: `[n, classes]` bool, of `[n, classes]` probabilities. Multi-label: at 0.5."""
    if task is Task.MULTI_LABEL:
        return probabilities > 0.5
    return F.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).bool()


def truths(task: Task, targets: Tensor, classes: int) -> Tensor:
    """What is true: `[n, classes]` bool."""
    return targets > 0.5 if task is Task.MULTI_LABEL else F.one_hot(targets, classes).bool()


def reliability(task: Task, probabilities: Tensor, targets: Tensor) -> tuple[Bin, ...]:
    """`BINS` bins of equal width over 0…1, by the probability that each decision was given.

    A decision is the likeliest class of an image; multi-label: whether a label is there, for each label.
    """
    if task is Task.MULTI_LABEL:
        confidence = torch.maximum(probabilities, 1 - probabilities).flatten()
        hits = ((probabilities > 0.5) == (targets > 0.5)).flatten()
    else:
        confidence, hits = probabilities.amax(dim=1), right(task, probabilities, targets)
    place = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    counts = torch.bincount(place, minlength=BINS)
    confident = torch.bincount(place, confidence.double(), BINS) / counts.clamp(min=1)
    correct = torch.bincount(place, hits.double(), BINS) / counts.clamp(min=1)
    return tuple(map(Bin, counts.tolist(), confident.tolist(), correct.tolist()))


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error (Naeini et al. 2015): the mean gap of bins, weighted by what is in them."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / max(total, 1)


def confusion(task: Task, probabilities: Tensor, targets: Tensor) -> Tensor:
    """`[classes, classes]` int64 counts, of one true class (row) each said to be another (column)."""
    assert task is not Task.MULTI_LABEL, "images with several labels have no confusion matrix"
    classes = probabilities.shape[1]
    return torch.bincount(targets * classes + probabilities.argmax(dim=1), minlength=classes**2).view(classes, classes)


def wilson(part: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a part of `n` (Wilson 1927). Multi-label: images count, not their labels."""
    if n == 0:
        return 0.0, 1.0
    centre = (part + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(part * (1 - part) / n + _Z**2 / (4 * n**2))
    return max(0.0, min(centre - half, part)), min(1.0, max(centre + half, part))


def _accuracy(task: Task, said: Tensor, true: Tensor) -> float:
    alike = said == true
    return (alike if task is Task.MULTI_LABEL else alike.all(dim=1)).double().mean().item()


def _majority(task: Task, true: Tensor) -> float:
    parts = true.double().mean(dim=0)
    return (torch.maximum(parts, 1 - parts).mean() if task is Task.MULTI_LABEL else parts.max()).item()


def _class(name: str, said: Tensor, true: Tensor) -> ClassJudgement:
    both, named, there = (int(t.sum()) for t in (said & true, said, true))
    return ClassJudgement(name, there, both / named if named else 0.0, both / there if there else 0.0)
