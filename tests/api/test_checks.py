"""What is checked before a call's message is read: a refusal costs no reading, and all else is as without a check."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.api.errors import ErrorInterceptor
from backboned.v1 import model_service_pb2 as pb

FULL = BackbonedError(ErrorKind.RESOURCE_EXHAUSTED, "full; try again in 1.5 s", retry_delay_seconds=1.5)


class Desk:
    """Answers with the model's name; refuses while it is `full`."""

    def __init__(self) -> None:
        self.full = False
        self.read: list[bytes] = []
        self.time_remaining: list[float | None] = []

    def check(self, context: Any) -> None:
        self.time_remaining.append(context.time_remaining())
        if self.full:
            raise FULL

    def parse(self, message: bytes) -> pb.PredictRequest:
        self.read.append(message)
        return pb.PredictRequest.FromString(message)

    async def predict(self, request: pb.PredictRequest, _: Any) -> pb.PredictResponse:
        if request.model == "nobody":
            raise BackbonedError(ErrorKind.NOT_FOUND, "there is no model nobody")
        return pb.PredictResponse(model=request.model)


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
async def channel(desk: Desk) -> AsyncIterator[Any]:
    server = grpc.aio.server(interceptors=[ErrorInterceptor({"/tests.Desk/Predict": desk.check})])
    handler = grpc.unary_unary_rpc_method_handler(desk.predict, desk.parse, pb.PredictResponse.SerializeToString)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("tests.Desk", {"Predict": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


def ask(channel: Any, message: bytes, timeout: float | None = None) -> Any:
    return channel.unary_unary("/tests.Desk/Predict")(message, timeout=timeout)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


FLOWERS = pb.PredictRequest(model="flowers", images=[pb.Image(encoded=b"x" * 200_000)]).SerializeToString()


async def test_a_refused_call_is_not_read_and_is_told_as_any_other(channel: Any, desk: Desk) -> None:
    desk.full = True
    for _ in range(3):
        error = await refusal(ask(channel, FLOWERS))
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, FULL.message)
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"
    assert not desk.read
    desk.full = False
    assert pb.PredictResponse.FromString(await ask(channel, FLOWERS)).model == "flowers"
    assert desk.read == [FLOWERS]


async def test_the_check_knows_the_deadline(channel: Any, desk: Desk) -> None:
    await ask(channel, FLOWERS, timeout=50)
    await ask(channel, FLOWERS)
    first, second = desk.time_remaining
    assert first is not None and 40 < first < 60 and second is None  # on the wire it is rounded


async def test_what_fails_after_the_check_fails_as_ever(channel: Any) -> None:
    error = await refusal(ask(channel, pb.PredictRequest(model="nobody").SerializeToString()))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_message_of_another_kind_is_refused_and_the_next_one_is_answered(channel: Any) -> None:
    error = await refusal(ask(channel, b"\xff" * 10))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "can't be read" in str(error.details())
    assert await ask(channel, FLOWERS)


async def test_a_call_without_a_message_is_refused(channel: Any) -> None:
    call = channel.stream_unary("/tests.Desk/Predict")(iter(()))
    error = await refusal(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "no message" in str(error.details())


async def test_a_call_that_is_cancelled_before_its_message_came_leaves_no_trace(
    channel: Any, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    call = channel.stream_unary("/tests.Desk/Predict")()
    async with asyncio.timeout(30):
        while not desk.time_remaining:  # noqa: ASYNC110 - a list has no event
            await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await ask(channel, FLOWERS)
    assert desk.read == [FLOWERS]
    assert not caplog.records
