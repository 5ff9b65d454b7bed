"""A handler whose answer is sent may still have something to do: the loop waits for it."""

import asyncio
from typing import Any

import grpc

from backboned.server.handlers import handlers_ended


async def test_handlers_end_before_the_loop_does() -> None:
    ended = asyncio.Event()

    async def answer(_: bytes, context: Any) -> bytes:
        del context
        try:
            await asyncio.sleep(0.3)
        except asyncio.CancelledError:  # the server stops without any grace, and this takes its time
            await asyncio.sleep(0.2)
            ended.set()
            raise
        return b""

    class Answers(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            del handler_call_details
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Answers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask: Any = channel.unary_unary("/a/b")
        call = ask(b"")
        await asyncio.sleep(0.1)
        await server.stop(0)
        await handlers_ended(5)
        assert ended.is_set()
        call.cancel()
    await handlers_ended()  # of which there are none any more
