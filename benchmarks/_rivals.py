"""The loops that FineTune is compared with, each in a process of its own: `tutorial` and `good`.

`tutorial` is the transfer-learning tutorial of PyTorch with its own numbers: fp32, the whole network in each epoch, SGD
with a rate of 0.001 and momentum 0.9 in batches of 4, a tenth of the rate every 7 epochs. `good` is what one writes who
knows PyTorch: the frozen part in eval mode without gradients, in bf16 by autocast, channels last, batches of 32,
workers that stay, AdamW with a cosine. Both decode in workers, augment by random crops and flips, and validate after
each epoch.

Their time begins when torch is imported and the network is built.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from backboned.registry import Catalogue
from backboned.registry.backbone import Backbone, Preprocessing
from backboned.server.compute.device import Device
from benchmarks._processes import answer_questions

_WORKERS = min(4, len(os.sched_getaffinity(0)))
_Batches = DataLoader[tuple[Tensor, Tensor]]


class Loop(Protocol):
    """What the two loops differ in."""

    batch_size: int
    keeps_workers: bool

    def train(self, x: Tensor, y: Tensor) -> None:
        """One step."""

    def logits(self, x: Tensor) -> Tensor:
        """What the network answers to images that validate."""

    def end_epoch(self) -> None:
        """Set the next epoch's rate."""


class Tutorial:
    """As the tutorial writes it."""

    batch_size = 4
    keeps_workers = False

    def __init__(self, backbone: Backbone, network: nn.Module, epochs: int) -> None:
        del epochs
        self._network = network
        head = network.get_submodule(backbone.head.layer)
        self._optimizer = torch.optim.SGD(head.parameters(), lr=0.001, momentum=0.9)
        self._scheduler = StepLR(self._optimizer, step_size=7, gamma=0.1)
        self._criterion = nn.CrossEntropyLoss()

    def train(self, x: Tensor, y: Tensor) -> None:
        """One step, with all of the network in training mode."""
        self._network.train()
        self._optimizer.zero_grad()
        self._criterion(self._network(x), y).backward()
        self._optimizer.step()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The network in eval mode."""
        self._network.eval()
        logits: Tensor = self._network(x)
        return logits

    def end_epoch(self) -> None:
        """A tenth of the rate every 7 epochs."""
        self._scheduler.step()


class Good:
    """As one writes it who knows PyTorch."""

    batch_size = 32
    keeps_workers = True

    def __init__(self, backbone: Backbone, network: nn.Module, epochs: int) -> None:
        self._backbone = backbone
        self._network = network.eval().to(memory_format=torch.channels_last)
        head = network.get_submodule(backbone.head.layer)
        self._optimizer = torch.optim.AdamW(head.parameters(), lr=0.003)
        self._scheduler = CosineAnnealingLR(self._optimizer, epochs)
        self._criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self._low = Device.choose("cpu").dtype  # bf16 where the CPU computes in it

    def train(self, x: Tensor, y: Tensor) -> None:
        """One step of the head."""
        features = self._features(x)
        self._optimizer.zero_grad()
        self._criterion(self._head(features), y).backward()
        self._optimizer.step()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The network, which is in eval mode always."""
        return self._head(self._features(x))

    def end_epoch(self) -> None:
        """Along a cosine to zero."""
        self._scheduler.step()

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._low == torch.bfloat16):
            for stage in self._backbone.stages:
                x = stage.forward(self._network, x)
        return x.float()

    def _head(self, features: Tensor) -> Tensor:
        return self._backbone.head.forward(self._network, features)


class _OutOfTime(Exception):
    """The loop was to be timed for so long and no longer."""


