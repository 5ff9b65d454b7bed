"""Drift is told of images that lie elsewhere, and of those that lie alike once in a thousand times at most."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backboned.registry.reference import Reference
from backboned.server.serving.drift import CHANCE, FEWEST, LARGE, WINDOW, Drift, Shift, Window

COUNTS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=20).filter(
    lambda pairs: all(map(sum, zip(*pairs, strict=True)))
)


def certainties(n: int, generator: torch.Generator, moved: float = 0.0) -> Tensor:
    """Of a skew distribution, as certainties are; `moved` by so many standard deviations before it is bent."""
    return torch.sigmoid(2 - moved + torch.randn(n, generator=generator))


def distances(n: int, generator: torch.Generator, moved: float = 0.0) -> Tensor:
    return torch.exp(0.1 * (moved + torch.randn(n, generator=generator)))


def drift(seed: int, *, validated: int = 200, images: int = 300, moved: float = 0.0) -> Drift:
    """Of images whose certainty falls, and whose distance grows, by so many standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    before = (draw(validated, generator).tolist() for draw in (certainties, distances))
    now = (draw(images, generator, moved).tolist() for draw in (certainties, distances))
    window = Window(Reference.of(*before))
    for certainty, distance in zip(*now, strict=True):
        window.add(certainty, distance, uncertain=False, unfamiliar=False)
    return window.drift()


def shifts(found: Drift) -> Iterator[Shift]:
    for shift in (found.confidence, found.features):
        assert shift is not None
        yield shift


def test_a_shift_is_the_largest_difference_of_shares_up_to_a_value() -> None:
    # Up to the edges lie 20, 50 and 90 % of those before, and 60, 70 and 75 % of those now.
    found = Shift.between([20, 30, 40, 10], [12, 2, 1, 5])
    assert found.distance == pytest.approx(0.4) and found.lower
    assert found.by_chance == pytest.approx(math.sqrt(math.log(2000) / 2 * (1 / 100 + 1 / 20)))
    higher = Shift.between([12, 2, 1, 5], [20, 30, 40, 10])
    assert higher.distance == pytest.approx(0.4) and not higher.lower


@given(COUNTS)
def test_it_is_that_of_its_definition(pairs: list[tuple[int, int]]) -> None:
    before, now = (list(counts) for counts in zip(*pairs, strict=True))
    gaps = [sum(now[:i]) / sum(now) - sum(before[:i]) / sum(before) for i in range(len(pairs) + 1)]
    found = Shift.between(before, now)
    assert found.distance == pytest.approx(max(map(abs, gaps)))
    assert 0 <= found.distance <= 1 and 0 < found.by_chance <= 1
    assert Shift.between(before, before).distance == 0


def test_images_that_lie_alike_seldom_seem_to_have_drifted() -> None:
    found = [shift for seed in range(1000) for shift in shifts(drift(seed, images=FEWEST))]
    assert sum(shift.distance > shift.by_chance for shift in found) <= 3 * CHANCE * len(found)
    middle = sorted(shift.distance for shift in found)[len(found) // 2]
    assert 0.05 < middle < 0.12


@pytest.mark.parametrize("validated", [50, 200])
def test_images_that_lie_elsewhere_are_told(validated: int) -> None:
    for seed in range(30):
        found = drift(seed, validated=validated, moved=1.5)
        assert found.drifted and found.confidence is not None and found.features is not None
        assert found.confidence.drifted and found.confidence.lower, "they are answered less certainly"
        assert found.features.drifted and not found.features.lower, "they lie further off"


def test_a_difference_that_is_certain_and_small_is_no_drift() -> None:
    small = Shift.between([10_000] * 10, [11_000] * 5 + [9000] * 5)
    assert small.by_chance < small.distance < LARGE and not small.drifted


def test_few_images_that_validated_tell_little() -> None:
    few = Shift.between([3, 0], [0, 1000])
    assert (few.distance, few.by_chance, few.drifted) == (1.0, 1.0, False)


def test_only_the_newest_images_count() -> None:
    reference = Reference.of([i / 100 for i in range(100)], [float(i) for i in range(100)])
    window = Window(reference)
    assert window.drift() == Drift(0)
    for i in range(WINDOW):
        window.add(0.0, 1000.0, uncertain=True, unfamiliar=True)
        if i == FEWEST - 2:
            assert window.drift() == Drift(FEWEST - 1, 1.0, 1.0)
    assert window.drift().drifted
    for i in range(WINDOW):
        window.add(i % 100 / 100, float(i % 100), uncertain=i % 4 == 0, unfamiliar=i % 8 == 0)
    found = window.drift()
    assert (found.images, found.uncertain, found.unfamiliar) == (WINDOW, 0.25, 0.125)
    assert [shift.distance for shift in shifts(found)] == [0, 0] and not found.drifted


@pytest.mark.parametrize(("certainty", "distance"), [(math.nan, 1.0), (0.5, math.nan), (0.5, math.inf)])
def test_what_is_no_number_is_not_counted(certainty: float, distance: float) -> None:
    window = Window(Reference.of([0.5], [1.0]))
    window.add(certainty, distance, uncertain=False, unfamiliar=False)
    assert window.drift() == Drift(0)
