"""What a handler raises reaches the caller as a status with details, over a real server; a surprise tells nothing."""

import asyncio
import errno
import logging
import os
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy.exc import OperationalError

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.api.errors import ErrorInterceptor
from backboned.server.database import hasty_transaction, open_database

TIMEOUT_SECONDS = 30.0


class Service:
    """One RPC of each kind, on plain bytes, which fail as they are told to; and one that is never done."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.begun, self.left = asyncio.Event(), asyncio.Event()

    def handlers(self) -> dict[str, Any]:
        return {
            "one_one": grpc.unary_unary_rpc_method_handler(self.one_one),
            "one_many": grpc.unary_stream_rpc_method_handler(self.one_many),
            "many_one": grpc.stream_unary_rpc_method_handler(self.many_one),
            "many_many": grpc.stream_stream_rpc_method_handler(self.many_many),
            "never": grpc.unary_unary_rpc_method_handler(self.never),
        }

    def fail(self) -> None:
        if self.error is not None:
            raise self.error

    async def one_one(self, request: bytes, _: Any) -> bytes:
        self.fail()
        return request

    async def one_many(self, request: bytes, _: Any) -> AsyncIterator[bytes]:
        yield request
        self.fail()
        yield request

    async def many_one(self, requests: AsyncIterator[bytes], _: Any) -> bytes:
        answer = b"".join([request async for request in requests])
        self.fail()
        return answer

    async def many_many(self, requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
        self.fail()

    async def never(self, request: bytes, _: Any) -> bytes:
        self.begun.set()
        try:
            await asyncio.sleep(TIMEOUT_SECONDS)
        finally:
            self.left.set()
        return request


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def channel(service: Service) -> AsyncIterator[Any]:
    """To a real server that has the interceptor before the service."""
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("tests.Service", service.handlers())])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def one_one(channel: Any) -> list[bytes]:
    return [await channel.unary_unary("/tests.Service/one_one")(b"x")]


async def one_many(channel: Any) -> list[bytes]:
    return [answer async for answer in channel.unary_stream("/tests.Service/one_many")(b"x")]


async def many_one(channel: Any) -> list[bytes]:
    return [await channel.stream_unary("/tests.Service/many_one")(iter([b"x", b"y"]))]


async def many_many(channel: Any) -> list[bytes]:
    return [answer async for answer in channel.stream_stream("/tests.Service/many_many")(iter([b"x", b"y"]))]


Ask = Callable[[Any], Awaitable[list[bytes]]]
EACH_KIND_OF_RPC = pytest.mark.parametrize("ask", [one_one, one_many, many_one, many_many])


async def failure(channel: Any, ask: Ask = one_one) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """The error that a call ends in, and the details of its status by name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel)
    error = caught.value
    status = rpc_status.from_call(error)
    assert status is not None and (status.code, status.message) == (error.code().value[0], error.details())
    found: dict[str, Any] = {}
    for detail in status.details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(found[name])
    return error, found


async def test_what_does_not_fail_passes(channel: Any) -> None:
    answers = [await ask(channel) for ask in (one_one, one_many, many_one, many_many)]
    assert answers == [[b"x"], [b"x", b"x"], [b"xy"], [b"x", b"y"]]


@pytest.mark.parametrize("kind", ErrorKind)
async def test_every_kind_of_error_is_a_status_of_its_own_with_its_name(
    channel: Any, service: Service, kind: ErrorKind
) -> None:
    service.error = BackbonedError(kind, f"it is {kind.value}; do otherwise")
    error, details = await failure(channel)
    assert error.code() is grpc.StatusCode[kind.name]
    assert error.details() == f"it is {kind.value}; do otherwise"
    assert details == {"ErrorInfo": error_details_pb2.ErrorInfo(reason=kind.name, domain="backboned")}


