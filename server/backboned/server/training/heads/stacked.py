"""Copies of one head with different weights, run on the same features at once."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from backboned.registry.backbone import Head


class StackedHeads:
    """Runs heads whose parameters are stacked: `[heads, …]` each. For one thread."""

    def __init__(self, stage: Head, module: nn.Module, sample: Tensor) -> None:
        """`module` is what `stage.forward` runs; its own weights don't matter. `sample` are features of some images."""
        self.layer = stage.layer
        self._module = _Runs(stage.forward, module.requires_grad_(False))
        self.reads_first = self._reads_first(sample)
        """Whether the head's layer reads the features as they come, position by position: then they may be scaled."""
        self.is_linear = self.reads_first and self._is_linear(sample)
        """Whether the head is a linear layer and nothing else; it may drop features in training."""

    def logits(self, parameters: Mapping[str, Tensor], features: Tensor, *, training: bool = False) -> Tensor:
        """`[n, features, …]` → `[heads, n, outputs]` float32. In training, all heads drop the same features."""
        self._module.train(training)
        if self.is_linear:  # one product for all of them: a product for each, as by `vmap`, takes twice as long
            given, _, _ = self._around(features)
            weight = parameters[f"{self.layer}.weight"]
            products: Tensor = (given @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]).transpose(0, 1)
            bias = parameters.get(f"{self.layer}.bias")
            return products if bias is None else products + bias[:, None]
        named = {f"module.{key}": value for key, value in parameters.items()}

        def run(values: Mapping[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(self._module, dict(values), (features,))
            return output.float()

        stacked: Tensor = vmap(run, randomness="same")(named)
        return stacked

    def _reads_first(self, features: Tensor) -> bool:
        layer = self._module.module.get_submodule(self.layer)
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or set(layer.padding) != {0}):
            return False
        self._module.train(False)
        try:
            given, _, _ = self._around(features)
        except _NotOnce:
            return False
        return torch.equal(given, features)

    def _is_linear(self, features: Tensor) -> bool:
        if features.dim() != 2 or not isinstance(self._module.module.get_submodule(self.layer), nn.Linear):
            return False
        for training in (False, True):  # where nothing happens behind the layer in either
            self._module.train(training)
            _, made, output = self._around(features)
            if not torch.equal(made, output):
                return False
        return True

    def _around(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What goes into the layer, what comes out of it, and what comes out of the head. Raises `_NotOnce`."""
        seen: list[tuple[Tensor, Tensor]] = []
        layer = self._module.module.get_submodule(self.layer)
        handle = layer.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
        try:
            with torch.no_grad():
                output = self._module(features)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise _NotOnce
        return (*seen[0], output)


class _NotOnce(Exception):
    """The head doesn't call its layer, or does so more than once."""


class _Runs(nn.Module):
    """A stage as a module."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        """`[n, …]` → `[n, outputs]`."""
        return self._run(self.module, x)
