"""Cycles are freed while little waits; while much does, they wait, but not for ever."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable

import pytest

from backboned.server.collecting import collect_when_idle


class Queue:
    """So many images wait."""

    images = 0

    def depth(self) -> int:
        return self.images


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


def old_knot() -> "weakref.ref[Knot]":
    """A cycle that has outlived all young collections, and is used no more."""
    knot = Knot()
    gc.collect(1)
    gc.collect(1)
    return weakref.ref(knot)


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
async def collecting(queue: Queue) -> AsyncIterator[Callable[..., None]]:
    tasks: list[asyncio.Task[None]] = []

    def start(**seconds: float) -> None:
        tasks.append(asyncio.create_task(collect_when_idle(queue.depth, **seconds)))

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_cycles_are_freed_while_little_waits_and_not_while_much_does(
    queue: Queue, collecting: Callable[..., None]
) -> None:
    queue.images = 1000
    collecting(pause_seconds=0.01)
    await asyncio.sleep(0)
    knot = old_knot()
    await asyncio.sleep(0.2)
    assert knot() is not None
    queue.images = 3
    async with asyncio.timeout(30):
        while knot() is not None:  # noqa: ASYNC110 - a collection has no event
            await asyncio.sleep(0.01)


async def test_the_pause_after_a_collection_is_long_for_what_that_took(
    queue: Queue, collecting: Callable[..., None]
) -> None:
    collecting(pause_seconds=0.01)
    knot = old_knot()
    async with asyncio.timeout(30):
        while knot() is not None:  # noqa: ASYNC110 - a collection has no event
            await asyncio.sleep(0.01)
    knot = old_knot()
    await asyncio.sleep(0.3)  # a collection takes milliseconds, and so the next one comes after seconds
    assert knot() is not None


async def test_where_much_always_waits_cycles_are_freed_in_the_end(
    queue: Queue, collecting: Callable[..., None]
) -> None:
    queue.images = 1000
    collecting(pause_seconds=0.01, patience_seconds=0.1)
    knot = old_knot()
    async with asyncio.timeout(30):
        while knot() is not None:  # noqa: ASYNC110 - a collection has no event
            await asyncio.sleep(0.01)


async def test_python_collects_as_before_when_it_is_over(queue: Queue) -> None:
    before = gc.get_threshold()
    task = asyncio.create_task(collect_when_idle(queue.depth))
    await asyncio.sleep(0)
    assert gc.get_threshold()[:2] == before[:2] and gc.get_threshold() != before
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert gc.get_threshold() == before
