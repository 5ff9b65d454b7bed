"""A plain PyTorch training loop, as a tutorial would write it: what the demo pretrains with, and compares with."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backboned.registry import Backbone
from backboned.server.commands.demo.digits import Images

ORIENTATIONS = 8
"""Of a square: turned by 0, 90, 180 and 270 degrees, as it is and mirrored."""


@dataclass(frozen=True)
class Budget:
    """What every competitor may spend."""

    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Curve:
    """How a training went: figures of each epoch, the seconds of training, and the answers of the best epoch."""

    val_loss: list[float]
    val_accuracy: list[float]
    seconds: float
    held_out_accuracy: float

    @property
    def best_val_loss(self) -> float:
        """By which the best epoch is chosen."""
        return min(self.val_loss)


def pretrain(backbone: Backbone, images: Images, epochs: int, seed: int) -> dict[str, Tensor]:
    """Train a whole new network to tell digits apart, each in 8 orientations that count as classes of their own.

    Five digits alone would teach it little more than five features; telling orientations too makes features that are
    good for more (after Gidaris et al. 2018, arXiv:1803.07728). Images are bent a little, differently in each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    classes = int(images.labels.max()) + 1
    model = backbone.module(classes * ORIENTATIONS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    batch_size = 32
    steps = epochs * -(-len(images.labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images.labels), generator=generator).split(batch_size):
            orientations = torch.randint(0, ORIENTATIONS, (len(batch),), generator=generator)
            pixels = _turn(_bend(images.pixels[batch], generator), orientations)
            targets = images.labels[batch] * ORIENTATIONS + orientations
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels), targets).backward()
            optimizer.step()
            schedule.step()
    return model.eval().state_dict()


def train_from_scratch(
    backbone: Backbone, train: Images, val: Images, held_out: Images, budget: Budget, *, learning_rate: float, seed: int
) -> Curve:
    """Train the same network from random weights on the same images, by the daemon's rules, and keep its best epoch."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = backbone.module(int(train.labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    steps = budget.epochs * -(-len(train.labels) // budget.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    accuracies: list[float] = []
    best: dict[str, Tensor] = {}
    start = time.perf_counter()
    for _ in range(budget.epochs):
        model.train()
        for batch in torch.randperm(len(train.labels), generator=generator).split(budget.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train.pixels[batch]), train.labels[batch]).backward()
            optimizer.step()
            schedule.step()
        loss, accuracy = _evaluate(model, val)
        if loss < min(losses, default=float("inf")):
            best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        losses.append(loss)
        accuracies.append(accuracy)
    seconds = time.perf_counter() - start
    model.load_state_dict(best)
    return Curve(losses, accuracies, seconds, _evaluate(model, held_out)[1])


@torch.no_grad()
def _evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = model.eval()(images.pixels)
    correct = logits.argmax(1) == images.labels
    return nn.functional.cross_entropy(logits, images.labels).item(), correct.float().mean().item()


def _turn(pixels: Tensor, orientations: Tensor) -> Tensor:
    turned = torch.empty_like(pixels)
    for orientation in range(ORIENTATIONS):
        chosen = orientations == orientation
        part = torch.rot90(pixels[chosen], orientation % 4, (-2, -1))
        turned[chosen] = part.flip(-1) if orientation >= ORIENTATIONS // 2 else part
    return turned


def _bend(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 14 degrees, scale by 15 %, shear by 0.2 and shift by 15 % of the side."""
    count = len(pixels)

    def within(limit: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * limit

    angle, scale = within(0.25), 1 + within(0.15)
    grid = torch.empty(count, 2, 3)
    grid[:, 0, 0] = angle.cos() * scale
    grid[:, 0, 1] = -angle.sin() + within(0.2)
    grid[:, 1, 0] = angle.sin()
    grid[:, 1, 1] = angle.cos() * scale
    grid[:, :, 2] = within(0.15, 2)
    grid = nn.functional.affine_grid(grid, list(pixels.shape), align_corners=False)
    return nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
