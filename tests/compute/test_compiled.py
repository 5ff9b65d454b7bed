"""A compiled stage runs any number of images in the pieces that are done soonest."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry.errors import BackbonedError
from backboned.server.compute.compiled import CompiledBatch, CompiledStage, Layout, pieces

SIZES = (1, 2, 4, 8)
LAYOUT = Layout((3, 16, 16), torch.float32, True)


def stage(seconds: Mapping[int, float]) -> CompiledStage:
    """One that can tell how it would run, and can't run: there is no code behind it."""
    without_code: Any = dict.fromkeys(seconds)
    return CompiledStage(LAYOUT, without_code, seconds)


def every_way(sizes: tuple[int, ...], images: int) -> Iterator[tuple[int, ...]]:
    """All choices of sizes, largest first, that hold so many images and of which none could be left out."""
    for counts in itertools.product(*(range(-(-images // size) + 1) for size in sizes)):
        chosen = tuple(size for size, count in zip(sizes, counts, strict=True) for _ in range(count))
        if sum(chosen) >= images and sum(chosen) - min(chosen) < images:
            yield tuple(sorted(chosen, reverse=True))


@settings(deadline=None, max_examples=60)
@given(
    costs=st.dictionaries(st.sampled_from(SIZES), st.floats(0.001, 1.0), min_size=1),
    images=st.integers(1, 17),
)
def test_pieces_are_the_cheapest_of_all_ways(costs: dict[int, float], images: int) -> None:
    seconds = tuple(sorted(costs.items()))
    chosen = pieces(seconds, images)
    ways = list(every_way(tuple(costs), images))
    assert chosen in ways
    cheapest = min(sum(costs[size] for size in way) for way in ways)
    assert sum(costs[size] for size in chosen) == pytest.approx(cheapest)


@pytest.mark.parametrize(
    ("seconds", "images", "expected"),
    [
        ({1: 1.0, 8: 8.0}, 3, (1, 1, 1)),
        ({1: 1.0, 8: 4.0}, 3, (1, 1, 1)),
        ({1: 1.0, 8: 4.0}, 5, (8,)),
        ({1: 1.0, 8: 4.0}, 9, (8, 1)),
        ({1: 1.0, 8: 4.0}, 16, (8, 8)),
        ({1: 1.0, 2: 1.5, 4: 2.5, 8: 4.0}, 7, (8,)),
        ({1: 1.0, 2: 1.5, 4: 2.5, 8: 5.0}, 6, (4, 2)),
        ({8: 1.0}, 1, (8,)),
    ],
)
def test_a_batch_is_cut_where_that_is_cheapest(
    seconds: dict[int, float], images: int, expected: tuple[int, ...]
) -> None:
    assert stage(seconds).pieces(images) == expected


@pytest.mark.parametrize("images", range(1, 40))
def test_parts_make_up_the_batch_and_each_fits_its_piece(images: int) -> None:
    compiled = stage({1: 1.0, 2: 1.5, 4: 2.5, 8: 4.0})
    sizes, parts = compiled.pieces(images), compiled.parts(images)
    assert sum(parts) == images and len(parts) == len(sizes)
    assert all(0 < part <= size for part, size in zip(parts, sizes, strict=True))
    assert sizes[:-1] == parts[:-1]  # only the last one has room to spare


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 8: 8.0}, 1),
        ({1: 1.0, 8: 7.9}, 1),  # 1 % is not worth waiting for
        ({1: 1.0, 8: 4.0}, 8),
        ({1: 1.0, 2: 1.2, 4: 2.3, 8: 4.6}, 4),
        ({1: 1.0, 8: 9.0, 16: 20.0}, 1),
    ],
)
def test_the_best_size_is_the_smallest_that_is_nearly_fastest(seconds: dict[int, float], best: int) -> None:
    assert stage(seconds).best_size == best


def test_a_layout_tells_what_fits() -> None:
    last = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    layout = Layout.of(last)
    assert layout == Layout((3, 4, 5), torch.float32, True)
    assert layout.matches(torch.zeros(7, 3, 4, 5)) and not layout.matches(torch.zeros(7, 3, 5, 4))
    assert not layout.matches(last.bfloat16())
    arranged = layout.arrange(torch.zeros(7, 3, 4, 5))
    assert arranged.is_contiguous(memory_format=torch.channels_last)
    assert layout.arrange(last) is last
    assert Layout.of(torch.zeros(2, 7, 5)) == Layout((7, 5), torch.float32, False)
    assert not Layout.of(torch.zeros(2, 3, 4, 5)).channels_last


def test_what_is_no_compiled_stage_is_told(tmp_path: Path) -> None:
    damaged, library = tmp_path / "damaged.so", Path(torch.__file__).parent / "lib" / "libshm.so"
    damaged.write_bytes(b"\x7fELF and nothing more")
    for file in (damaged, tmp_path / "missing.so", library):
        with pytest.raises(BackbonedError, match=f"{file} can't be loaded: "):
            CompiledBatch(file, torch.device("cpu"), concurrency=1)
