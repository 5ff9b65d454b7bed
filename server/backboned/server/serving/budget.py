"""What fits into the memory for models: a pure function from wishes, most urgent first, to what is kept.

Stages count once, however many models stand on them: a thousand heads on one backbone take a backbone and a thousand
heads.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from backboned.server.compute.stages import StageKey

Footprint = Mapping[StageKey, int]
"""The stages that something stands on, each with its size in bytes."""


class Arrival(Enum):
    """When something that should be in memory and isn't comes there."""

    ON_DEMAND = "on demand"
    LATER = "later"
    """Once there is room beside what stands in for it meanwhile."""
    NEVER = "never"
    """It is larger than all the memory that there is."""


K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Wish(Generic[K]):
    """Something that should be in memory, and what it stands on."""

    key: K
    stages: Footprint

    @property
    def size_bytes(self) -> int:
        """What it takes alone."""
        return sum(self.stages.values())


@dataclass(frozen=True)
class Fit(Generic[K]):
    """What is kept, and what isn't, with the bytes that it would take beside all that is kept before it."""

    kept: frozenset[K]
    left_out: Mapping[K, int]


def fit(wishes: Iterable[Wish[K]], budget_bytes: int | None) -> Fit[K]:
    """Keep each wish that still fits beside those before it; without a budget all of them.

    So whoever comes first is kept if it fits at all, and one that is too large keeps out no other.
    """
    kept, left_out = set[K](), dict[K, int]()
    held, total = set[StageKey](), 0
    for wish in wishes:
        more = {stage: size for stage, size in wish.stages.items() if stage not in held}
        needed = sum(more.values())
        if budget_bytes is not None and total + needed > budget_bytes:
            left_out[wish.key] = needed
            continue
        kept.add(wish.key)
        held.update(more)
        total += needed
    return Fit(frozenset(kept), left_out)
