"""What an epoch leaves, whatever trained: the figures, and the weights they are of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.training.events import EpochDone


@dataclass(frozen=True)
class Trained:
    """An epoch's figures, and the tensors of the stages that trained, as they are served.

    `rights` says of each validating image how right its answer is, 0…1.
    """

    done: EpochDone
    stages: Mapping[str, Mapping[str, Tensor]]
    optimizer_state: Mapping[str, Any]
    rights: Tensor


@dataclass
class Progress:
    """How far a training is: the epochs done, and the lowest loss of those that choose."""

    epoch: int = 0
    lowest: float = math.inf
    best_epoch: int = 0

    def step(self, loss: float) -> bool:
        """Another epoch, and what it is chosen by; whether it is the best so far."""
        self.epoch += 1
        if loss < self.lowest:
            self.lowest, self.best_epoch = loss, self.epoch
        return self.best_epoch == self.epoch

    def ended(self, max_epochs: int, patience: int) -> bool:
        """Whether there is no further epoch: it was the last, or `patience` of them brought nothing better."""
        return self.epoch >= max_epochs or bool(patience and self.epoch - self.best_epoch >= patience)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.epoch, self.lowest, self.best_epoch = state["epoch"], state["lowest"], state["best_epoch"]


def schedule(step: int, steps: int) -> float:
    """The factor of the learning rate at `step`, from 0: a linear warm-up over a twentieth of all, then half a cosine.

    The cosine falls to zero (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    warm_up = max(1, steps // 20)
    return min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def diverged(epoch: int, learning_rate: float | None) -> BackbonedError:
    """The error for a loss that isn't finite."""
    at = "" if learning_rate is None else f" with learning_rate {learning_rate:g}"
    advice = "give learning_rate, for instance 1e-4" if learning_rate is None else "lower learning_rate, tenfold say"
    return BackbonedError(
        ErrorKind.FAILED_PRECONDITION,
        f"the loss is not finite in epoch {epoch}: training diverged{at}; {advice}",
        field="options.learning_rate",
    )
