"""The least that a call costs a Python server: gRPC alone, which refuses all of them unread. Its limit in overload."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio

_DELAY = (("grpc-retry-pushback-ms", "1000"),)


async def main() -> None:
    """Say the address, and refuse until the standard input ends."""
    server = grpc.aio.server()

    async def refuse(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", _DELAY)

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("backboned.v1.ModelService", {"Predict": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"address": f"127.0.0.1:{port}"}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
