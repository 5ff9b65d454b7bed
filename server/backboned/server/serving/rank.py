"""What answers mean in a model's own classes."""

import secrets
from collections.abc import Sequence

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
            uncertain=unsure or unfamiliar,
            unfamiliar=unfamiliar,
        )
        for answer, places, likely, (unsure, unfamiliar) in zip(
            answers, indices.tolist(), values.tolist(), doubts, strict=True
        )
    )


def _doubts(model: LoadedModel, probabilities: Tensor, answers: Sequence[Answer]) -> list[tuple[bool, bool]]:
    """For each answer, whether it is too little certain, and whether its image lies too far from all that trained."""
    known = model.answers
    if known is None:
        return [(False, False)] * len(answers)
    unsure = model.manifest.task.certainty(probabilities) < known.uncertain_below
    far = [a.distance is not None and a.distance.item() > known.unfamiliar_beyond for a in answers]
    return list(zip(unsure.tolist(), far, strict=True))


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
