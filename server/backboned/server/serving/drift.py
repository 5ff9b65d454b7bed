"""How the images that come differ from those that validated: no labels are needed. No clock, no threads.

By the two-sample Kolmogorov-Smirnov distance, over the bins that the checkpoint keeps: the largest difference between
the shares of both that lie up to a value. It needs no smoothing where a bin is empty, as the population stability index
does, and less images than this to tell a shift from chance (docs/trust.md has figures).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from backboned.registry.reference import Reference

WINDOW = 1000
"""So many of the newest images count."""

FEWEST = 100
"""With fewer images nothing is told."""

LARGE = 0.2
"""Less than this is no drift, even if it isn't chance either.

A normal distribution that moves by half its standard deviation gives it; its population stability index is then 0.25,
from which on a change is called major.
"""

CHANCE = 0.001
"""How often chance alone exceeds `Shift.by_chance`, for images that came independently of one another."""


@dataclass(frozen=True)
class Shift:
    """How far the distribution of a figure is from that of validation: `distance`, 0…1.

    `lower` tells whether values are lower where it differs most.
    """

    distance: float
    by_chance: float
    lower: bool

    @classmethod
    def between(cls, reference: Sequence[int], counts: Sequence[int]) -> "Shift":
        """By how many of each lie in the same bins. Neither may be empty of values.

        The bound is Smirnov's (1939), by its first term, which is never too small; equal values within a bin only make
        it wider.
        """
        before, now = sum(reference), sum(counts)
        gaps = [n / now - b / before for b, n in zip(accumulate(reference), accumulate(counts), strict=True)]
        widest = max(gaps, key=abs)
        by_chance = math.sqrt(math.log(2 / CHANCE) / 2 * (1 / before + 1 / now))
        return cls(abs(widest), min(1.0, by_chance), widest > 0)

    @property
    def drifted(self) -> bool:
        """Whether it is more than chance, and large."""
        return self.distance > self.by_chance and self.distance >= LARGE


@dataclass(frozen=True)
class Drift:
    """Of the newest `images` of a version: shares of doubted ones, and shifts from `FEWEST` images on.

    `confidence` is by the certainty of answers, `features` by the distance from all that trained.
    """

    images: int
    uncertain: float = 0.0
    unfamiliar: float = 0.0
    confidence: Shift | None = None
    features: Shift | None = None

    @property
    def drifted(self) -> bool:
        """Whether either has."""
        return any(shift is not None and shift.drifted for shift in (self.confidence, self.features))


class Window:
    """The newest `WINDOW` images of a version, three bytes each.

    One thread adds. Any thread may ask; one image may then be counted in part.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._certainty = _Newest(len(reference.certainty.counts))
        self._distance = _Newest(len(reference.distance.counts))
        self._doubts = _Newest(3)

    def add(self, certainty: float, distance: float, *, uncertain: bool, unfamiliar: bool) -> None:
        """One more image. It isn't counted if either is no number."""
        if math.isfinite(certainty) and math.isfinite(distance):
            self._certainty.add(self._reference.certainty.bin_of(certainty))
            self._distance.add(self._reference.distance.bin_of(distance))
            self._doubts.add(2 if unfamiliar else 1 if uncertain else 0)

    def drift(self) -> Drift:
        """What there is to tell of them."""
        certainty, distance, doubts = (list(each.counts) for each in (self._certainty, self._distance, self._doubts))
        images = min(sum(certainty), sum(distance), sum(doubts))
        if not images:
            return Drift(0)
        far, unsure = doubts[2] / sum(doubts), (doubts[1] + doubts[2]) / sum(doubts)
        if images < FEWEST:
            return Drift(images, unsure, far)
        return Drift(
            images,
            unsure,
            far,
            Shift.between(self._reference.certainty.counts, certainty),
            Shift.between(self._reference.distance.counts, distance),
        )


class _Newest:
    """How many of the newest `WINDOW` values lie at each of a few places."""

    def __init__(self, places: int) -> None:
        self.counts = [0] * places
        self._ring = bytearray()
        self._oldest = 0

    def add(self, place: int) -> None:
        if len(self._ring) < WINDOW:
            self._ring.append(place)
        else:
            self.counts[self._ring[self._oldest]] -= 1
            self._ring[self._oldest] = place
            self._oldest = (self._oldest + 1) % WINDOW
        self.counts[place] += 1
