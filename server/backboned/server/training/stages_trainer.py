"""Stages and the head together, from the freezing boundary up."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from backboned.server.training.epochs import Progress, Trained, diverged, schedule
from backboned.server.training.events import EpochDone
from backboned.server.training.network import Network
from backboned.server.training.objective import Objective
from backboned.server.training.options import TrainingOptions
from backboned.server.training.precision import Precision
from backboned.server.training.splits import Split
from backboned.server.training.temperature import calibrated_losses

DEEPER = 0.8
"""A stage learns so much slower than the one above it (Howard & Ruder 2018, arXiv:1801.06146)."""

_LARGEST_EMA = 0.999
_SMALLEST_EMA = 0.9
_NO_MEMORY = ("can't allocate memory", "not enough memory")

log = logging.getLogger(__name__)
Check = Callable[[], None]


class StagesTrainer:
    """Trains a network. Equal seeds give equal bits on the CPU in fp32.

    The weights that are validated and served are a moving average of those that learn. For one thread; seeds torch's
    generators, which dropout draws from, so it wants a process of its own.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        options: TrainingOptions,
        train: Split,
        validation: Split,
        *,
        precision: Precision,
        head_factor: float = 1.0,
    ) -> None:
        """`options` are validated ones. The head learns `head_factor` times as fast as the last stage."""
        self._network = network
        self._objective = objective
        self._options = options
        self._train, self._validation = train, validation
        self._precision = precision
        self._head_factor = head_factor
        self._optimizer = torch.optim.AdamW(self._groups(), weight_decay=options.weight_decay or 0.0)
        self._average = {k: t.detach().clone() for k, t in network.trained().items()}
        self._batches = math.ceil(len(train) / options.batch_size)
        self._steps = 0
        self._pieces = 1
        torch.manual_seed(options.seed)
        self._order = torch.Generator().manual_seed(options.seed)
        self._progress = Progress()

    def state_dict(self) -> dict[str, Any]:
        """All that the epochs to come depend on: plain values and tensors."""
        return {
            "progress": self._progress.state_dict(),
            "network": {k: t.detach() for k, t in self._network.trained().items()},
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "steps": self._steps,
            "pieces": self._pieces,
            "order": self._order.get_state(),
            "random": torch.get_rng_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._progress.load_state_dict(state["progress"])
        for mine, kept in ((self._network.trained(), state["network"]), (self._average, state["average"])):
            for key, tensor in mine.items():
                tensor.copy_(kept[key])
        self._optimizer.load_state_dict(state["optimizer"])
        self._steps, self._pieces = state["steps"], state["pieces"]
        self._order.set_state(state["order"])
        torch.set_rng_state(state["random"])

    def epochs(self, check: Check) -> Iterator[Trained]:
        """Train, and yield after each epoch, until the last one or until `patience` epochs brought nothing better.

        `check` is called after every batch; what it raises ends the training. Out of memory, batches are computed in
        pieces, with the same result. Raises `BackbonedError` `FAILED_PRECONDITION` if a loss isn't finite.
        """
        while not self._progress.ended(self._options.max_epochs, self._options.patience):
            yield self._epoch(check)

    def _epoch(self, check: Check) -> Trained:
        start = time.monotonic()
        train_loss, train_accuracy = self._pass(check)
        seconds = time.monotonic() - start
        with self._averaged():
            logits = self._logits(check)
            stages = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in self._network.tensors()}
        target = self._validation.targets
        val_loss = float(calibrated_losses(self._objective, logits[None], target))
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise diverged(self._progress.epoch + 1, self._options.learning_rate)
        right = self._objective.rights(logits, target)
        best = self._progress.step(val_loss)
        done = EpochDone(
            epoch=self._progress.epoch,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            val_loss=val_loss,
            val_accuracy=float(right.mean()),
            learning_rate=float(self._optimizer.param_groups[0]["lr"]),
            images_per_second=len(self._train) / max(seconds, 1e-9),
            best=best,
            trainable_stages=self._network.trainable_stages,
        )
        return Trained(done, stages, self._optimizer.state_dict(), right.cpu())

    def _pass(self, check: Check) -> tuple[float, float]:
        self._network.train()
        order = torch.randperm(len(self._train), generator=self._order)
        views = torch.randint(self._train.views, (len(order),), generator=self._order)
        sums = torch.zeros(2, dtype=torch.float64)
        for chosen, view in zip(order.tensor_split(self._batches), views.tensor_split(self._batches), strict=True):
            factor = schedule(self._steps, self._batches * self._options.max_epochs)
            for group in self._optimizer.param_groups:
                group["lr"] = group["full_rate"] * factor
            sums += self._gradients(chosen, view)
            if self._options.max_gradient_norm:
                torch.nn.utils.clip_grad_norm_(self._network.parameters, self._options.max_gradient_norm)
            self._optimizer.step()
            self._steps += 1
            self._follow()
            check()
        loss, accuracy = (sums / len(order)).tolist()
        return loss, accuracy

    def _gradients(self, chosen: Tensor, view: Tensor) -> Tensor:
        """The gradients of a batch, and the sums of its losses and right answers. In pieces, where memory is short."""
        while True:
            try:
                self._optimizer.zero_grad()
                sums = torch.zeros(2, dtype=torch.float64)
                pieces = min(self._pieces, len(chosen))
                for part, its_view in zip(chosen.tensor_split(pieces), view.tensor_split(pieces), strict=True):
                    sums += self._backward(part, its_view, share=len(part) / len(chosen))
                return sums
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self._pieces >= len(chosen):
                    raise
                self._pieces *= 2
                log.warning("out of memory: batches of %d go on in %d pieces", len(chosen), self._pieces)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _backward(self, chosen: Tensor, view: Tensor, share: float) -> Tensor:
        target = self._train.targets[chosen.to(self._train.targets.device)]
        with self._precision():
            logits = self._network(self._train.inputs(chosen, view))
        (self._objective(logits, target, smoothing=self._options.label_smoothing) * share).backward()
        with torch.no_grad():
            losses = self._objective.losses(logits[None], target)
            return torch.stack([losses.sum(), self._objective.rights(logits, target).sum()]).cpu().double()

    @torch.no_grad()
    def _logits(self, check: Check) -> Tensor:
        self._network.train(False)
        parts = []
        for chosen in self._validation.batches(self._options.batch_size):
            with self._precision():
                parts.append(self._network(self._validation.served(chosen)))
            check()
        return torch.cat(parts)

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the average follow what has been learned: over an epoch or so, and faster at the beginning."""
        decay = self._options.ema_decay
        if decay is None:
            decay = min(max(1 - 1 / max(self._batches, 1), _SMALLEST_EMA), _LARGEST_EMA)
        decay = min(decay, (1 + self._steps) / (10 + self._steps))
        for key, tensor in self._network.trained().items():
            if tensor.is_floating_point():
                self._average[key].lerp_(tensor, 1 - decay)
            else:
                self._average[key].copy_(tensor)

    def _averaged(self) -> "_Swapped":
        return _Swapped(self._network, self._average)

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups, the head's first: biases and norms don't decay, deeper stages learn slower."""
        assert self._options.learning_rate is not None
        groups: list[dict[str, Any]] = []
        for depth, parameters in enumerate(self._network.by_stage()):
            rate = self._options.learning_rate * (DEEPER ** (depth - 1) if depth else self._head_factor)
            matrices = [p for p in parameters if p.dim() > 1]
            vectors = [p for p in parameters if p.dim() <= 1]
            for members, decays in ((matrices, {}), (vectors, {"weight_decay": 0.0})):
                if members:
                    groups.append({"params": members, "lr": rate, "full_rate": rate, **decays})
        return groups


class _Swapped:
    """The network with other weights, while it lasts."""

    def __init__(self, network: Network, weights: Mapping[str, Tensor]) -> None:
        self._network = network
        self._weights = weights
        self._own: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        for key, tensor in self._network.trained().items():
            self._own[key] = tensor.detach().clone()
            tensor.copy_(self._weights[key])

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for key, tensor in self._network.trained().items():
            tensor.copy_(self._own[key])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _NO_MEMORY)
