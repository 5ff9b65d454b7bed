"""The requests of one stream: a few are under way at once, and their answers keep the order."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from backboned.registry.errors import BackbonedError

Request = TypeVar("Request")
Answer = TypeVar("Answer")


async def in_order(
    requests: AsyncIterator[Request], answer: Callable[[Request], Coroutine[Any, Any, Answer]], *, window: int
) -> AsyncIterator[Answer]:
    """What `answer` returns for each of `requests`; at most `window` are under way, and no more are read meanwhile.

    The first error ends it, and what is under way is cancelled. A `BackbonedError` then says which request it is about.
    """
    free = asyncio.Semaphore(window)
    running: asyncio.Queue[asyncio.Task[Answer] | None] = asyncio.Queue()
    under_way: set[asyncio.Task[Answer]] = set()

    def ended(task: asyncio.Task[Answer]) -> None:
        under_way.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where the stream has ended and nobody waits for it

    async def read() -> None:
        try:
            async for request in requests:
                await free.acquire()
                task = asyncio.create_task(answer(request))
                under_way.add(task)
                task.add_done_callback(ended)
                running.put_nowait(task)
        finally:
            running.put_nowait(None)

    reader = asyncio.create_task(read())
    index = 0
    try:
        while (task := await running.get()) is not None:
            try:
                yield await task
            except BackbonedError as error:
                raise _about(index, error) from error
            free.release()
            index += 1
        await reader
    finally:
        reader.cancel()
        for task in under_way:
            task.cancel()


def _about(index: int, error: BackbonedError) -> BackbonedError:
    return BackbonedError(
        error.kind,
        f"request {index} of the stream: {error.message}",
        field=error.field,
        retry_delay_seconds=error.retry_delay_seconds,
    )