class Clock:
    """Counts images, and ends the loop when its time is over."""

    def __init__(self, limit_seconds: float) -> None:
        """0 sets no limit."""
        self._limit = limit_seconds or float("inf")
        self.start = time.monotonic()
        self._first = 0.0
        self._first_images = 0
        self.images = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def tick(self, images: int) -> None:
        """So many more images are done. Raises `_OutOfTime`, but not before there is a rate."""
        self.images += images
        if not self._first_images:
            self._first, self._first_images = self.seconds, self.images
        elif self.seconds > self._limit:
            raise _OutOfTime

    def scaled(self, total: int) -> float:
        """Seconds for `total` images at the rate of those seen, without the first batch, which starts the workers."""
        return total * (self.seconds - self._first) / (self.images - self._first_images)


def run(question: Mapping[str, Any]) -> dict[str, Any]:
    """Train as asked: see `benchmarks._speed`."""
    torch.manual_seed(0)
    backbone = Catalogue.from_entry_points().get(question["backbone"])
    folder, epochs = Path(question["dataset"]), int(question["epochs"])
    network = _network(backbone, Path(question["weights"]), len(ImageFolder(folder / "train").classes))
    kinds: dict[str, Callable[[Backbone, nn.Module, int], Loop]] = {"tutorial": Tutorial, "good": Good}
    loop = kinds[question["kind"]](backbone, network, epochs)
    clock, told = Clock(question["seconds"]), []
    batches = {
        part: _batches(folder / part, backbone.preprocessing, loop, part == "train") for part in ("train", "val")
    }
    total = epochs * sum(len(ImageFolder(folder / part)) for part in batches)
    best, best_state, whole = -1.0, {}, True
    try:
        for epoch in range(1, epochs + 1):
            for x, y in batches["train"]:
                loop.train(x, y)
                clock.tick(len(y))
            accuracy = _accuracy(loop, batches["val"], clock)
            loop.end_epoch()
            told.append({"epoch": epoch, "seconds": clock.seconds, "val_accuracy": accuracy})
            if accuracy > best:
                best, best_state = accuracy, _trained(network)
    except _OutOfTime:
        whole = False
    seconds = clock.seconds if whole else clock.scaled(total)
    answer = {"seconds": seconds, "whole": whole, "images": clock.images, "all_images": total, "epochs": told}
    if best_state and question.get("judge"):
        network.load_state_dict(best_state, strict=False)
        batches["judge"] = _batches(Path(question["judge"]), backbone.preprocessing, loop, training=False)
        answer["judged"] = _accuracy(loop, batches["judge"], Clock(0))
    return answer


def _accuracy(loop: Loop, batches: _Batches, clock: Clock) -> float:
    right = seen = 0
    for x, y in batches:
        right += int((loop.logits(x).argmax(1) == y).sum())
        seen += len(y)
        clock.tick(len(y))
    return right / seen


def _network(backbone: Backbone, weights: Path, classes: int) -> nn.Module:
    """Torchvision's network, frozen, with a new last layer that learns."""
    network = backbone.module()
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.requires_grad_(False)
    name = backbone.head.layer
    parent, _, attribute = name.rpartition(".")
    old = network.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, kernel_size=1)
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, classes)
    setattr(network.get_submodule(parent), attribute, new)
    return network


def _trained(network: nn.Module) -> dict[str, Tensor]:
    """A copy of what training changes: what has gradients, and the statistics of BatchNorm."""
    changed = {n: p for n, p in network.named_parameters() if p.requires_grad} | dict(network.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in changed.items()}


def _batches(folder: Path, settings: Preprocessing, loop: Loop, training: bool) -> _Batches:
    normalised = [transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)]
    if training:
        steps = [transforms.RandomResizedCrop(settings.crop_size), transforms.RandomHorizontalFlip(), *normalised]
    else:
        steps = [transforms.Resize(settings.resize_size), transforms.CenterCrop(settings.crop_size), *normalised]
    return DataLoader(
        ImageFolder(folder, transforms.Compose(steps)),
        loop.batch_size,
        shuffle=training,
        num_workers=_WORKERS,
        persistent_workers=loop.keeps_workers,
    )


if __name__ == "__main__":
    answer_questions(run)
