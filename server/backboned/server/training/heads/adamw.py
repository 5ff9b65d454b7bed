"""AdamW for many heads at once, each with its own learning rate and weight decay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BETAS = (0.9, 0.999)
_EPS = 1e-8


@dataclass
class _Group:
    """Heads of one rate and decay: which parameter of which head each member is, and its moments."""

    rate: float
    decay: float
    members: list[tuple[str, int]]
    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]


class StackedAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over parameters `[heads, …]`. Biases don't decay.

    A step is torch's fused kernel, which goes once through memory. It is called here without `torch.optim`, whose first
    use imports torch's compiler: that takes longer than many a job.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rates: Tensor, decays: Tensor) -> None:
        """`rates` and `decays` are `[heads]`; the parameters are changed in place."""
        members: dict[tuple[float, float], list[tuple[str, int]]] = {}
        for head, (rate, decay) in enumerate(zip(rates.tolist(), decays.tolist(), strict=True)):
            for key, parameter in parameters.items():
                members.setdefault((rate, decay if parameter.dim() > 2 else 0.0), []).append((key, head))
        whole = {key: parameter.detach() for key, parameter in parameters.items()}
        self._groups = []
        for (rate, decay), places in members.items():
            own = [whole[key][head] for key, head in places]
            means, squares = ([torch.zeros_like(p) for p in own] for _ in range(2))
            steps = [torch.zeros((), device=p.device) for p in own]
            self._groups.append(_Group(rate, decay, places, own, means, squares, steps))

    def step(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        """Take a step in place, with `factor` times each head's rate."""
        for group in self._groups:
            torch._foreach_add_(group.steps, 1)
            torch._fused_adamw_(
                group.parameters,
                [gradients[key][head] for key, head in group.members],
                group.means,
                group.squares,
                [],
                group.steps,
                lr=group.rate * factor,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                weight_decay=group.decay,
                eps=_EPS,
                amsgrad=False,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """Its state: lists of tensors."""
        return {"groups": [[group.means, group.squares, group.steps] for group in self._groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for group, kept in zip(self._groups, state["groups"], strict=True):
            for own, values in zip((group.means, group.squares, group.steps), kept, strict=True):
                for tensor, value in zip(own, values, strict=True):
                    tensor.copy_(value)
