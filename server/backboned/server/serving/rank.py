"""What answers mean in a model's own classes."""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backboned.registry.errors import BackbonedError, invalid, not_found
from backboned.registry.manifest import Manifest
from backboned.registry.task import Task
from backboned.server.serving.calls import Prediction
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.tree import Answer


def rank(model: LoadedModel, answers: Sequence[Answer], top_k: int) -> tuple[Prediction, ...]:
    """A prediction for each answer: the `top_k` likeliest classes (0: all), best first, and whether to doubt it."""
    manifest = model.manifest
    logits = torch.stack([answer.logits for answer in answers])
    probabilities = manifest.task.probabilities(model.calibrated(logits))
    values, indices = probabilities.topk(top_k or len(manifest.classes))
    doubts = _doubts(model, probabilities, answers)
    return tuple(
        Prediction(
            secrets.token_hex(12),
            tuple((manifest.classes[i], p) for i, p in zip(places, likely, strict=True)),
            () if answer.embedding is None else tuple(answer.embedding.tolist()),
            uncertain=doubt.unsure or doubt.unfamiliar,
            unfamiliar=doubt.unfamiliar,
            certainty=doubt.certainty,
            distance=doubt.distance,
        )
        for answer, places, likely, doubt in zip(answers, indices.tolist(), values.tolist(), doubts, strict=True)
    )


class _Doubt(NamedTuple):
    """How certain an answer is, and how far its image lies from all that trained; and whether that is too far."""

    certainty: float | None = None
    distance: float | None = None
    unsure: bool = False
    unfamiliar: bool = False


def _doubts(model: LoadedModel, probabilities: Tensor, answers: Sequence[Answer]) -> list[_Doubt]:
    """For each answer, whether there is reason to doubt it; none where the model doesn't know its limits."""
    known = model.answers
    if known is None:
        return [_Doubt()] * len(answers)
    certainties = model.manifest.task.certainty(probabilities).tolist()
    distances = [None if answer.distance is None else answer.distance.item() for answer in answers]
    return [
        _Doubt(certainty, distance, certainty < known.uncertain_below, _beyond(distance, known.unfamiliar_beyond))
        for certainty, distance in zip(certainties, distances, strict=True)
    ]


def _beyond(distance: float | None, limit: float) -> bool:
    return distance is not None and distance > limit


def check_labels(manifest: Manifest, labels: Sequence[str]) -> None:
    """Raise `BackbonedError` for a label that is no class of the model."""
    for index, label in enumerate(labels):
        if isinstance(error := truth_of(manifest, label), BackbonedError):
            raise invalid(f"labels[{index}]: {error.message}", field=f"labels[{index}]")


def truth_of(manifest: Manifest, label: str) -> Tensor | BackbonedError:
    """A label as the task's loss takes it, or why it can't be one of the model's."""
    names = [n for n in label.split("|") if n] if manifest.task is Task.MULTI_LABEL else [label]
    for name in names:
        if name not in manifest.classes:
            return not_found("label", name, manifest.classes)
    indices = [manifest.classes.index(n) for n in names]
    if manifest.task is not Task.MULTI_LABEL:
        return torch.tensor(indices[0])
    truth = torch.zeros(len(manifest.classes))
    truth[indices] = 1.0
    return truth


def correct(task: Task, logits: Tensor, truth: Tensor) -> bool:
    """Whether `logits` `[outputs]` say what is true."""
    (probabilities,) = task.probabilities(logits[None])
    if task is Task.MULTI_LABEL:
        return bool(((probabilities > 0.5) == truth.bool()).all())
    return int(probabilities.argmax()) == int(truth)
