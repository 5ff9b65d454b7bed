"""The end of a gRPC server's handlers."""

import asyncio

_OF_A_CALL = ("_schedule_rpc_coro", "_handle_exceptions")
"""Coroutines of `grpc.aio`, of which each call has its own."""


async def handlers_ended(timeout_seconds: float = 1.0) -> None:
    """Wait until the handlers of a server that has stopped have come to their ends.

    `grpc.aio` says that it has stopped when their answers are sent. Where the loop then ends before they do, they are
    cancelled, and a traceback is logged for a call that went well.
    """
    calls = [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__name__", "") in _OF_A_CALL]
    if calls:
        await asyncio.wait(calls, timeout=timeout_seconds)
