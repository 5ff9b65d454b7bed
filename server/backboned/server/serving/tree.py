"""One batch through the tree of loaded models.

Models are paths of stages that branch where their weights differ. Images of a batch ride together as long as their
stages are one object, and part where they are not. An image that several models look at runs once through what they
share.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backboned.server.compute.stages import LoadedStage, run_path


class Leg(NamedTuple):
    """A row of the batch on its way through one model; `tap`: the place in `path` whose pooled output is wanted."""

    row: int
    path: Sequence[LoadedStage]
    tap: int | None = None


class Answer(NamedTuple):
    """What a leg ends with: logits `[outputs]`, and the pooled output `[features]` at its tap, if it has one."""

    logits: Tensor
    embedding: Tensor | None = None


def run_tree(legs: Sequence[Leg], x: Tensor) -> list[Answer | Exception]:
    """Each leg's row of `x` `[batch, 3, h, w]` through its path. Paths have one length: that of a backbone.

    A stage that fails costs the legs that run through it their answer, and no others. What is float16 or bfloat16 comes
    back as float32.
    """
    walk = _Walk(legs)
    walk.step(0, {i: leg.row for i, leg in enumerate(legs)}, x)
    return walk.answers


class _Walk:
    def __init__(self, legs: Sequence[Leg]) -> None:
        self._legs = legs
        self._embeddings: dict[int, Tensor] = {}
        self.answers: list[Answer | Exception] = [RuntimeError("not run")] * len(legs)

    def step(self, depth: int, rows: Mapping[int, int], x: Tensor) -> None:
        """Take the legs in `rows` on from `depth`; `rows` tells for each which row of `x` it is at."""
        for members in self._branches(depth, rows):
            wanted = sorted({rows[member] for member in members})
            part = x if len(wanted) == len(x) else x[torch.tensor(wanted, device=x.device)]
            end = self._together(depth, members)
            path = self._legs[members[0]].path
            try:
                y = run_path(path[depth:end], part)
            except Exception as error:  # out of memory, or a plugin's code
                for member in members:
                    self.answers[member] = error
                continue
            place = {row: i for i, row in enumerate(wanted)}
            moved = {member: place[rows[member]] for member in members}
            self._tap(end - 1, moved, y)
            if end < len(path):
                self.step(end, moved, y)
            else:
                self._end(moved, y)

    def _branches(self, depth: int, rows: Mapping[int, int]) -> Iterable[list[int]]:
        """Which legs go on together."""
        groups: dict[int, list[int]] = {}
        for leg in rows:
            groups.setdefault(id(self._legs[leg].path[depth]), []).append(leg)
        return groups.values()

    def _together(self, depth: int, members: Sequence[int]) -> int:
        """Where legs that share the stage at `depth` part, or one of them is tapped."""
        first, *others = (self._legs[member] for member in members)
        taps = {leg.tap for leg in (first, *others)}
        end = depth + 1
        while end < len(first.path) and end - 1 not in taps:
            if any(leg.path[end] is not first.path[end] for leg in others):
                break
            end += 1
        return end

    def _tap(self, depth: int, rows: Mapping[int, int], y: Tensor) -> None:
        tapped = [leg for leg in rows if self._legs[leg].tap == depth]
        if tapped:
            pooled = pool(y)
            self._embeddings.update((leg, pooled[rows[leg]]) for leg in tapped)

    def _end(self, rows: Mapping[int, int], y: Tensor) -> None:
        logits = y.float().unbind()
        for leg, row in rows.items():
            self.answers[leg] = Answer(logits[row], self._embeddings.get(leg))


def pool(x: Tensor) -> Tensor:
    """A stage's output averaged over positions, in float32: `[n, c, h, w]` → `[n, c]`, `[n, tokens, d]` → `[n, d]`.

    Vectors `[n, d]` are left as they are.
    """
    x = x.float()
    return x.mean(dim=1) if x.dim() == 3 else x.flatten(2).mean(dim=2) if x.dim() > 3 else x
