"""Every other call passes through a front end as if there were none."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

IMAGE = pb.Image(tensor=pb.Tensor(shape=[1, 2, 3], data=b"\0\1\2\3\4\5"))

Connect = Callable[[str], Any]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]


async def test_metadata_and_deadlines_pass_both_ways(front: Any, connect: Connect) -> None:
    stub = connect(front.address)
    call = stub.GetModel(pb.GetModelRequest(model="m"), timeout=60, metadata=(("key", "value"), ("raw-bin", b"\1\xfe")))
    assert json.loads((await call).name) == {"has_deadline": True}
    sent = [(key, value) for key, value in front.service.metadata if key in ("key", "raw-bin")]
    assert sent == [("key", "value"), ("raw-bin", b"\1\xfe")]
    assert ("first", "1") in list(await call.initial_metadata())
    assert list(await call.trailing_metadata()) == [("last-bin", b"\0\xff")]
    assert json.loads((await stub.GetModel(pb.GetModelRequest(model="m"))).name) == {"has_deadline": False}


async def test_streams_pass_as_they_come_and_end_in_the_daemon_when_their_caller_leaves(
    front: Any, connect: Connect, eventually: Eventually
) -> None:
    watch = connect(front.address).WatchJob(pb.WatchJobRequest(job_id="j", after_sequence=6))
    events = aiter(watch)
    assert [(await anext(events)).sequence for _ in range(3)] == [7, 8, 9]
    await eventually(lambda: not front.service.gate.is_set())
    front.service.gate.set()
    assert (await anext(events)).sequence == 10
    watch.cancel()
    await eventually(lambda: (front.service.waiting, front.service.cancelled) == (0, 1))


async def test_streams_both_ways_answer_one_by_one(front: Any, connect: Connect) -> None:
    answered = asyncio.Queue[int]()

    async def requests() -> AsyncIterator[pb.PredictRequest]:
        for count in (1, 2, 3):
            yield pb.PredictRequest(model="small", images=[IMAGE] * count)
            assert await answered.get() == count  # before the next one is sent

    async for answer in connect(front.address).PredictStream(requests()):
        answered.put_nowait(len(answer.predictions))
    assert front.service.passed_on == 3


def raw(channel: grpc.aio.Channel, method: str) -> Any:
    return channel.unary_unary(method)


@pytest.mark.parametrize("method", ["/other.Service/Method", "/nothing"])
async def test_a_method_that_is_not_there_is_unimplemented(front: Any, method: str) -> None:
    endings = []
    for address in (front.address, front.direct):
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await raw(channel, method)(b"")
            endings.append((failed.value.code(), failed.value.details()))
    assert endings[0] == endings[1] and endings[0][0] is grpc.StatusCode.UNIMPLEMENTED


async def test_errors_keep_their_details(front: Any, connect: Connect) -> None:
    endings = []
    for address in (front.address, front.direct):
        front.service.refusals = 1

        async def requests() -> AsyncIterator[pb.PredictRequest]:
            yield pb.PredictRequest(model="small")

        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in connect(address).PredictStream(requests()):
                pass
        error = failed.value
        endings.append((error.code(), error.details(), sorted(error.trailing_metadata())))
    assert endings[0] == endings[1]
    assert {key for key, _ in endings[0][2]} == {"grpc-status-details-bin", "grpc-retry-pushback-ms"}


async def test_the_status_of_a_stream_that_fails_while_its_caller_still_sends_is_kept(front: Any) -> None:
    def ending() -> Any:
        with grpc.insecure_channel(front.address) as channel:
            requests = (pb.PredictRequest(model="small", images=[IMAGE]) for _ in range(100))
            try:
                list(ModelServiceStub(channel).PredictStream(requests))
            except grpc.RpcError as error:
                return error.code()

    for _ in range(20):
        front.service.refusals = 1
        assert await asyncio.to_thread(ending) is grpc.StatusCode.RESOURCE_EXHAUSTED
