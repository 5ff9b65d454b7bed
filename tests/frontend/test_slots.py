"""Slots: taken, filled, read from another mapping, given back."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from backboned.server.frontend import slots
from backboned.server.frontend.slots import Slots


@pytest.fixture
def memory() -> Iterator[int]:
    """Of four slots of 300 bytes."""
    descriptor = slots.create(1200)
    yield descriptor
    os.close(descriptor)


def test_what_is_written_to_a_slot_is_read_elsewhere_and_touches_no_other(memory: int) -> None:
    pool, reader = Slots(memory, 300), slots.map_for_reading(memory)
    image = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    taken = pool.take(4, image.size)
    assert taken is not None and sorted(taken) == [0, 1, 2, 3]
    pool.write(2, image.transpose(1, 0, 2))
    assert reader[600:690] == image.transpose(1, 0, 2).tobytes()
    assert not any(reader[:600]) and not any(reader[690:])


def test_slots_are_bounded_and_the_one_freed_last_is_taken_first(memory: int) -> None:
    pool = Slots(memory, 300)
    assert pool.take(5, 1) is None and pool.take(1, 301) is None
    assert pool.take(1, 300) == [0]
    second = pool.take(2, 300)
    assert second is not None and sorted(second) == [1, 2]
    assert pool.take(2, 300) is None
    pool.release([0])
    assert pool.take(1, 300) == [0]
    assert pool.take(1, 300) == [3]
    assert pool.take(1, 300) is None


def test_the_reader_can_not_write_and_nobody_can_change_the_size(memory: int) -> None:
    reader = slots.map_for_reading(memory)
    with pytest.raises(TypeError, match="read"):
        reader[0] = 1
    for size in (0, 2400):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)
