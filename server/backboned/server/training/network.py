"""The part of a backbone above the freezing boundary, as modules that train."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backboned.registry.backbone import Backbone, Stage
from backboned.registry.weights import StageWeights
from backboned.server.compute.stages import Templates


@dataclass(frozen=True)
class _Part:
    stage: Stage
    module: nn.Module
    trains: bool


class Network:
    """The stages from the first trainable one to the head. For one thread.

    Stages among them that don't train stay in eval mode, BatchNorm statistics included, and pass gradients on.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    @classmethod
    def build(
        cls, backbone: Backbone, stages: Mapping[str, StageWeights], trainable: Sequence[str], device: torch.device
    ) -> "Network":
        """Copies of the stages above the boundary, on `device`; the head trains always."""
        templates = Templates()
        parts = []
        for stage in backbone.chain[boundary(backbone, trainable) :]:
            tensors = {k: t.to(device, copy=True) for k, t in stages[stage.name].tensors.items()}
            module = templates.fill(backbone, stage, tensors).to(device)
            trains = stage is backbone.head or stage.name in trainable
            parts.append(_Part(stage, module.requires_grad_(trains), trains))
        return cls(parts)

    def __call__(self, x: Tensor) -> Tensor:
        """Activations at the boundary `[n, …]` → float32 logits `[n, outputs]`."""
        for part in self._parts:
            x = part.stage.forward(part.module, x)
        return x.float()

    def train(self, mode: bool = True) -> None:
        """Put what trains into training or eval mode, and the rest into eval mode."""
        for part in self._parts:
            part.module.train(mode and part.trains)

    @property
    def head(self) -> list[nn.Parameter]:
        """What the optimizer changes in the head."""
        return [p for p in self._parts[-1].module.parameters() if p.requires_grad]

    @property
    def body(self) -> list[nn.Parameter]:
        """What the optimizer changes below the head."""
        return [p for part in self._parts[:-1] for p in part.module.parameters() if p.requires_grad]

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Names of the stages that train, with their tensors as they are now."""
        for part in self._parts:
            if part.trains:
                yield part.stage.name, part.module.state_dict()


def boundary(backbone: Backbone, trainable: Sequence[str]) -> int:
    """The index in the chain of the first stage that trains; all before it are frozen for good."""
    return next(i for i, s in enumerate(backbone.chain) if s.name in trainable or s is backbone.head)
