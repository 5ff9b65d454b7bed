"""Probabilities that are as often right as they say, and below which certainty to doubt an answer."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from backboned.registry.answers import TEMPERATURES
from backboned.registry.task import Task

FEWEST_IMAGES = 10
"""With fewer images that validate, probabilities stay as they are."""

FEWEST_WRONG = 5
"""With fewer wrong answers, nothing can be learnt of how wrong ones differ from right ones."""

DOUBTED = 0.05
DOUBTED_BELOW = 0.9
"""With too few wrong answers this part is doubted, the least certain ones; and none of this certainty or more."""

_STEPS = 200
_REFINEMENTS = 40


def fit_temperature(task: Task, logits: Tensor, targets: Tensor) -> float:
    """The temperature at which validation has the lowest loss (Guo et al. 2017, arXiv:1706.04599).

    `logits` `[n, outputs]` and `targets` as of `Task.loss`. The loss is summed over images, and (log T)² / 2 is added:
    so a few images move the temperature little. It is 1 where there are fewer than `FEWEST_IMAGES`; and where no answer
    is wrong it is not below 1, since then the loss would fall for ever as answers grow more certain.
    """
    n = len(logits)
    if n < FEWEST_IMAGES:
        return 1.0
    wide = logits.double()

    def cost(log_temperature: float) -> float:
        loss = task.loss_of(wide / math.exp(log_temperature), targets).item()
        return n * loss + log_temperature**2 / 2

    separable = bool(right(task, task.probabilities(logits), targets).all())
    low, high = (0.0 if separable else math.log(TEMPERATURES[0])), math.log(TEMPERATURES[1])
    best = math.exp(_lowest(cost, low, high))
    return best if cost(math.log(best)) < cost(0.0) else 1.0


def doubt_below(task: Task, probabilities: Tensor, targets: Tensor) -> float:
    """The certainty (`Task.certainty`) below which an answer is uncertain, from calibrated `[n, classes]`.

    Where wrong answers and right ones differ most: the threshold with the largest Youden's J, the part of the wrong
    answers below it minus the part of the right ones (Youden 1950). With fewer than `FEWEST_WRONG` wrong ones it is
    the certainty that `DOUBTED` of the images don't reach, and at most `DOUBTED_BELOW`. It is 0, and nothing is
    doubted, where certainty tells nothing.
    """
    certainty = task.certainty(probabilities).double()
    is_right = right(task, probabilities, targets)
    wrong = int((~is_right).sum())
    if wrong < FEWEST_WRONG or wrong == len(certainty):
        return min(certainty.quantile(DOUBTED).item(), DOUBTED_BELOW)
    values, order = certainty.sort()
    sorted_right = is_right[order].double()
    below = (1 - sorted_right).cumsum(0) / wrong - sorted_right.cumsum(0) / (len(values) - wrong)
    between = values[1:] > values[:-1]  # a threshold lies between two certainties that differ
    below = torch.where(between, below[:-1], torch.zeros_like(below[:-1]))
    if not len(below) or below.max() <= 0:
        return 0.0
    at = int(below.argmax())
    return (values[at].item() + values[at + 1].item()) / 2


def right(task: Task, probabilities: Tensor, targets: Tensor) -> Tensor:
    """Whether answers are right: `[n]` bool; multi-label: right about every label, at 0.5."""
    if task is Task.MULTI_LABEL:
        return ((probabilities > 0.5) == (targets > 0.5)).all(dim=1)
    return probabilities.argmax(dim=1) == targets


def _lowest(cost: Callable[[float], float], low: float, high: float) -> float:
    """Where `cost` is lowest: the best of many steps, refined between its neighbours by golden section."""
    step = (high - low) / _STEPS
    best = min((low + i * step for i in range(_STEPS + 1)), key=cost)
    a, b = max(low, best - step), min(high, best + step)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(_REFINEMENTS):
        c, d = b - golden * (b - a), a + golden * (b - a)
        if cost(c) < cost(d):
            b = d
        else:
            a = c
    return (a + b) / 2
