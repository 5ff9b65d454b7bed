"""Temperatures for many heads at once, to compare them by what they lose after calibration."""

import math

import torch
from torch import Tensor

from backboned.registry.answers import TEMPERATURES
from backboned.server.training.calibration import FEWEST_IMAGES
from backboned.server.training.objective import Objective

_STEPS = 20
_GOLDEN = (5**0.5 - 1) / 2


def calibrated_losses(objective: Objective, logits: Tensor, target: Tensor) -> Tensor:
    """The mean loss of each head, `[heads]`, with its logits `[heads, n, outputs]` over the temperature that serves.

    That temperature is what `calibration.fit_temperature` gives, here to 0.1 % and for all heads together, by golden
    section on its logarithm: the loss is convex in its inverse.
    """
    count = logits.shape[1]
    at_one = objective.losses(logits, target).mean(1)
    if count < FEWEST_IMAGES:
        return at_one
    faultless = objective.rights(logits, target).amin(1) == 1
    low = torch.where(faultless, 0.0, math.log(TEMPERATURES[0])).to(logits)
    high = torch.full_like(low, math.log(TEMPERATURES[1]))

    def loss(at: Tensor) -> Tensor:
        return objective.losses(logits / at.exp()[:, None, None], target).mean(1)

    def cost(at: Tensor) -> Tensor:
        return loss(at) + at.square() / (2 * count)

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = cost(left), cost(right)
    for _ in range(_STEPS):
        lower = at_left < at_right
        low, high = torch.where(lower, low, left), torch.where(lower, right, high)
        new = torch.where(lower, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = cost(new)
        left, right = torch.where(lower, new, right), torch.where(lower, left, new)
        at_left, at_right = torch.where(lower, at_new, at_right), torch.where(lower, at_left, at_new)
    best = (low + high) / 2
    return torch.where(cost(best) < at_one, loss(best), at_one)
