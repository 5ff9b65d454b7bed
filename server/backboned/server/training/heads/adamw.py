"""AdamW for many heads at once, each with its own learning rate and weight decay."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class StackedAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over parameters `[heads, …]`. Biases don't decay.

    It is torch's own, in its fused form: a step goes once through memory. Heads of one rate and decay are one group.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rates: Tensor, decays: Tensor) -> None:
        """`rates` and `decays` are `[heads]`; the parameters are changed in place."""
        groups: dict[tuple[float, float], list[tuple[str, int]]] = {}
        for head, (rate, decay) in enumerate(zip(rates.tolist(), decays.tolist(), strict=True)):
            for key, parameter in parameters.items():
                groups.setdefault((rate, decay if parameter.dim() > 2 else 0.0), []).append((key, head))
        whole = {key: parameter.detach() for key, parameter in parameters.items()}
        self._members = list(groups.values())
        self._rates = [rate for rate, _ in groups]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [whole[key][head] for key, head in members], "lr": rate, "weight_decay": decay}
                for (rate, decay), members in groups.items()
            ],
            fused=True,
        )

    def step(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        """Take a step in place, with `factor` times each head's rate."""
        for group, members, rate in zip(self._optimizer.param_groups, self._members, self._rates, strict=True):
            group["lr"] = rate * factor
            for parameter, (key, head) in zip(group["params"], members, strict=True):
                parameter.grad = gradients[key][head]
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Its state: plain values and tensors."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._optimizer.load_state_dict(dict(state))
