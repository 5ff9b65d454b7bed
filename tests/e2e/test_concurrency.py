"""Many callers at once, over models on different backbones and versions of one, while a FineTune runs."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from io import BytesIO

import grpc
import pytest
from PIL import Image

from backboned.client import Client
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

CALLS = 1000
TARGETS: tuple[tuple[str, dict[str, object], int], ...] = (
    ("flowers", {}, 3),
    ("flowers", {"version": 1}, 1),
    ("flowers", {"version": 2}, 2),
    ("flowers", {"version": 3}, 3),
    ("flowers", {"alias": "stable"}, 1),
    ("flowers", {"alias": "latest"}, 3),
    ("scenes", {}, 1),
)


@pytest.fixture
def training(
    client: Client, train_long: Callable[[Client, str], pb.Job], wait_for: Callable[[Callable[[], object]], None]
) -> Iterator[str]:
    """The id of a job that trains the next version of `flowers`, and has a checkpoint already."""
    job = train_long(client, "flowers")
    begun = epochs(client, job.id)
    yield job.id
    wait_for(lambda: epochs(client, job.id) > begun)  # it gave way to the calls, and goes on
    assert client.cancel_job(job.id).state == pb.JOB_STATE_CANCELLED


def pictures(photo: bytes) -> list[Image.Image]:
    """Different views of a photo, of different sizes."""
    whole = Image.open(BytesIO(photo)).convert("RGB")
    turned = [whole.rotate(40 * i).crop((10 * i, 5 * i, 320 - 10 * i, 240 - 5 * i)) for i in range(6)]
    return [whole, whole.convert("L").convert("RGB"), *turned]


def bmp(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "BMP")
    return file.getvalue()


async def test_a_thousand_calls_at_once_are_all_answered_right_while_a_finetune_runs(
    served: LocalDaemon,
    client: Client,
    training: str,
    truth: Callable[[str, int, Image.Image], dict[str, float]],
    photo: bytes,
) -> None:
    views = pictures(photo)
    files = [bmp(view) for view in views]
    expected = {
        (model, version, i): truth(model, version, view)
        for model, version in {(model, version) for model, _, version in TARGETS}
        for i, view in enumerate(views)
    }
    rng = random.Random(0)
    plan = [
        (target, rng.sample(range(len(views)), rng.randint(1, 2)))
        for target in itertools.islice(itertools.cycle(TARGETS), CALLS)
    ]

    async with grpc.aio.insecure_channel(served.grpc) as channel:
        stub = ModelServiceStub(channel)

        async def ask(target: tuple[str, dict[str, object], int], images: list[int]) -> pb.PredictResponse:
            model, which, _ = target
            sent = [pb.Image(encoded=files[i]) for i in images]
            return await stub.Predict(pb.PredictRequest(model=model, images=sent, **which))  # type: ignore[arg-type]

        answers = await asyncio.gather(*(ask(*call) for call in plan))

    assert len(answers) == CALLS
    for ((model, which, version), images), answer in zip(plan, answers, strict=True):
        assert (answer.model, answer.version) == (model, version), which
        assert len(answer.predictions) == len(images)
        for i, prediction in zip(images, answer.predictions, strict=True):
            found = {c.label: c.probability for c in prediction.classes}
            assert found == pytest.approx(expected[model, version, i], abs=1e-4)
    assert len({p.id for a in answers for p in a.predictions}) == sum(len(images) for _, images in plan)
    assert client.get_job(training).state == pb.JOB_STATE_RUNNING


def epochs(client: Client, job_id: str) -> int:
    """How many epochs a job has on disk."""
    version = client.get_job(job_id).version
    return len(list(client.list_checkpoints(model="flowers", filter=f"version = {version}")))


async def test_a_flood_of_one_model_with_long_deadlines_delays_no_other_ones_short_one(
    served: LocalDaemon, photo: bytes
) -> None:
    async with grpc.aio.insecure_channel(served.grpc) as floods, grpc.aio.insecure_channel(served.grpc) as calls:
        flood, stub = ModelServiceStub(floods), ModelServiceStub(calls)
        many = pb.PredictRequest(model="scenes", images=[pb.Image(encoded=photo)] * 128)
        one = pb.PredictRequest(model="flowers", images=[pb.Image(encoded=photo)])
        waits: list[float] = []

        async def ask() -> None:
            while True:
                began = time.monotonic()
                await flood.Predict(many, timeout=600)
                waits.append(time.monotonic() - began)

        flooding = [asyncio.create_task(ask()) for _ in range(8)]
        try:
            async with asyncio.timeout(300):
                while len(waits) < 24:  # noqa: ASYNC110 - by then each call finds a full queue before it
                    await asyncio.sleep(0.01)
                patience = 0.5 * min(waits[16:])
                answers = [await stub.Predict(one, timeout=patience) for _ in range(20)]
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Predict(many, timeout=patience)
                unread = [await code(calls, model, patience) for model in ("scenes", "flowers", "nobody", None)]
        finally:
            for task in flooding:
                task.cancel()
            await asyncio.gather(*flooding, return_exceptions=True)
    assert len(answers) == 20
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert unread == ["RESOURCE_EXHAUSTED"] + ["INVALID_ARGUMENT"] * 3


async def code(channel: grpc.aio.Channel, model: str | None, patience: float) -> str:
    """What becomes of a Predict call whose message can't be read; its metadata names a model, or none."""
    metadata = None if model is None else (("backboned-model", model),)
    predict: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
    predict = channel.unary_unary("/backboned.v1.ModelService/Predict")
    return (await predict(b"\xff", timeout=patience, metadata=metadata).code()).name
