"""How much may wait: in images, in bytes, and for one model in what the others leave."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from backboned.registry.errors import BackbonedError, ErrorKind

_SHARE_OF_PATIENCE = 0.7
"""Of the time that a caller waits: more than that before it, and it would only just be answered, or only just not."""


class Admission:
    """Bounds what is under way, from a call's arrival to its answer. For one thread.

    A model may hold as much as is still free, and so at most half of everything: however fast its calls come, another
    model's find room.
    """

    def __init__(self, max_images: int, max_bytes: int, seconds_to_clear: Callable[[int], float]) -> None:
        """`seconds_to_clear` tells how long so many images take."""
        self._max_images, self._max_bytes = max_images, max_bytes
        self._seconds_to_clear = seconds_to_clear
        self._images: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @property
    def images(self) -> int:
        """How many are under way."""
        return self._images.total()

    @contextmanager
    def admit(self, model: str, images: int, size: int, patience_seconds: float | None = None) -> Iterator[None]:
        """Count a call of so many images and bytes as long as it lasts.

        Raises `BackbonedError` `RESOURCE_EXHAUSTED`, with the delay after which to try again, where there is no room,
        and where what is before it takes longer than its caller waits. A call that is alone is let in whatever its
        size: it could never be otherwise.
        """
        if self._images:
            self._check(model, images, size, patience_seconds)
        self._images[model] += images
        self._bytes[model] += size
        try:
            yield
        finally:
            for counter, count in ((self._images, images), (self._bytes, size)):
                counter[model] -= count
                if not counter[model]:
                    del counter[model]

    def _check(self, model: str, images: int, size: int, patience_seconds: float | None) -> None:
        held, held_bytes = self._images.total(), self._bytes.total()
        fits = self._images[model] + images <= self._max_images - held and (
            self._bytes[model] + size <= self._max_bytes - held_bytes
        )
        if fits and patience_seconds is None:
            return
        wait = self._seconds_to_clear(held)
        if fits and patience_seconds is not None and wait < _SHARE_OF_PATIENCE * patience_seconds:
            return
        delay = min(max(wait / 2, 0.05), 10.0)
        raise BackbonedError(
            ErrorKind.RESOURCE_EXHAUSTED,
            f"the queue is {'too long for the deadline' if fits else 'full'} ({held} images, {held_bytes} bytes wait, "
            f"{self._images[model]} images of them for {model}); try again in {delay:.2f} s",
            retry_delay_seconds=delay,
        )
