"""The images of one part of a dataset, as training reads them: features and targets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backboned.server.training.features import Features

_RESIDENT_BYTES = 2**30
_LOADED_AT_ONCE = 256
_PASSED_AT_ONCE = 32


@dataclass
class Split:
    """Images that train, validate or test: their features, which of these to use, and the target of each.

    `images` is `[n]` int64 indices into the features, `targets` `[n]` or `[n, classes]` on the device. For one thread.
    """

    features: Features
    images: Tensor
    targets: Tensor
    views: int = 1
    _resident: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, chosen: Tensor, views: Tensor) -> Tensor:
        """Features of some of the images, by position, in some of their views: `[n, …]` float32 on the device."""
        if self._resident is not None:
            return self._resident[(chosen * self.views + views).to(self._resident.device)]
        return self.features.batch(self.images[chosen], views)

    def served(self, chosen: Tensor) -> Tensor:
        """The same, of the images as they are served."""
        return self.inputs(chosen, torch.zeros_like(chosen))

    def batches(self, size: int) -> Iterator[Tensor]:
        """Positions of all images in order, so many at a time."""
        return iter(torch.arange(len(self.images)).split(size))

    def load(self) -> None:
        """Keep all features in memory, on the device, if they are in the cache and take a gigabyte at most."""
        if self._resident is not None or not self.features.cached or not len(self):
            return
        first = self.served(torch.tensor([0]))
        if first.nbytes * len(self) * self.views > _RESIDENT_BYTES:
            return
        rows = torch.empty(len(self) * self.views, *first.shape[1:], device=first.device)
        for chosen in self.batches(_LOADED_AT_ONCE):
            for view in range(self.views):
                rows[(chosen * self.views + view).to(rows.device)] = self.inputs(chosen, torch.full_like(chosen, view))
        self._resident = rows

    @property
    def resident(self) -> Tensor | None:
        """All features, `[n × views, …]`, the views of an image one after another, if they are in memory."""
        return self._resident


def through(split: Split, function: Callable[[Tensor], Tensor], check: Callable[[], None]) -> Split | None:
    """A part with `function` of its features in their place, in memory; None if these take more than a gigabyte.

    Of at most two views of each image.
    """
    views = min(split.views, 2)
    first = function(split.served(torch.tensor([0])))
    if first.nbytes * len(split) * views > _RESIDENT_BYTES:
        return None
    rows = torch.empty(len(split) * views, *first.shape[1:], device=first.device)
    for chosen in split.batches(_PASSED_AT_ONCE):
        for view in range(views):
            rows[(chosen * views + view).to(rows.device)] = function(
                split.inputs(chosen, torch.full_like(chosen, view))
            )
            check()
    return Split(split.features, split.images, split.targets, views, rows)
