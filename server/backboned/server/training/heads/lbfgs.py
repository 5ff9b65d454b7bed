"""L-BFGS for many independent problems at once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_HISTORY = 10
_ARMIJO = 1e-4
_HALVINGS = 12
_FLAT = 1e-5
_STALLED = 1e-7

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`[problems, variables]` → the values `[problems]` and the gradients `[problems, variables]`."""


class StackedLBFGS:
    """Limited-memory BFGS (Nocedal 1980; Liu & Nocedal 1989) with backtracking, for smooth convex problems.

    All problems are evaluated together; each has its own history and step. One that has converged stays as it is.
    """

    def __init__(self, evaluate: Evaluate, start: Tensor) -> None:
        """Begin at `start`, `[problems, variables]`."""
        self._evaluate = evaluate
        self.variables = start.clone()
        self._values, self._gradients = evaluate(self.variables)
        self._moves: list[Tensor] = []
        self._changes: list[Tensor] = []
        self.done = self._gradients.abs().amax(1) <= _FLAT
        """Which problems have converged, as far as float32 can tell: `[problems]` bool."""

    def run(self, iterations: int, check: Callable[[], None]) -> None:
        """At most so many iterations more. `check` is called in each; what it raises ends it."""
        for _ in range(iterations):
            check()
            if bool(self.done.all()):
                return
            self._iterate()

    def state_dict(self) -> dict[str, Any]:
        """Its state: tensors."""
        return {
            "variables": self.variables,
            "values": self._values,
            "gradients": self._gradients,
            "moves": self._moves,
            "changes": self._changes,
            "done": self.done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        device = self.variables.device
        self.variables, self._values, self._gradients = (
            state[name].to(device) for name in ("variables", "values", "gradients")
        )
        self._moves, self._changes = ([t.to(device) for t in state[name]] for name in ("moves", "changes"))
        self.done = state["done"].to(device)

    def _iterate(self) -> None:
        direction = self._direction()
        slope = (direction * self._gradients).sum(1)
        direction = torch.where((slope < 0)[:, None], direction, -self._gradients)
        slope = torch.where(slope < 0, slope, -self._gradients.square().sum(1))
        length = torch.ones_like(slope)
        if not self._moves:
            length = (1 / self._gradients.abs().sum(1).clamp_min(_FLAT)).clamp_max(1)
        length = torch.where(self.done, 0, length)
        for _ in range(_HALVINGS):
            tried = self.variables + length[:, None] * direction
            values, gradients = self._evaluate(tried)
            good = values <= self._values + _ARMIJO * length * slope
            if bool((good | (length == 0)).all()):
                break
            length = torch.where(good, length, length / 2)
        moved = (good & (length > 0))[:, None]
        self._remember(
            torch.where(moved, tried - self.variables, 0), torch.where(moved, gradients - self._gradients, 0)
        )
        self.variables = torch.where(moved, tried, self.variables)
        self._gradients = torch.where(moved, gradients, self._gradients)
        gained = self._values - values
        self._values = torch.where(moved[:, 0], values, self._values)
        stalled = ~moved[:, 0] | (gained <= _STALLED * self._values.abs())
        self.done = self.done | stalled | (self._gradients.abs().amax(1) <= _FLAT)

    def _direction(self) -> Tensor:
        """The two-loop recursion, all problems side by side; pairs without positive curvature count for nothing."""
        pairs = []
        for move, change in zip(self._moves, self._changes, strict=True):
            curvature = (move * change).sum(1)
            usable = curvature > 1e-10 * change.square().sum(1).clamp_min(1e-20)
            pairs.append((move, change, torch.where(usable, 1 / curvature.clamp_min(1e-30), 0), usable))
        direction, factors = -self._gradients, []
        for move, change, inverse, _ in reversed(pairs):
            factor = inverse * (move * direction).sum(1)
            factors.append(factor)
            direction = direction - factor[:, None] * change
        if pairs:
            move, change, _, usable = pairs[-1]
            scale = (move * change).sum(1) / change.square().sum(1).clamp_min(1e-30)
            direction = direction * torch.where(usable, scale, 1)[:, None]
        for (move, change, inverse, _), factor in zip(pairs, reversed(factors), strict=True):
            direction = direction + (factor - inverse * (change * direction).sum(1))[:, None] * move
        return direction

    def _remember(self, move: Tensor, change: Tensor) -> None:
        self._moves = [*self._moves, move][-_HISTORY:]
        self._changes = [*self._changes, change][-_HISTORY:]
