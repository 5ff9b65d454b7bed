"""Where the training images lie among all features, and how far from them an image may lie and still be familiar."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.registry.answers import Answers
from backboned.registry.task import Task

SHRINKAGE = 0.1
"""This part of the mean variance is added to that of each value, so that a value that hardly varies doesn't rule."""

FAMILIAR = 0.98
MARGIN = 1.02
"""Unfamiliar is what lies further than so many times the distance within which this part of the images lies.

Of n images the quantile is uncertain by itself, so 1/n is added to the margin.
"""

_ROWS = 4096
_LEAST = 1e-6  # or float16 could not hold centres in such deviations


@dataclass(frozen=True)
class Familiarity:
    """`centres` `[k, d]` float16 and `scale` `[d]`, as of `Answers`."""

    centres: Tensor
    scale: Tensor

    @classmethod
    def of(cls, task: Task, features: Tensor, targets: Tensor, classes: int) -> "Familiarity":
        """From the training images' features `[m, d]` and targets, as of `Dataset.targets`.

        Each image counts for the nearest centre among those of its labels.
        """
        members = _members(task, targets, classes)
        members = members[:, members.sum(dim=0) > 0]
        sums = torch.zeros(members.shape[1], features.shape[1], dtype=torch.float64)
        for rows in torch.arange(len(features)).split(_ROWS):
            sums += members[rows].double().T @ F.normalize(features[rows].float()).double()
        centres = (sums / members.sum(dim=0).double()[:, None]).float()
        squares = torch.zeros(features.shape[1], dtype=torch.float64)
        for rows in torch.arange(len(features)).split(_ROWS):
            unit = F.normalize(features[rows].float())
            distances = torch.cdist(unit, centres).masked_fill(members[rows] == 0, torch.inf)
            squares += (unit - centres[distances.argmin(dim=1)]).double().square().sum(dim=0)
        variance = squares / len(features)
        spread = variance.mean().clamp(min=_LEAST)
        scale = (variance + SHRINKAGE * spread).rsqrt().float()
        return cls((centres * scale).half(), scale)


def unfamiliar_beyond(answers: Answers, features: Tensor) -> float:
    """The distance beyond which an image is unfamiliar, from features `[n, d]` that validated."""
    within = answers.distances(features.float()).double().quantile(FAMILIAR).item()
    return (MARGIN + 1 / len(features)) * within


def _members(task: Task, targets: Tensor, classes: int) -> Tensor:
    """`[m, groups]` float32 of 0 and 1: the classes of each image, and where it may have none, one more for these."""
    if task is not Task.MULTI_LABEL:
        return F.one_hot(targets, classes).float()
    labels = (targets > 0.5).float()
    return torch.cat([labels, (labels.sum(dim=1, keepdim=True) == 0).float()], dim=1)
