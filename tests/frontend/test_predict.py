"""Predict by a front end answers as without one, whatever happens on the way."""

import asyncio
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any

import grpc
import pytest
from PIL import Image

from backboned.registry.backbone import Preprocessing
from backboned.v1 import model_service_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

Connect = Callable[[str], Any]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]


def picture(red: int = 200, green: int = 100, blue: int = 50, side: int = 40) -> pb.Image:
    """A PNG that isn't the same everywhere."""
    image = Image.new("RGB", (side, side + 10), (red, green, blue))
    image.paste((green, blue, red), (0, 0, side // 3, side // 2))
    file = BytesIO()
    image.save(file, "PNG")
    return pb.Image(encoded=file.getvalue())


RAW = pb.Image(tensor=pb.Tensor(shape=[20, 30, 3], data=bytes(i % 251 for i in range(20 * 30 * 3))))


async def status(call: Awaitable[object]) -> tuple[Any, ...]:
    """All that a failed call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    error = failed.value
    return error.code(), error.details(), sorted(error.trailing_metadata())


async def test_images_are_handed_over_prepared_and_the_answers_are_the_same(front: Any, connect: Connect) -> None:
    stub, direct = connect(front.address), connect(front.direct)
    requests = [
        pb.PredictRequest(model="small", images=[picture(), RAW, picture(1, 2, 3)]),
        pb.PredictRequest(model="large", images=[picture(9, 99, 199, side=300)]),
        pb.PredictRequest(models=[pb.ModelTarget(model=m) for m in ("small", "small-too")], images=[picture(), RAW]),
    ]
    answers = await asyncio.gather(*(stub.Predict(request) for request in requests * 3))
    assert (front.service.handed, front.service.passed_on) == (3 * (3 + 1 + 2 * 2), 0)
    assert answers == [await direct.Predict(request) for request in requests] * 3
    assert len({str(answer) for answer in answers}) == len(requests)


async def test_the_daemon_is_asked_once_how_images_for_a_model_are_prepared(front: Any, connect: Connect) -> None:
    stub = connect(front.address)
    front.service.models["new"] = Preprocessing(16, 16)
    for _ in range(3):
        await stub.Predict(pb.PredictRequest(model="new", images=[RAW]))
        await stub.Predict(pb.PredictRequest(model="new", version=1, images=[RAW]))
        await stub.Predict(pb.PredictRequest(model="new", alias="1", images=[RAW]))
    assert (front.service.asked, front.service.handed) == (3, 9)


async def test_what_is_wrong_is_said_by_the_daemon(front: Any, connect: Connect) -> None:
    stub, direct = connect(front.address), connect(front.direct)
    broken = pb.Image(encoded=picture().encoded[:60])
    for wrong in (
        pb.PredictRequest(model="small", images=[picture(), broken]),
        pb.PredictRequest(model="small", images=[pb.Image(encoded=b"GIF8")]),
        pb.PredictRequest(model="small", images=[pb.Image(tensor=pb.Tensor(shape=[1, 1, 3], data=b"12"))]),
        pb.PredictRequest(model="small", images=[pb.Image()]),
        pb.PredictRequest(model="small", images=[pb.Image(dataset_image="a/b")]),
        pb.PredictRequest(model="small", images=[picture(side=4000)]),
        pb.PredictRequest(model="small"),
        pb.PredictRequest(model="smal", images=[picture()]),
        pb.PredictRequest(model="small", models=[pb.ModelTarget(model="small")], images=[picture()]),
        pb.PredictRequest(models=[pb.ModelTarget(model="small")] * 65, images=[picture()]),
    ):
        for _ in range(2):
            assert await status(stub.Predict(wrong)) == await status(direct.Predict(wrong))
    good = pb.PredictRequest(model="small", images=[picture()])
    assert await stub.Predict(good) == await direct.Predict(good)


async def test_bytes_that_are_no_message_end_as_without_front_ends(front: Any) -> None:
    codes = []
    for address in (front.address, front.direct):
        async with grpc.aio.insecure_channel(address) as channel:
            predict: Any = channel.unary_unary("/backboned.v1.ModelService/Predict")
            codes.append(await status(predict(b"\xff\xff")))
    assert codes[0] == codes[1]


async def test_a_model_that_is_prepared_otherwise_by_now_is_answered_right(front: Any, connect: Connect) -> None:
    stub, direct = connect(front.address), connect(front.direct)
    request = pb.PredictRequest(model="changing", images=[picture(side=300)])
    front.service.models["changing"] = Preprocessing(16, 16)
    before = await stub.Predict(request)
    front.service.models["changing"] = Preprocessing(256, 32)
    after = [await stub.Predict(request) for _ in range(3)]
    assert after == [await direct.Predict(request)] * 3 and after[0] != before
    assert front.service.handed == 1 + 2  # before, and all after but the first, which was passed on


async def test_images_that_fit_into_no_slot_or_too_many_are_passed_on(front: Any, connect: Connect) -> None:
    stub = connect(front.address)
    huge = pb.PredictRequest(model="huge", images=[RAW])
    many = pb.PredictRequest(model="small", images=[RAW] * 513)
    mixed = pb.PredictRequest(models=[pb.ModelTarget(model=m) for m in ("small", "large")], images=[RAW])
    for request, answers in ((huge, 1), (many, 513), (mixed, 0)):
        assert len((await stub.Predict(request)).predictions) == answers
    assert (front.service.handed, front.service.passed_on) == (0, 3)


async def test_calls_that_are_cancelled_or_late_end_in_the_daemon_and_give_back_their_slots(
    front: Any, connect: Connect, eventually: Eventually
) -> None:
    stub, service = connect(front.address), front.service
    full = pb.PredictRequest(model="small", images=[RAW] * 256)
    await stub.Predict(full)
    service.gate.clear()
    calls = [stub.Predict(full) for _ in range(2)]
    await eventually(lambda: service.waiting == 2)
    assert service.passed_on == 0
    for call in calls:
        call.cancel()
    await eventually(lambda: service.cancelled == 2)
    assert (await status(stub.Predict(full, timeout=0.5)))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: service.waiting == 0)
    in_the_pool = [stub.Predict(full) for _ in range(2)]  # likely cancelled before or while images are prepared
    for call in in_the_pool:
        call.cancel()
    service.gate.set()

    async def all_slots_are_free() -> bool:
        before = service.passed_on
        await asyncio.gather(*(stub.Predict(full) for _ in range(2)))
        return bool(service.passed_on == before)

    async with asyncio.timeout(30):
        while not await all_slots_are_free():  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(0.01)


async def test_a_full_daemon_is_not_asked_again_at_once(front: Any, connect: Connect) -> None:
    stub, service = connect(front.address), front.service
    request = pb.PredictRequest(model="small", images=[RAW] * 2)
    await stub.Predict(request)
    service.refusals, entered = 1, service.entered
    first = await status(stub.Predict(request))
    assert first[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    assert ("grpc-retry-pushback-ms", "60000") in first[2]
    refused = 0
    while service.entered == entered + 1:  # until it is asked again
        try:
            await stub.Predict(request)
        except grpc.aio.AioRpcError as error:
            assert (error.code(), error.details(), sorted(error.trailing_metadata())) == first
            refused += 1
    assert refused > 0
    await stub.Predict(pb.PredictRequest(model="large", images=[RAW]))


async def test_a_smaller_call_is_tried_after_a_refusal(front: Any, connect: Connect) -> None:
    stub = connect(front.address)
    request = pb.PredictRequest(model="small", images=[RAW] * 2)
    await stub.Predict(request)
    front.service.refusals = 1
    await status(stub.Predict(request))
    assert len((await stub.Predict(pb.PredictRequest(model="small", images=[RAW]))).predictions) == 1
