"""How much may wait: in images, in bytes, and for one model in what the others leave."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from backboned.registry.errors import BackbonedError, ErrorKind

_SHARE_OF_PATIENCE = 0.7
"""Of the time that a caller waits: more than that before it, and it would only just be answered, or only just not."""


class Admission:
    """Bounds what is under way, from a call's arrival to its answer. For one thread.

    A model may hold as much as is still free, and so at most half of everything: however fast its calls come, another
    model's find room. Models take turns, so that a call is told to wait for its own model's images, and for as many of
    each other one.
    """

    def __init__(
        self,
        max_images: int,
        max_bytes: int,
        seconds_to_clear: Callable[[int], float],
        taken: Callable[[], int] = lambda: 0,
    ) -> None:
        """`seconds_to_clear` tells how long so many images take; `taken` how many are beyond taking turns."""
        self._max_images, self._max_bytes = max_images, max_bytes
        self._seconds_to_clear, self._taken = seconds_to_clear, taken
        self._images: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._held_images = self._held_bytes = 0

    @property
    def images(self) -> int:
        """How many are under way."""
        return self._held_images

    def check_wait(self, model: str, patience_seconds: float | None, images: int = 1) -> None:
        """Refuse a call of `model` whose caller waits no longer than what is before it takes.

        Raises `BackbonedError` `RESOURCE_EXHAUSTED`, with the delay after which to try again.
        """
        if patience_seconds is None or not self._held_images:
            return
        limit = _SHARE_OF_PATIENCE * patience_seconds
        if self._seconds_to_clear(self._held_images) < limit:
            return
        wait = self._seconds_to_clear(self._before(model, images))
        if wait >= limit:
            raise _refusal("too long for the deadline", wait)  # in words that are often the same: they are kept

    @contextmanager
    def admit(self, model: str, images: int, size: int, patience_seconds: float | None = None) -> Iterator[None]:
        """Count a call of so many images and bytes as long as it lasts.

        Raises `BackbonedError` `RESOURCE_EXHAUSTED`, with the delay after which to try again, where there is no room,
        and where what is before it takes longer than its caller waits. A call that is alone is let in whatever its
        size: it could never be otherwise.
        """
        if self._held_images:
            self.check_wait(model, patience_seconds, images)
            self._check_room(model, images, size)
        self._count(model, images, size)
        try:
            yield
        finally:
            self._count(model, -images, -size)

    def _before(self, model: str, images: int) -> int:
        """How many other images are computed before so many more of `model`: each model has as many turns."""
        own = self._images[model]
        others = sum(min(held, own + images) for name, held in self._images.items() if name != model)
        return min(self._held_images, self._taken() + own + others)

    def _check_room(self, model: str, images: int, size: int) -> None:
        if self._images[model] + images > self._max_images - self._held_images or (
            self._bytes[model] + size > self._max_bytes - self._held_bytes
        ):
            full = (
                f"full ({self._held_images} images, {self._held_bytes} bytes wait, "
                f"{self._images[model]} images of them for {model})"
            )
            raise _refusal(full, self._seconds_to_clear(self._held_images))

    def _count(self, model: str, images: int, size: int) -> None:
        self._held_images += images
        self._held_bytes += size
        for counter, count in ((self._images, images), (self._bytes, size)):
            counter[model] += count
            if not counter[model]:
                del counter[model]


def _refusal(why: str, wait_seconds: float) -> BackbonedError:
    delay = math.ceil(10 * min(max(wait_seconds / 2, 0.1), 10.0)) / 10
    return BackbonedError(
        ErrorKind.RESOURCE_EXHAUSTED,
        f"the queue is {why}; try again in {delay:.1f} s",
        retry_delay_seconds=delay,
    )
