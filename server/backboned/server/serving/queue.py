"""What waits for the engine, handed out so that nobody waits for a neighbour's flood."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.server.serving.calls import Pixels, Prepared
from backboned.server.serving.snapshot import LoadedModel
from backboned.server.serving.tree import Answer


class Group(NamedTuple):
    """What items must have in common to ride in one batch."""

    backbone: str
    dtype: torch.dtype
    preprocessing: Preprocessing

    @classmethod
    def of(cls, model: LoadedModel) -> "Group":
        """Where a model's images ride."""
        key = model.path[0].key
        return cls(key.backbone, key.dtype, model.manifest.preprocessing)


@dataclass
class Item:
    """One image on its way through `models`, all of one group; `future` belongs to the event loop.

    `tap` is the place in the models' paths whose pooled output is the embedding, if one is wanted. The `shadows`, of
    the same group, see the image too; their failure is nobody's. `image` is `[3, crop, crop]` uint8 once it is
    prepared.
    """

    models: tuple[LoadedModel, ...]
    source: bytes | Pixels | Prepared
    future: "asyncio.Future[tuple[Answer, ...]]"
    tap: int | None = None
    shadows: tuple[LoadedModel, ...] = ()
    image: Tensor | None = None
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def owner(self) -> str:
        """The model that it is counted for where models take turns."""
        return self.models[0].manifest.model


class FairQueue:
    """Items in turn: groups one after another, and inside a group one item of each model. Not thread-safe.

    What has been cancelled is left out when it is met.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Group, OrderedDict[str, deque[Item]]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, items: Sequence[Item]) -> None:
        """Queue `items`, each behind those of its model."""
        for item in items:
            models = self._groups.setdefault(Group.of(item.models[0]), OrderedDict())
            models.setdefault(item.owner, deque()).append(item)
        self._size += len(items)

    def take(self, group: Group | None = None) -> Item | None:
        """The next item, of `group` if one is given; None if there is none. A group that begins goes to the end."""
        while group in self._groups if group is not None else self._groups:
            chosen = group if group is not None else next(iter(self._groups))
            item = self._take(chosen)
            if not item.future.done():
                if group is None and chosen in self._groups:
                    self._groups.move_to_end(chosen)
                return item
        return None

    def _take(self, group: Group) -> Item:
        models = self._groups[group]
        owner, items = models.popitem(last=False)
        item = items.popleft()
        self._size -= 1
        if items:
            models[owner] = items
        elif not models:
            del self._groups[group]
        return item
