"""Standardised features, and heads that are folded back so that they read plain ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FINEST = 2**-8
"""Of the mean: differences that bfloat16 can't tell are not magnified."""


@dataclass(frozen=True)
class Standard:
    """The mean and the deviation of each feature, `[features]`, over images, views and positions."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def none(cls, features: int, device: torch.device) -> "Standard":
        """Leaves features as they are."""
        return cls(torch.zeros(features, device=device), torch.ones(features, device=device))

    @classmethod
    def over(cls, batches: Iterable[Tensor]) -> "Standard":
        """Of batches `[n, features, …]`, summed in float64.

        A deviation is a 256th of the mean at least, and 1 for a feature that is zero always.
        """
        count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for batch in batches:
            values = batch.transpose(0, 1).flatten(1).double()
            count += values.shape[1]
            total, squares = total.to(values) + values.sum(1), squares.to(values) + values.square().sum(1)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        deviation = torch.maximum(deviation, mean.abs() * _FINEST)
        deviation = torch.where(deviation > 0, deviation, 1.0)
        return cls(mean.float(), deviation.float())

    def __call__(self, features: Tensor) -> Tensor:
        """`[n, features, …]` → the same, less the mean and over the deviation."""
        shape = (1, -1) + (1,) * (features.dim() - 2)
        return (features - self.mean.view(shape)) / self.deviation.view(shape)

    def fold(self, tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
        """A head's tensors that give on plain features what `tensors` give on standardised ones.

        `layer` is the linear layer, or the convolution over single positions, that reads the features first.
        """
        weight = tensors[f"{layer}.weight"]
        scaled = weight / self.deviation.view((1, -1) + (1,) * (weight.dim() - 2))
        moved = (scaled.flatten(2).sum(2) if weight.dim() > 2 else scaled) @ self.mean
        return {**tensors, f"{layer}.weight": scaled, f"{layer}.bias": tensors[f"{layer}.bias"] - moved}

    def unfold(self, tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
        """The inverse of `fold`."""
        weight = tensors[f"{layer}.weight"]
        scaled = weight * self.deviation.view((1, -1) + (1,) * (weight.dim() - 2))
        moved = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ self.mean
        return {**tensors, f"{layer}.weight": scaled, f"{layer}.bias": tensors[f"{layer}.bias"] + moved}