@EACH_KIND_OF_RPC
async def test_it_is_the_same_for_each_kind_of_rpc(channel: Any, service: Service, ask: Ask) -> None:
    service.error = BackbonedError(ErrorKind.NOT_FOUND, "no such thing")
    error, details = await failure(channel, ask)
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
    assert details["ErrorInfo"].reason == "NOT_FOUND"


async def test_the_field_at_fault_is_named(channel: Any, service: Service) -> None:
    service.error = BackbonedError(ErrorKind.INVALID_ARGUMENT, "image 2: broken", field="images[2]")
    _, details = await failure(channel)
    (violation,) = details["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("images[2]", "image 2: broken")


async def test_a_delay_is_told_to_people_and_to_grpcs_own_retries(channel: Any, service: Service) -> None:
    service.error = BackbonedError(ErrorKind.RESOURCE_EXHAUSTED, "full", retry_delay_seconds=1.25)
    error, details = await failure(channel)
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1250
    assert ("grpc-retry-pushback-ms", "1250") in [(k, v) for k, v in error.trailing_metadata() or ()]


@pytest.mark.parametrize("message", ["Gänseblümchen 雛菊 🌼", "of two\nlines", "é" * 20_000, "\udcff.pt", ""])
async def test_whatever_the_message_it_arrives(channel: Any, service: Service, message: str) -> None:
    service.error = told = BackbonedError(ErrorKind.DATA_LOSS, message, field="images[0]")
    error, _ = await failure(channel)
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, told.message)


@EACH_KIND_OF_RPC
async def test_an_unknown_error_gets_a_reference_and_its_traceback_goes_to_the_log_alone(
    channel: Any, service: Service, caplog: pytest.LogCaptureFixture, ask: Ask
) -> None:
    service.error = ZeroDivisionError("the secret inside")
    with caplog.at_level(logging.ERROR):
        error, details = await failure(channel, ask)
    assert error.code() is grpc.StatusCode.INTERNAL and details["ErrorInfo"].reason == "INTERNAL"
    words = str(error.details())
    found = re.fullmatch(r"an unexpected error; the daemon's log tells more under reference ([0-9a-f]{8})", words)
    assert found is not None
    assert "secret" not in repr(error.trailing_metadata()) and "Traceback" not in repr(error.trailing_metadata())
    (record,) = caplog.records
    assert found[1] in record.getMessage() and record.exc_info and record.exc_info[1] is service.error


async def test_an_rpc_that_does_not_exist_is_grpcs_own_affair(channel: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/tests.Service/missing")(b"x")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_caller_who_leaves_is_no_error(
    channel: Any, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    call = channel.unary_unary("/tests.Service/never")(b"x")
    await asyncio.wait_for(service.begun.wait(), TIMEOUT_SECONDS)
    call.cancel()
    await asyncio.wait_for(service.left.wait(), TIMEOUT_SECONDS)
    assert await one_one(channel) == [b"x"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errno.EROFS, grpc.StatusCode.FAILED_PRECONDITION),
        (errno.EACCES, grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_a_disk_that_cannot_be_written_is_no_defect(
    channel: Any, service: Service, number: int, code: grpc.StatusCode
) -> None:
    service.error = OSError(number, os.strerror(number), "/a/path/of/the/daemon")
    error, _ = await failure(channel)
    assert error.code() is code
    assert error.details() == f"the daemon's disk can't be written: {os.strerror(number)}"


@EACH_KIND_OF_RPC
async def test_a_database_that_is_locked_is_worth_another_try(
    channel: Any, service: Service, ask: Ask, tmp_path: Path
) -> None:
    database = open_database(tmp_path / "db.sqlite")
    with closing(sqlite3.connect(tmp_path / "db.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        try:
            with hasty_transaction(database, 0):
                pytest.fail("it was not locked")
        except OperationalError as locked:
            service.error = locked
    database.dispose()
    error, details = await failure(channel, ask)
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "the database is locked" in str(error.details())
    assert details["RetryInfo"].retry_delay.seconds == 1
