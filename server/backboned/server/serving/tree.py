"""One batch through the tree of loaded models.

Models are paths of stages that branch where their weights differ. Rows of a batch ride together as long as their
stages are one object, and part where they are not.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backboned.server.compute.stages import LoadedStage
from backboned.server.serving.snapshot import LoadedModel

Row = tuple[Tensor, Tensor]
"""What one image gets: the features that its head read, and its logits `[outputs]`."""


def run_tree(models: Sequence[LoadedModel], x: Tensor) -> list[Row | Exception]:
    """Each row of `x` `[batch, 3, h, w]` through the path of its model. Paths have one length: that of a backbone.

    A stage that fails costs the rows that run through it their answer, and no others.
    """
    results: list[Row | Exception] = [RuntimeError("not run")] * len(models)
    paths = [model.path for model in models]
    _walk(paths, 0, list(range(len(models))), x, results)
    return results


def _walk(
    paths: Sequence[Sequence[LoadedStage]], depth: int, rows: list[int], x: Tensor, results: list[Row | Exception]
) -> None:
    for stage, members in _branches(paths, depth, rows):
        part = x if len(members) == len(rows) else x[torch.tensor([rows.index(m) for m in members], device=x.device)]
        try:
            y = stage(part)
        except Exception as error:  # out of memory, or a plugin's code
            for member in members:
                results[member] = error
            continue
        if depth + 1 < len(paths[members[0]]):
            _walk(paths, depth + 1, members, y, results)
        else:
            for member, features, logits in zip(members, part.unbind(), y.float().unbind(), strict=True):
                results[member] = (features, logits)


def _branches(
    paths: Sequence[Sequence[LoadedStage]], depth: int, rows: Sequence[int]
) -> Iterator[tuple[LoadedStage, list[int]]]:
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(id(paths[row][depth]), []).append(row)
    for members in groups.values():
        yield paths[members[0]][depth], members
