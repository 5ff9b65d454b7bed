"""The part of a backbone above the freezing boundary, as modules that train."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backboned.registry.backbone import Backbone, Stage
from backboned.registry.weights import StageWeights
from backboned.server.compute.stages import Templates

_MOST_WEIGHTS = 2**25


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
        return self.logits(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Activations at the boundary `[n, …]` → float32 features that the head reads, `[n, feature_size, …]`."""
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        for part in self._parts[:-1]:
            x = part.stage.forward(part.module, x)
        return x.float()

    def logits(self, features: Tensor) -> Tensor:
        """What the head reads `[n, feature_size, …]` → float32 logits `[n, outputs]`."""
        head = self._parts[-1]
        with torch.autocast(features.device.type, enabled=False):
            return head.stage.forward(head.module, features).float()

    def train(self, mode: bool = True) -> None:
        """Put what trains into training or eval mode, and the rest into eval mode; BatchNorm stays in eval mode always.

        Its pretrained statistics are better than those of small batches, and the head was fitted on what they make.
        """
        for part in self._parts:
            part.module.train(mode and part.trains)
            for module in part.module.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    @property
    def trainable_stages(self) -> tuple[str, ...]:
        """Names of the stages that train besides the head."""
        return tuple(part.stage.name for part in self._parts[:-1] if part.trains)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return [parameter for stage in self.by_stage() for parameter in stage]

    def by_stage(self) -> list[list[nn.Parameter]]:
        """What the optimizer changes in each stage that trains, the head first and the deepest stage last."""
        return [
            [p for p in part.module.parameters() if p.requires_grad] for part in reversed(self._parts) if part.trains
        ]

    def trained(self) -> dict[str, Tensor]:
        """All tensors of the stages that train, by key, as they are: written to, they change the network."""
        return {k: t for part in self._parts if part.trains for k, t in part.module.state_dict().items()}

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Names of the stages that train, with their tensors as they are now."""
        for part in self._parts:
            if part.trains:
                yield part.stage.name, part.module.state_dict()


def last_stages(backbone: Backbone, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The stages to unfreeze first: from the end down, until they have half of the backbone's weights.

    `sizes` are the numbers of weights of the stages below the head. Stops before a stage that would bring more than 32
    million weights to train, as VGG's first linear layer.
    """
    chosen: list[str] = []
    total, taken = sum(sizes[name] for name in backbone.stage_names), 0
    for name in reversed(backbone.stage_names):
        if 2 * taken >= total or (chosen and taken + sizes[name] > _MOST_WEIGHTS):
            break
        if sizes[name]:
            chosen.append(name)
            taken += sizes[name]
    return tuple(reversed(chosen))


def boundary(backbone: Backbone, trainable: Sequence[str]) -> int:
    """The index in the chain of the first stage that trains; all before it are frozen for good."""
    return next(i for i, s in enumerate(backbone.chain) if s.name in trainable or s is backbone.head)
