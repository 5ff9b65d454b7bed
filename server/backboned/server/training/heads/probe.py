"""Linear heads fitted by L-BFGS, with several penalties and on several folds at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backboned.server.training.heads.lbfgs import StackedLBFGS

ITERATIONS = 10
"""An epoch."""

_MOST_VALUES = 2**27
_MOST_STATE = 2**26


def fits(rows: int, features: int, outputs: int, problems: int) -> bool:
    """Whether probes on so many rows, and as many problems, take a few hundred megabytes at most."""
    variables = (min(rows, features) + 1) * outputs
    return rows * features <= _MOST_VALUES and problems * max(22 * variables, 4 * rows * outputs) <= _MOST_STATE


class Probes:
    """Problems `[problems]`: minimise the mean loss over rows, and a penalty on how far weights are from the start.

    Where there are fewer rows than features, these are turned onto the rows' own span first, which changes no solution.
    """

    def __init__(
        self,
        rows: Tensor,
        weights: Tensor,
        penalties: Tensor,
        start: tuple[Tensor, Tensor],
        losses: Callable[[Tensor], Tensor],
    ) -> None:
        """`rows` `[n, features]`, `weights` of each row `[problems, n]` (they sum to 1), `penalties` `[problems]`.

        `start` is a weight `[outputs, features]` and a bias `[outputs]`; `losses` gives `[problems, n]` for logits
        `[problems, n, outputs]`.
        """
        count, features = rows.shape
        self._basis = torch.linalg.qr(rows.T).Q.T if count < features else None
        self._rows = rows if self._basis is None else rows @ self._basis.T
        self._start = start
        self._offset = rows @ start[0].T + start[1]
        self._weights = weights
        self._penalties = penalties
        self._losses = losses
        self._outputs = len(start[1])
        width = (self._rows.shape[1] + 1) * self._outputs
        self._solver = StackedLBFGS(self._evaluate, torch.zeros(len(penalties), width, device=rows.device))

    def run(self, check: Callable[[], None]) -> None:
        """An epoch: a few iterations, until all have converged."""
        self._solver.run(ITERATIONS, check)

    def heads(self) -> tuple[Tensor, Tensor]:
        """The weights `[problems, outputs, features]` and biases `[problems, outputs]` as they are now."""
        weight, bias = self._parts(self._solver.variables)
        if self._basis is not None:
            weight = weight @ self._basis
        return self._start[0] + weight, self._start[1] + bias

    def state_dict(self) -> dict[str, Any]:
        """Tensors."""
        return self._solver.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._solver.load_state_dict(state)

    def _evaluate(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            variables = variables.detach().requires_grad_()
            weight, bias = self._parts(variables)
            products = self._rows @ weight.flatten(0, 1).T  # one product: a batch of them would copy the rows
            logits = products.unflatten(1, bias.shape).transpose(0, 1) + bias[:, None] + self._offset
            values = (self._losses(logits) * self._weights).sum(1)
            values = values + self._penalties / 2 * weight.square().sum((1, 2))
            (gradients,) = torch.autograd.grad(values.sum(), variables)
        return values.detach(), gradients

    def _parts(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        whole = variables.view(len(variables), self._outputs, -1)
        return whole[..., :-1], whole[..., -1]


def row_weights(kept: Sequence[Tensor], copies: int, views: int) -> Tensor:
    """What a row weighs in some sets of images, `[n]` bool each, and copies of them: `[sets × copies, n × views]`."""
    share = torch.stack([k.float() / k.sum() for k in kept]).repeat_interleave(views, 1) / views
    return share.repeat_interleave(copies, 0)
