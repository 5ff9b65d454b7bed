"""Where the images that validated lie is kept in a few numbers, and nothing else passes for them."""

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry import BackbonedError, ErrorKind
from backboned.registry.reference import BINS, MOST_BINS, SURE, Histogram, Reference

VALUES = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=200)


def counted(histogram: Histogram, values: Sequence[float]) -> list[int]:
    """How many values lie in each bin, one by one."""
    places = [histogram.bin_of(value) for value in values]
    return [places.count(place) for place in range(len(histogram.counts))]


@settings(deadline=None)
@given(VALUES, st.sampled_from([1.0, 1e3, 1e9]))
def test_each_value_is_counted_where_it_lies(values: list[float], highest: float) -> None:
    found = Histogram.of(values, highest=highest)
    assert counted(found, values) == list(found.counts)
    assert found.total == len(values) and len(found.edges) < BINS


def test_bins_have_equal_parts_of_values_that_differ() -> None:
    assert set(Histogram.of([i / 7 for i in range(400)]).counts) == {20}


def test_values_that_are_alike_share_a_bin() -> None:
    found = Histogram.of([0.5] * 30 + [0.25] * 10)
    assert (found.edges, found.counts) == ((0.25, 0.5), (10, 30, 0))
    assert Histogram.of([3.0]) == Histogram((3.0,), (1, 0))


def test_certainties_that_differ_by_rounding_alone_are_alike() -> None:
    found = Reference.of([0.9, 0.9991, 0.99999, 1.0] * 5, [1.0] * 20).certainty
    assert (list(found.edges), found.counts) == ([0.9, SURE], (5, 0, 15))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=100), st.floats(0, 1e9, width=32))
def test_what_is_written_is_read_again_by_torch_alone(certainties: list[float], distance: float) -> None:
    reference = Reference.of(certainties, [distance] * len(certainties))
    file = io.BytesIO()
    torch.save(reference.to_payload(), file)
    file.seek(0)
    assert Reference.from_payload(torch.load(file, weights_only=True)) == reference


HOSTILE: list[tuple[object, str]] = [
    (None, "no certainty"),
    ([0.5], "no certainty"),
    ({"edges": [0.5]}, "no certainty"),
    ({"edges": torch.tensor([0.5]), "counts": [1, 2]}, "no certainty"),
    ({"edges": [], "counts": [3]}, "0 edges and 1 counts"),
    ({"edges": [0.5], "counts": [3]}, "1 edges and 1 counts"),
    ({"edges": [i / MOST_BINS for i in range(MOST_BINS)], "counts": [1] * (MOST_BINS + 1)}, "64 edges"),
    ({"edges": [0.5, 0.5], "counts": [1, 1, 1]}, "don't rise"),
    ({"edges": [0.5, 0.4], "counts": [1, 1, 1]}, "don't rise"),
    ({"edges": [float("nan")], "counts": [1, 2]}, "don't rise within 0…1"),
    ({"edges": [float("inf")], "counts": [1, 2]}, "don't rise within 0…1"),
    ({"edges": [-0.1], "counts": [1, 2]}, "don't rise within 0…1"),
    ({"edges": [1.1], "counts": [1, 2]}, "don't rise within 0…1"),
    ({"edges": [True], "counts": [1, 2]}, "don't rise within 0…1"),
    ({"edges": ["0.5"], "counts": [1, 2]}, "don't rise within 0…1"),
    ({"edges": [0.5], "counts": [-1, 4]}, "that no images can have"),
    ({"edges": [0.5], "counts": [0, 0]}, "that no images can have"),
    ({"edges": [0.5], "counts": [1.0, 2]}, "that no images can have"),
    ({"edges": [0.5], "counts": [True, 2]}, "that no images can have"),
    ({"edges": [0.5], "counts": [1, 2**60]}, "that no images can have"),
    ({"edges": [0.5], "counts": [1, 1]}, "other images"),
]


@pytest.mark.parametrize(("certainty", "told"), HOSTILE, ids=lambda v: v if isinstance(v, str) else "")
def test_what_no_fine_tune_has_written_is_refused(certainty: object, told: str) -> None:
    distance = {"edges": [0.5], "counts": [1, 2]}
    with pytest.raises(BackbonedError) as caught:
        Reference.from_payload({"certainty": certainty, "distance": distance})
    assert told in caught.value.message and caught.value.kind is ErrorKind.DATA_LOSS


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["certainty", "distance", "edges", "counts"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(ANYTHING)
def test_whatever_stands_there_is_read_or_refused(values: Any) -> None:
    try:
        found = Reference.from_payload(values)
    except BackbonedError as error:
        assert error.kind is ErrorKind.DATA_LOSS
    else:
        assert Reference.from_payload(found.to_payload()) == found
