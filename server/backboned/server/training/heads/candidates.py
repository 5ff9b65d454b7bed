"""Which heads are trained side by side, and on which folds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backboned.server.training.options import TrainingOptions

RATES = (3e-4, 1e-3, 3e-3)
RATES_OF_DEEPER_HEADS = (1e-3, 3e-3, 1e-2, 3e-2)
"""Where no probe fits, as on maps, over which a head takes the mean: their gradients are smaller."""

DECAYS = (1e-4, 0.1, 1.0)
PENALTIES = (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Of the squared weights, halved, where a probe is fitted by L-BFGS."""

FOLDS = 5
FEW_IMAGES = 1000
"""With fewer training images than this, cross-validation chooses."""

_FEWEST_A_FOLD = 2


@dataclass(frozen=True)
class Grid:
    """The candidates: pairs of learning rate and weight decay for AdamW, then penalties for L-BFGS."""

    rates: tuple[tuple[float, float], ...]
    penalties: tuple[float, ...] = ()

    @classmethod
    def of(cls, options: TrainingOptions, *, probe: bool, most: int) -> "Grid":
        """What `options` leave open is tried, `most` candidates of AdamW at most; an L-BFGS `probe` where it fits."""
        rates: tuple[float, ...] = RATES if probe else RATES_OF_DEEPER_HEADS
        if options.learning_rate is not None:
            rates = (options.learning_rate,)
        decays = DECAYS if options.weight_decay is None else (options.weight_decay,)
        pairs = [(rate, decay) for decay in decays for rate in rates]
        middle = sorted(pairs, key=lambda pair: abs(rates.index(pair[0]) - len(rates) // 2))
        free = options.learning_rate is None
        return cls(tuple(pairs if len(pairs) <= most else middle[:most]), PENALTIES if probe and free else ())

    def __len__(self) -> int:
        return len(self.rates) + len(self.penalties)

    def name(self, index: int) -> str:
        """A candidate, for people."""
        if index < len(self.rates):
            rate, decay = self.rates[index]
            return f"AdamW with learning_rate {rate:g} and weight_decay {decay:g}"
        return f"L-BFGS with an L2 penalty of {self.penalties[index - len(self.rates)]:g}"


def folds(targets: Tensor, seed: int) -> Tensor | None:
    """The fold `[n]` of each image, for cross-validation; None where there are too many images, or too few of a class.

    `targets` are `[n]` class indices or `[n, classes]` of 0 and 1. Classes are spread evenly over the folds.
    """
    count = len(targets)
    groups = targets if targets.dim() == 1 else targets.long().mul(torch.arange(1, targets.shape[1] + 1)).amax(1)
    sizes = torch.bincount(groups.cpu())
    if count >= FEW_IMAGES or int(sizes[sizes > 0].min()) < _FEWEST_A_FOLD * FOLDS:
        return None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    fold = torch.empty(count, dtype=torch.int64)
    dealt = order[torch.argsort(groups.cpu()[order], stable=True)]
    fold[dealt] = torch.arange(count) % FOLDS
    return fold


def spread(values: Sequence[float], copies: int, like: Tensor) -> Tensor:
    """`values` of some candidates over all copies of them: `[copies × values]`, on the device of `like`."""
    return torch.tensor(list(values) * copies, dtype=torch.float32, device=like.device)
