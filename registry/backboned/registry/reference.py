"""Where the images that validated lie: what those that come later are compared with, without labels."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from backboned.registry.refusal import refused

BINS = 20
"""So many bins have equal parts of the images, as far as their values differ."""

MOST_BINS = 64
"""What a checkpoint may have: a place among them takes a byte."""

SURE = 0.999
"""Certainties above this are alike: how they differ is rounding, and no one's concern."""

_MOST_IMAGES = 2**40


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each bin: up to the first of `edges`, then up to the second, …, and beyond the last.

    `edges` rise; `counts` has one more.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[float], *, highest: float = math.inf) -> "Histogram":
        """Of one or more finite values: edges are quantiles of theirs, none above `highest`."""
        ranked, n = sorted(values), len(values)
        quantiles = (ranked[math.ceil(n * i / BINS) - 1] for i in range(1, BINS))
        edges = tuple(sorted({min(value, highest) for value in quantiles}))
        up_to = [0, *(bisect_right(ranked, edge) for edge in edges), n]
        return cls(edges, tuple(after - before for before, after in pairwise(up_to)))

    @property
    def total(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    def bin_of(self, value: float) -> int:
        """The place of the bin in which `value` lies."""
        return bisect_left(self.edges, value)

    def to_payload(self) -> dict[str, list[float] | list[int]]:
        """Plain values, as they lie in the checkpoint."""
        return {"edges": list(self.edges), "counts": list(self.counts)}

    @classmethod
    def from_payload(cls, values: object, name: str, *, highest: float) -> "Histogram":
        """The inverse of `to_payload`, for values in 0…`highest`. Raises `BackbonedError` `DATA_LOSS`."""
        told: Mapping[Any, Any] = values if isinstance(values, Mapping) else {}
        edges, counts = told.get("edges"), told.get("counts")
        if not isinstance(edges, list) or not isinstance(counts, list):
            raise refused(f"its `answers` have no {name} of validation: lists of edges and counts are expected")
        if not 1 <= len(edges) < MOST_BINS or len(counts) != len(edges) + 1:
            raise refused(
                f"its `answers` have {len(edges)} edges and {len(counts)} counts for the {name} of validation"
            )
        if not all(type(edge) is float and 0 <= edge <= highest for edge in edges) or any(
            after <= before for before, after in pairwise(edges)
        ):
            raise refused(f"its `answers` have edges for the {name} of validation that don't rise within 0…{highest:g}")
        if not all(type(count) is int and 0 <= count <= _MOST_IMAGES for count in counts) or not any(counts):
            raise refused(f"its `answers` have counts for the {name} of validation that no images can have")
        return cls(tuple(edges), tuple(counts))


@dataclass(frozen=True)
class Reference:
    """Of the images that validated: how certain their answers were, and how far from all that trained they lie.

    They had no part in training, or answers would be too certain, and distances too short, to compare with.
    """

    certainty: Histogram
    distance: Histogram

    @classmethod
    def of(cls, certainties: Sequence[float], distances: Sequence[float]) -> "Reference":
        """Of one or more images: `Task.certainty` and `Answers.distances` of each."""
        return cls(Histogram.of(certainties, highest=SURE), Histogram.of(distances))

    def to_payload(self) -> dict[str, dict[str, list[float] | list[int]]]:
        """Plain values, as they lie in the checkpoint."""
        return {"certainty": self.certainty.to_payload(), "distance": self.distance.to_payload()}

    @classmethod
    def from_payload(cls, values: object) -> "Reference":
        """The inverse of `to_payload`. Raises `BackbonedError` `DATA_LOSS` for whatever it can't have written."""
        if not isinstance(values, Mapping):
            raise refused(f"its `answers` have {type(values).__name__} for `validation`, not what a FineTune writes")
        found = cls(
            Histogram.from_payload(values.get("certainty"), "certainty", highest=1),
            Histogram.from_payload(values.get("distance"), "distance", highest=1e30),
        )
        if found.certainty.total != found.distance.total:
            raise refused("its `answers` count other images by certainty than by distance")
        return found
