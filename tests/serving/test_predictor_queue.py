"""What is too much is refused at once, and what leaves gives its room back."""

import asyncio
from collections.abc import Callable

import pytest

from backboned.registry import BackbonedError, ErrorKind
from tests.serving.desk import TIMEOUT_SECONDS, Desk, png


async def queued(desk: Desk, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while desk.engine.depth() < count:  # noqa: ASYNC110 - a depth has no event
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("limits", [{"max_queued_images": 3}, {"max_queued_bytes": 2 * len(png(0)) + 10}])
async def test_a_full_queue_refuses_with_a_delay_and_takes_again_afterwards(
    desk_with: Callable[..., Desk], limits: dict[str, int]
) -> None:
    desk = desk_with(**limits)
    waiting = asyncio.create_task(desk.ask("flowers", png(0), png(1)))
    await queued(desk, 2)
    error = await desk.refusal("flowers", png(0), png(1))
    assert error.kind is ErrorKind.RESOURCE_EXHAUSTED and "the queue is full (2 images, " in error.message
    assert error.retry_delay_seconds is not None and 0 < error.retry_delay_seconds <= 10
    desk.engine.start()
    assert len((await waiting).predictions) == 2
    assert len((await desk.ask("flowers", png(0), png(1))).predictions) == 2


async def test_a_deadline_that_is_too_near_is_refused_and_counted_before_the_call_is_read(
    desk_with: Callable[..., Desk],
) -> None:
    desk = desk_with()
    desk.predictor.check_wait("flowers", 0.001)
    waiting = asyncio.create_task(desk.ask("flowers", png(0)))
    await queued(desk, 1)
    for model in ("flowers", "", "nobody"):
        with pytest.raises(BackbonedError, match="too long for the deadline"):
            desk.predictor.check_wait(model, 0.001)
    assert desk.telemetry.done == [(model, "RESOURCE_EXHAUSTED") for model in ("flowers", "", "")]
    desk.engine.start()
    await waiting


async def test_a_call_that_is_alone_is_let_in_whatever_its_size(desk_with: Callable[..., Desk]) -> None:
    desk = desk_with(max_queued_images=1, max_queued_bytes=1)
    desk.engine.start()
    assert len((await desk.ask("flowers", *[png(0)] * 5)).predictions) == 5


async def test_a_call_that_is_cancelled_leaves_the_queue(desk_with: Callable[..., Desk]) -> None:
    desk = desk_with(max_queued_images=4)
    leaving = asyncio.create_task(desk.ask("flowers", *[png(0)] * 3))
    await queued(desk, 3)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert desk.telemetry.done == [("flowers", "CANCELLED")]
    desk.engine.start()
    await desk.ask("flowers", png(0), png(1))
    assert desk.telemetry.batches == [2]


async def test_calls_that_wait_for_a_look_at_the_directory_count(desk_with: Callable[..., Desk]) -> None:
    """They hold their images: a flood of them, for what must be loaded first, is bounded as any other."""
    desk = desk_with(max_queued_images=3)
    flood = [asyncio.create_task(desk.refusal("nobody", png(0), png(1))) for _ in range(3)]
    kinds = sorted(error.kind.name for error in await asyncio.gather(*flood))
    assert kinds == ["NOT_FOUND", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]
    assert (await desk.refusal("nobody", png(0))).kind is ErrorKind.NOT_FOUND, "and is over when they are"
