"""From typed errors to gRPC status, once for all RPCs."""

import errno
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from backboned.registry.errors import BackbonedError, ErrorKind, invalid
from backboned.server.database import meaning

log = logging.getLogger(__name__)

DOMAIN = "backboned"

_CODES = {
    ErrorKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorKind.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorKind.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorKind.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorKind.ABORTED: grpc.StatusCode.ABORTED,
    ErrorKind.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorKind.UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    ErrorKind.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    ErrorKind.INTERNAL: grpc.StatusCode.INTERNAL,
}

_DISK = {
    errno.ENOSPC: ErrorKind.RESOURCE_EXHAUSTED,
    errno.EDQUOT: ErrorKind.RESOURCE_EXHAUSTED,
    errno.EROFS: ErrorKind.FAILED_PRECONDITION,
    errno.EACCES: ErrorKind.FAILED_PRECONDITION,
    errno.EPERM: ErrorKind.FAILED_PRECONDITION,
}

Handler = Callable[[Any, Any], Any]
Check = Callable[[Any], None]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status with details. Handlers raise `BackbonedError` and never abort.

    `checks` are made, by method, of the context of each call before its message is read, which a call that is refused
    under load then isn't. For methods with one message each way.
    """

    def __init__(self, checks: Mapping[str, Check] | None = None) -> None:
        self._checks = checks or {}
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The handler of one call: that of its method, wrapped."""
        method = handler_call_details.method
        if method in self._wrapped:
            return self._wrapped[method]
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith("/grpc."):  # health and reflection have answers of their own
            return handler
        return self._wrapped.setdefault(method, self._wrap(handler, method))

    def _wrap(self, handler: "grpc.RpcMethodHandler[Any, Any]", method: str) -> "grpc.RpcMethodHandler[Any, Any]":
        if handler.response_streaming:
            inner = handler.stream_stream or handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            wrapped: Handler = _stream(inner, method)
        elif method in self._checks:
            make = grpc.stream_unary_rpc_method_handler  # with which gRPC leaves the reading to the handler
            wrapped = _unary(_read_once_checked(handler.unary_unary, self._checks[method]), method)
        else:
            inner = handler.stream_unary or handler.unary_unary
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            wrapped = _unary(inner, method)
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


def status_of(error: BackbonedError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error, with its details."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.kind.name, domain=DOMAIN)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_delay_seconds is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_delay_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=_CODES[error.kind].value[0], message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: BackbonedError) -> NoReturn:
    await context.abort(*_told(error.kind, error.message, error.field, error.retry_delay_seconds))


@lru_cache(maxsize=64)  # under overload many calls are told the same
def _told(
    kind: ErrorKind, message: str, field: str | None, retry_delay_seconds: float | None
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    error = BackbonedError(kind, message, field=field, retry_delay_seconds=retry_delay_seconds)
    status = rpc_status.to_status(status_of(error))
    metadata = list(status.trailing_metadata)
    if retry_delay_seconds is not None:
        metadata.append(("grpc-retry-pushback-ms", str(round(retry_delay_seconds * 1000))))
    return status.code, status.details, tuple(metadata)


def expected(error: Exception) -> BackbonedError | None:
    """What an error of a disk or of the database means to the caller; None for one that nobody expected."""
    if isinstance(error, BackbonedError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        return BackbonedError(_DISK[error.errno], f"the daemon's disk can't be written: {error.strerror}")
    return meaning(error)


def unexpected(error: Exception, method: str) -> BackbonedError:
    """What the caller of `method` is told of an error that nobody expected; the log gets all of it."""
    reference = secrets.token_hex(4)
    log.error("%s failed, reference %s", method, reference, exc_info=error)
    return BackbonedError(
        ErrorKind.INTERNAL, f"an unexpected error; the daemon's log tells more under reference {reference}"
    )


def _read_once_checked(inner: Handler | None, check: Check) -> Handler:
    assert inner is not None

    async def call(_: Any, context: Any) -> Any:
        check(context)
        try:
            request = await context.read()
        except DecodeError:
            raise invalid("the message can't be read: it is of another type, or damaged") from None
        if request is grpc.aio.EOF:
            raise invalid("the call has no message")
        return await inner(request, context)

    return call


def _unary(inner: Handler | None, method: str) -> Handler:
    assert inner is not None  # gRPC gives the kind of handler that it announces

    async def call(request: Any, context: Any) -> Any:
        try:
            return await inner(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, expected(error) or unexpected(error, method))

    return call


def _stream(inner: Handler | None, method: str) -> Handler:
    assert inner is not None

    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in inner(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, expected(error) or unexpected(error, method))

    return call
