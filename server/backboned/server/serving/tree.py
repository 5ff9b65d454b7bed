"""One batch through the tree of loaded models.

Models are paths of stages that branch where their weights differ. Images of a batch ride together as long as their
stages are one object, and part where they are not. An image that several models look at runs once through what they
share.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.registry.answers import Answers
from backboned.server.compute.stages import LoadedStage, run_path


class Leg(NamedTuple):
    """A row of the batch on its way through one model; `tap`: the place in `path` whose pooled output is wanted.

    `answers` measure how far from all that trained lie the features that the head reads.
    """

    row: int
    path: Sequence[LoadedStage]
    tap: int | None = None
    answers: Answers | None = None

    def stops_behind(self, place: int) -> bool:
        """Whether what comes out of the stage at `place` of its path is wanted itself."""
        return place == self.tap or (self.answers is not None and place == len(self.path) - 2)


class Answer(NamedTuple):
    """What a leg ends with, in float32: logits `[outputs]`, the pooled output `[features]` at its tap, if it has one.

    And the distance, one value, from all that trained: `Answers.distances`; None where the model can't tell.
    """

    logits: Tensor
    embedding: Tensor | None = None
    distance: Tensor | None = None


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
        self._distances: dict[int, Tensor] = {}
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
            self._look_at(end - 1, moved, y)
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
        """Where legs that share the stage at `depth` part, or what there is so far is wanted for one of them."""
        first, *others = (self._legs[member] for member in members)
        end = depth + 1
        while end < len(first.path) and not any(leg.stops_behind(end - 1) for leg in (first, *others)):
            if any(leg.path[end] is not first.path[end] for leg in others):
                break
            end += 1
        return end

    def _look_at(self, place: int, rows: Mapping[int, int], y: Tensor) -> None:
        """Take what is wanted of the output of the stage at `place`."""
        looking = [leg for leg in rows if self._legs[leg].stops_behind(place)]
        if not looking:
            return
        pooled = pool(y)
        tapped = [leg for leg in looking if self._legs[leg].tap == place]
        self._embeddings.update((leg, pooled[rows[leg]]) for leg in tapped)
        if place == len(self._legs[looking[0]].path) - 2:
            self._measure([leg for leg in looking if self._legs[leg].answers is not None], rows, pooled)

    def _measure(self, legs: Sequence[int], rows: Mapping[int, int], features: Tensor) -> None:
        """How far the features of legs lie from what their models were trained on: a small product for each model."""
        unit = F.normalize(features)
        models: dict[int, list[int]] = {}
        for leg in legs:
            models.setdefault(id(self._legs[leg].answers), []).append(leg)
        for members in models.values():
            answers = self._legs[members[0]].answers
            assert answers is not None
            places = [rows[leg] for leg in members]
            alike = places == list(range(len(unit)))  # as where each image of the batch is answered by this model
            found = answers.distances_of(unit if alike else unit[torch.tensor(places, device=unit.device)])
            self._distances.update(zip(members, found.unbind(), strict=True))

    def _end(self, rows: Mapping[int, int], y: Tensor) -> None:
        logits = y.float().unbind()
        for leg, row in rows.items():
            self.answers[leg] = Answer(logits[row], self._embeddings.get(leg), self._distances.get(leg))


def pool(x: Tensor) -> Tensor:
    """A stage's output averaged over positions, in float32: `[n, c, h, w]` → `[n, c]`, `[n, tokens, d]` → `[n, d]`.

    Vectors `[n, d]` are left as they are.
    """
    x = x.float()
    return x.mean(dim=1) if x.dim() == 3 else x.flatten(2).mean(dim=2) if x.dim() > 3 else x
