"""What torchvision's classification models have in common: builder, weights, preprocessing and class names by name."""

from functools import partial

import torch
from torch import Tensor
from torchvision.models import get_model, get_model_weights

from backboned.registry import Backbone, Head, Preprocessing, Stage


def torchvision_backbone(name: str, stages: tuple[Stage, ...], head: Head, feature_size: int) -> Backbone:
    """The `Backbone` over torchvision's model `name`, with its first ImageNet-1K weights.

    Of several sets of weights the first (`IMAGENET1K_V1`) is taken. Later recipes train with label smoothing, which
    raises ImageNet accuracy and makes features transfer worse to a linear head (Kornblith et al. 2021, "Why do better
    loss functions lead to less transferable features?", arXiv:2010.16402).
    """
    weights = get_model_weights(name)["IMAGENET1K_V1"]
    millions = weights.meta["num_params"] / 1e6
    top1 = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    return Backbone(
        name=name,
        build=partial(get_model, name),
        stages=stages,
        head=head,
        feature_size=feature_size,
        preprocessing=Preprocessing.from_torchvision(weights.transforms()),
        weights=weights,
        description=f"torchvision's {name}: {millions:.1f} M parameters, {top1:.1f} % top-1 on ImageNet-1K",
        known_classes=tuple(weights.meta["categories"]),
    )


def numbered(path: str, first: int, last: int) -> tuple[str, ...]:
    """Paths of the children `first`…`last`, both included, of the `Sequential` at `path`."""
    return tuple(f"{path}.{i}" for i in range(first, last + 1))


def flatten(x: Tensor) -> Tensor:
    """`[batch, …]` → `[batch, features]`."""
    return torch.flatten(x, 1)


def average_pool(x: Tensor) -> Tensor:
    """`[batch, channels, height, width]` → `[batch, channels]`, as torchvision's models do without a module."""
    return flatten(torch.nn.functional.adaptive_avg_pool2d(x, (1, 1)))
