"""Calls that are passed on to the daemon's own server as they are: bytes in, bytes out, nothing is understood."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from backboned.v1 import model_service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ModelService"]
PREDICT = f"/{SERVICE.full_name}/Predict"

Context = grpc.aio.ServicerContext[bytes, bytes]
Unary = Callable[[bytes, Context], Awaitable[bytes]]

_METHODS = {
    f"/{service.full_name}/{m.name}": m
    for service in (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"])
    for m in service.methods
}
_UNARY = frozenset(name for name, m in _METHODS.items() if not (m.client_streaming or m.server_streaming))
_SERVER_STREAMING = frozenset(name for name, m in _METHODS.items() if m.server_streaming and not m.client_streaming)
_OF_THE_HOP = frozenset({"user-agent", "grpc-accept-encoding", "grpc-encoding", "te", "content-type"})
"""Metadata that gRPC itself adds to each connection."""


class Proxy(grpc.GenericRpcHandler):
    """Passes every method on over `channel`: metadata, deadlines, cancellation, status and its details too.

    For one event loop.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._handlers: dict[str, Any] = {}

    def answer(self, method: str, handler: Unary) -> None:
        """Answer a unary `method` by `handler`, which takes and returns serialised messages."""
        self._handlers[method] = grpc.unary_unary_rpc_method_handler(handler)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of one call."""
        method = handler_call_details.method
        handler = self._handlers.get(method)
        if handler is not None:
            return handler
        if method in _UNARY:
            handler = grpc.unary_unary_rpc_method_handler(self.unary(method))
        elif method in _SERVER_STREAMING:
            handler = grpc.unary_stream_rpc_method_handler(self._server_streaming(method))
        else:  # as streams, on the wire, all calls look the same
            return grpc.stream_stream_rpc_method_handler(self._streaming(method))
        self._handlers[method] = handler
        return handler

    def unary(self, method: str) -> Unary:
        """What passes on a call of one message each way."""
        send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method)

        async def pass_on(request: bytes, context: Context) -> bytes:
            call = send(request, timeout=context.time_remaining(), metadata=_metadata(context))
            try:
                response: bytes = await call
                if initial := await call.initial_metadata():
                    await context.send_initial_metadata(tuple(initial))
                context.set_trailing_metadata(tuple(await call.trailing_metadata()))
            except grpc.aio.AioRpcError as error:
                await _abort(context, error)
            finally:
                call.cancel()
            return response

        return pass_on

    def _server_streaming(self, method: str) -> Callable[[bytes, Context], AsyncIterator[bytes]]:
        send: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(method)

        async def pass_on(request: bytes, context: Context) -> AsyncIterator[bytes]:
            call = send(request, timeout=context.time_remaining(), metadata=_metadata(context))
            async for response in _responses(call, context):
                yield response

        return pass_on

    def _streaming(self, method: str) -> Callable[[AsyncIterator[bytes], Context], AsyncIterator[bytes]]:
        send: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(method)

        async def pass_on(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            call = send(timeout=context.time_remaining(), metadata=_metadata(context))
            writing = asyncio.create_task(_write(call, requests))
            try:
                async for response in _responses(call, context):
                    yield response
            finally:
                writing.cancel()

        return pass_on


async def _responses(call: Any, context: Context) -> AsyncIterator[bytes]:
    """What the daemon answers to a call, with all that belongs to it."""
    try:
        await context.send_initial_metadata(tuple(await call.initial_metadata()))
        while (response := await call.read()) is not grpc.aio.EOF:
            yield response
        context.set_trailing_metadata(tuple(await call.trailing_metadata()))
    except grpc.aio.AioRpcError as error:
        await _abort(context, error)
    finally:
        call.cancel()


async def _write(call: Any, requests: AsyncIterator[bytes]) -> None:
    """Pass on requests until they, or the call, end."""
    # A write to a call that the daemon has just ended fails. `call.write` would then forget what it ended with.
    with suppress(grpc.aio.BaseError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.wait_for_connection()
        async for request in requests:
            await call._cython_call.send_serialized_message(request)
        await call.done_writing()


def _metadata(context: Context) -> grpc.aio.Metadata:
    return grpc.aio.Metadata(*(i for i in context.invocation_metadata() or () if i[0] not in _OF_THE_HOP))


async def _abort(context: Context, error: grpc.aio.AioRpcError) -> None:
    await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
