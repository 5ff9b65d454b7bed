"""Room for models: what the plan thought of may still be needed by batches under way, and the device may have less."""

import gc
import logging
import time

import torch

from backboned.registry.manifest import Manifest
from backboned.server.serving.placing import Placer

log = logging.getLogger(__name__)

MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError)
_SHORTAGE_SECONDS = 60.0


class Room:
    """The memory that models may take. For one thread."""

    def __init__(self, placer: Placer, limit_bytes: int | None) -> None:
        self._placer = placer
        self._limit = limit_bytes
        self._shortage: tuple[float, int] | None = None
        self._left: int | None = None
        self._waits = False

    @property
    def waits(self) -> bool:
        """Whether something isn't loaded yet for the sake of batches that are under way."""
        return self._waits

    def budget_bytes(self, now: float) -> int | None:
        """What models may take: what was told, or what the device turned out to have not long ago; None: anything."""
        if self._shortage is None or now > self._shortage[0]:
            return self._limit
        return self._shortage[1] if self._limit is None else min(self._limit, self._shortage[1])

    def begin(self, *, watch: bool) -> None:
        """A look begins; with `watch`, or where something is waited for, what is loaded must fit beside what is there.

        That is more than the plan thought of where something was just retired, and where it saw some models only.
        """
        budget = self.budget_bytes(time.monotonic())
        watch = watch or self._waits
        self._left = budget - self._placer.held_bytes() if watch and budget is not None else None
        self._waits = False

    def has_room(self, manifest: Manifest) -> bool:
        """Whether a version can be loaded now. If so, its room is taken; if not, it can once batches have ended."""
        if self._left is None:
            return True
        needed = self._placer.missing_bytes(manifest)
        if needed > max(self._left, 0):
            self._waits = True
            return False
        self._left -= needed
        return True

    def fits(self, manifest: Manifest) -> bool:
        """Whether a version that no plan has thought of fits beside all that is there."""
        budget = self.budget_bytes(time.monotonic())
        return budget is None or self._placer.missing_bytes(manifest) <= budget - self._placer.held_bytes()

    def run_short(self, manifest: Manifest) -> None:
        """The device had no memory for a version: for a while models may take what they take now, and no more."""
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        held = self._placer.held_bytes()
        self._shortage = time.monotonic() + _SHORTAGE_SECONDS, held
        log.warning(
            "no memory for %s version %d: models may take %.0f MB for a minute, and what nobody asks for makes room",
            manifest.model,
            manifest.version,
            held / 1e6,
        )
