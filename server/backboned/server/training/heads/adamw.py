"""AdamW for many heads at once, each with its own learning rate and weight decay."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class StackedAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over parameters `[heads, …]`. Biases don't decay."""

    def __init__(self, parameters: Mapping[str, Tensor], rates: Tensor, decays: Tensor) -> None:
        """`rates` and `decays` are `[heads]`."""
        self._parameters = dict(parameters)
        self._rates = rates
        self._decays = decays
        self._first = {k: torch.zeros_like(p) for k, p in parameters.items()}
        self._second = {k: torch.zeros_like(p) for k, p in parameters.items()}
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        """Take a step in place, with `factor` times each head's rate."""
        self._steps += 1
        (beta1, beta2), rates = _BETAS, self._rates * factor
        for key, parameter in self._parameters.items():
            gradient, shape = gradients[key], (-1,) + (1,) * (parameter.dim() - 1)
            first = self._first[key].lerp_(gradient, 1 - beta1)
            second = self._second[key].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            if parameter.dim() > 2:
                parameter.mul_(1 - (rates * self._decays).view(shape))
            root = (second / (1 - beta2**self._steps)).sqrt_().add_(_EPSILON)
            parameter.sub_(first / (1 - beta1**self._steps) / root * rates.view(shape))

    def state_dict(self) -> dict[str, Any]:
        """Its state: plain values and tensors."""
        return {"first": self._first, "second": self._second, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for mine, kept in ((self._first, state["first"]), (self._second, state["second"])):
            for key, tensor in mine.items():
                tensor.copy_(kept[key])
        self._steps = state["steps"]
