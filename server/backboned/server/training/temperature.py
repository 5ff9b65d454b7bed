"""Temperatures for many heads at once, to compare them by what they would lose after calibration."""

from collections.abc import Callable

import torch
from torch import Tensor

_LOWEST, _HIGHEST = 0.1, 10.0
_STEPS = 14
_GOLDEN = (5**0.5 - 1) / 2


def calibrated_losses(losses: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The mean loss of each head, `[heads]`, with its logits over the temperature that makes it least.

    Guo et al. 2017, arXiv:1706.04599. `logits` is `[heads, n, outputs]`; `losses` gives `[heads, n]` for such. The
    temperature is sought between 0.1 and 10 by golden section on its logarithm, to 1 %: the loss is convex in its
    inverse.
    """
    low, high = (torch.full((len(logits),), v, device=logits.device).log() for v in (_LOWEST, _HIGHEST))

    def loss(at: Tensor) -> Tensor:
        return losses(logits / at.exp()[:, None, None]).mean(1)

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(_STEPS):
        lower = at_left < at_right
        low, high = torch.where(lower, low, left), torch.where(lower, right, high)
        new = torch.where(lower, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = loss(new)
        left, right = torch.where(lower, new, right), torch.where(lower, left, new)
        at_left, at_right = torch.where(lower, at_new, at_right), torch.where(lower, at_left, at_new)
    return torch.minimum(torch.minimum(at_left, at_right), losses(logits).mean(1))
