"""Epochs: the training loop above the freezing boundary."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.training.events import EpochDone
from backboned.server.training.features import Features
from backboned.server.training.network import Network
from backboned.server.training.objective import Objective
from backboned.server.training.options import TrainingOptions

HEAD_FACTOR = 10
"""The head is new: where pretrained stages train too, it learns so many times faster than they."""


@dataclass(frozen=True)
class Split:
    """Images that train, or that validate: their features, which of these to use, and the target of each.

    `images` is `[n]` int64 indices into the features, `targets` `[n]` or `[n, classes]` on the device.
    """

    features: Features
    images: Tensor
    targets: Tensor
    views: int = 1


class Trainer:
    """Trains a network. The epochs are a pure function of its arguments on the CPU: equal seeds give equal bits.

    For one thread; seeds torch's generators, which dropout draws from, so it wants a process of its own.
    """

    def __init__(self, network: Network, objective: Objective, options: TrainingOptions) -> None:
        """`options` are validated ones."""
        assert options.learning_rate is not None
        self._network = network
        self._objective = objective
        self._options = options
        rate = options.learning_rate
        groups = [
            *_groups(network.head, rate * HEAD_FACTOR if network.body else rate, options.weight_decay),
            *_groups(network.body, rate, options.weight_decay),
        ]
        self._optimizer = torch.optim.AdamW(groups)

    @property
    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state as it is now: plain values and tensors."""
        return self._optimizer.state_dict()

    def epochs(self, train: Split, validation: Split, check: Callable[[], None]) -> Iterator[EpochDone]:
        """Train, and yield after each epoch, until the last one or until `patience` epochs brought nothing better.

        `check` is called after every batch; what it raises ends the training. Raises `BackbonedError`
        `FAILED_PRECONDITION` if a loss isn't finite.
        """
        torch.manual_seed(self._options.seed)
        order = torch.Generator().manual_seed(self._options.seed)
        scheduler = LambdaLR(self._optimizer, self._schedule(len(train.images)))
        lowest, best_epoch = math.inf, 0
        for epoch in range(1, self._options.max_epochs + 1):
            start = time.monotonic()
            train_loss, train_accuracy = self._train(train, order, scheduler, check)
            seconds = time.monotonic() - start
            val_loss, val_accuracy = self._validate(validation, check)
            if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                raise _diverged(epoch, self._options)
            if val_loss < lowest:
                lowest, best_epoch = val_loss, epoch
            yield EpochDone(
                epoch=epoch,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                learning_rate=float(scheduler.get_last_lr()[0]),
                images_per_second=len(train.images) / max(seconds, 1e-9),
                best=best_epoch == epoch,
            )
            if self._options.patience and epoch - best_epoch >= self._options.patience:
                return

    def _train(
        self, split: Split, order: torch.Generator, scheduler: LambdaLR, check: Callable[[], None]
    ) -> tuple[float, float]:
        self._network.train()
        mean = _Mean()
        shuffled = torch.randperm(len(split.images), generator=order)
        views = torch.randint(split.views, (len(shuffled),), generator=order)
        # Batches of nearly equal size: BatchNorm can't train on a last one of a single image.
        count = math.ceil(len(shuffled) / self._options.batch_size)
        for chosen, view in zip(shuffled.tensor_split(count), views.tensor_split(count), strict=True):
            target = split.targets[chosen.to(split.targets.device)]
            logits = self._network(split.features.batch(split.images[chosen], view))
            self._optimizer.zero_grad()
            self._objective(logits, target).backward()
            self._optimizer.step()
            scheduler.step()
            mean.add(self._judge(logits.detach(), target), len(chosen))
            check()
        return mean.values()

    @torch.no_grad()
    def _validate(self, split: Split, check: Callable[[], None]) -> tuple[float, float]:
        self._network.train(False)
        mean = _Mean()
        for chosen in torch.arange(len(split.images)).split(self._options.batch_size):
            target = split.targets[chosen.to(split.targets.device)]
            logits = self._network(split.features.batch(split.images[chosen], torch.zeros_like(chosen)))
            mean.add(self._judge(logits, target), len(chosen))
            check()
        return mean.values()

    def _judge(self, logits: Tensor, target: Tensor) -> Tensor:
        return torch.stack([self._objective.task.loss(logits, target), self._objective.accuracy(logits, target)])

    def _schedule(self, images: int) -> Callable[[int], float]:
        """Cosine to zero over all epochs (Loshchilov & Hutter 2017, arXiv:1608.03983), after a linear warm-up."""
        steps = math.ceil(images / self._options.batch_size) * self._options.max_epochs
        warm_up = max(1, steps // 20)
        return lambda step: min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def _groups(parameters: Sequence[nn.Parameter], rate: float, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Parameter groups: biases and norms don't decay."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    if matrices:
        yield {"params": matrices, "lr": rate, "weight_decay": weight_decay}
    if vectors:
        yield {"params": vectors, "lr": rate, "weight_decay": 0.0}


class _Mean:
    """The mean of loss and accuracy over batches of different size, without waiting for the device at each."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, values: Tensor, images: int) -> None:
        weighted = values.double() * images
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._count += images

    def values(self) -> tuple[float, float]:
        assert self._sum is not None  # there is at least one image
        loss, accuracy = (self._sum / self._count).tolist()
        return loss, accuracy


def _diverged(epoch: int, options: TrainingOptions) -> BackbonedError:
    return BackbonedError(
        ErrorKind.FAILED_PRECONDITION,
        f"the loss is not finite in epoch {epoch}: training diverged with learning_rate {options.learning_rate:g}; "
        "lower learning_rate, for instance tenfold",
        field="options.learning_rate",
    )
