"""The requests of a stream."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.api.streams import in_order


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


async def test_answers_keep_the_order_however_long_each_takes() -> None:
    async def answer(number: int) -> int:
        for _ in range(7 - number % 7):
            await asyncio.sleep(0)
        return number

    assert [n async for n in in_order(numbers(30), answer, window=5)] == list(range(30))


async def test_no_more_than_the_window_is_under_way_and_no_more_is_read() -> None:
    read, go = 0, asyncio.Event()

    async def requests() -> AsyncIterator[int]:
        nonlocal read
        async for number in numbers(100):
            read += 1
            yield number

    async def answer(number: int) -> int:
        await go.wait()
        return number

    answers = in_order(requests(), answer, window=3)
    first = asyncio.ensure_future(anext(answers))
    for _ in range(50):
        await asyncio.sleep(0)
    assert read == 4  # three under way, and one in the hand
    go.set()
    assert await first == 0
    await answers.aclose()  # type: ignore[attr-defined]  # it is a generator
    assert read < 10


async def test_an_error_names_its_request_keeps_its_kind_and_cancels_the_rest() -> None:
    cancelled = []

    async def answer(number: int) -> int:
        if number == 2:
            raise BackbonedError(ErrorKind.RESOURCE_EXHAUSTED, "full", field="images", retry_delay_seconds=1.5)
        if number > 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(number)
                raise
        return number

    answers = []
    with pytest.raises(BackbonedError) as caught:
        answers.extend([n async for n in in_order(numbers(10), answer, window=5)])
    error = caught.value
    assert (error.kind, error.message) == (ErrorKind.RESOURCE_EXHAUSTED, "request 2 of the stream: full")
    assert (error.field, error.retry_delay_seconds) == ("images", 1.5)
    for _ in range(5):
        await asyncio.sleep(0)
    assert cancelled and set(cancelled) <= set(range(3, 8))


async def test_what_the_requests_themselves_raise_is_raised() -> None:
    async def requests() -> AsyncIterator[int]:
        yield 0
        raise ConnectionResetError

    async def answer(number: int) -> int:
        return number

    answers = in_order(requests(), answer, window=2)
    assert await anext(answers) == 0
    with pytest.raises(ConnectionResetError):
        await anext(answers)
