"""Copies of one head with different weights, run on the same features at once."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from backboned.registry.backbone import Head


class StackedHeads:
    """Runs heads whose parameters are stacked: `[heads, …]` each. For one thread."""

    def __init__(self, stage: Head, module: nn.Module) -> None:
        """`module` is what `stage.forward` runs; its own weights don't matter."""
        self.layer = stage.layer
        self._module = _Runs(stage.forward, module.requires_grad_(False))

    def logits(self, parameters: Mapping[str, Tensor], features: Tensor, *, training: bool = False) -> Tensor:
        """`[n, features, …]` → `[heads, n, outputs]` float32. In training, all heads drop the same features."""
        self._module.train(training)
        named = {f"module.{key}": value for key, value in parameters.items()}

        def run(values: Mapping[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(self._module, dict(values), (features,))
            return output.float()

        stacked: Tensor = vmap(run, randomness="same")(named)
        return stacked

    def reads_first(self, features: Tensor) -> bool:
        """Whether the head's layer reads the features as they come, position by position: then they may be scaled."""
        layer = self._module.module.get_submodule(self.layer)
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or set(layer.padding) != {0}):
            return False
        seen = self._around(features)
        return seen is not None and torch.equal(seen[0], features)

    def is_linear(self, features: Tensor) -> bool:
        """Whether the head is a linear layer and nothing else."""
        layer = self._module.module.get_submodule(self.layer)
        seen = self._around(features)
        if seen is None or features.dim() != 2 or not isinstance(layer, nn.Linear):
            return False
        return self.reads_first(features) and torch.equal(seen[1], seen[2])

    def _around(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What goes into the layer, what comes out of it, and what comes out of the head."""
        seen: list[tuple[Tensor, Tensor]] = []
        layer = self._module.module.get_submodule(self.layer)
        handle = layer.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
        try:
            with torch.no_grad():
                output = self._module.train(False)(features)
        finally:
            handle.remove()
        return (*seen[0], output) if len(seen) == 1 else None


class _Runs(nn.Module):
    """A stage as a module."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        """`[n, …]` → `[n, outputs]`."""
        return self._run(self.module, x)
