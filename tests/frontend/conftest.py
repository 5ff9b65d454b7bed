"""Front ends before a small service in the test's own process, whose answers tell what it was given."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found
from backboned.server.api.errors import ErrorInterceptor
from backboned.server.api.frontends import Frontends, unix_address
from backboned.server.api.handover import Answering
from backboned.server.api.predictions import to_call, to_response
from backboned.server.compute.preprocess import read, read_pixels
from backboned.server.serving.calls import Call, Pixels, Prediction, Prepared, Result, StalePreprocessing, Target
from backboned.v1 import model_service_pb2 as pb
from backboned.v1 import model_service_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]

MAX_IMAGE_PIXELS = 10_000_000


class Averages(pb_grpc.ModelServiceServicer):
    """A service whose models are preprocessings: the answer for an image is the average of each of its channels.

    `handed` counts the images that came prepared, `passed_on` the calls that came as they were. While `gate` is closed,
    calls wait in the service; `waiting` counts them, and `cancelled` those that were cancelled there.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.reset()

    def reset(self) -> None:
        self.models = {
            "small": Preprocessing(16, 16),
            "small-too": Preprocessing(16, 16),
            "large": Preprocessing(256, 224),
            "huge": Preprocessing(1024, 1024),
        }
        self.handed = self.passed_on = self.asked = self.waiting = self.cancelled = self.entered = 0
        self.refusals = 0
        self.metadata: list[tuple[str, str | bytes]] = []
        self.gate.set()

    def preprocessing(self, target: Target) -> Preprocessing | None:
        self.asked += 1
        return self.models.get(target.model)

    async def predict(self, call: Call) -> Sequence[Result]:
        self.entered += 1
        if self.refusals:
            self.refusals -= 1
            raise BackbonedError(ErrorKind.RESOURCE_EXHAUSTED, "the queue is full", retry_delay_seconds=60.0)
        self.waiting += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        if not call.images:
            raise invalid("a request needs at least one image", field="images")
        return [
            Result(target.model, 1, tuple(self._average(target, i, image) for i, image in enumerate(call.images)))
            for target in call.targets
        ]

    def _average(self, target: Target, index: int, source: bytes | Pixels | Prepared) -> Prediction:
        wanted = self.models.get(target.model)
        if wanted is None:
            raise not_found("model", target.model, self.models, field="model")
        try:
            if isinstance(source, Prepared):
                if source.preprocessing != wanted:
                    raise StalePreprocessing
                self.handed += 1
                image = source.image
            elif isinstance(source, Pixels):
                image = read_pixels(source.data, source.shape, wanted, max_pixels=MAX_IMAGE_PIXELS)
            else:
                image = read(source, wanted, max_pixels=MAX_IMAGE_PIXELS)
        except StalePreprocessing:
            raise
        except BackbonedError as error:
            raise BackbonedError(error.kind, f"image {index}: {error.message}", field=f"images[{index}]") from error
        channels = image.double().mean((1, 2)).tolist()
        return Prediction(str(index), tuple(zip(("red", "green", "blue"), channels, strict=True)))

    async def Predict(self, request: pb.PredictRequest, _: Context) -> pb.PredictResponse:  # noqa: N802
        self.passed_on += 1
        return to_response(request, await self.predict(to_call(request)))

    async def PredictStream(  # noqa: N802
        self, requests: AsyncIterator[pb.PredictRequest], _: Context
    ) -> AsyncIterator[pb.PredictResponse]:
        async for request in requests:
            yield await self.Predict(request, _)

    async def GetModel(self, _: pb.GetModelRequest, context: Context) -> pb.Model:  # noqa: N802
        """Tells what came with the call, as JSON, in its answer and beside it."""
        self.metadata = [*(context.invocation_metadata() or ())]
        await context.send_initial_metadata((("first", "1"),))
        context.set_trailing_metadata((("last-bin", b"\0\xff"),))
        return pb.Model(name=json.dumps({"has_deadline": (context.time_remaining() or 1e9) < 3600}))

    async def WatchJob(self, request: pb.WatchJobRequest, _: Context) -> AsyncIterator[pb.JobEvent]:  # noqa: N802
        """Events without end, each once the gate is open."""
        sequence = request.after_sequence
        self.waiting += 1
        try:
            while True:
                await self.gate.wait()
                sequence += 1
                yield pb.JobEvent(sequence=sequence)
                if sequence % 3 == 0:
                    self.gate.clear()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1


class Front:
    """Front ends, and what is behind them."""

    def __init__(self, service: Averages, frontends: Frontends, address: str, path: Path) -> None:
        self.service, self.frontends, self.address, self.path = service, frontends, address, path
        self.direct = unix_address(path)


Start = Callable[..., Awaitable[Front]]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture
def eventually() -> Eventually:
    """Waits until a condition holds; fails when it doesn't within half a minute."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110 - what it looks at has no events
                await asyncio.sleep(0.01)

    return wait


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Start]:
    """Starts front ends before a service of `Averages`; all is stopped at the end."""
    async with AsyncExitStack() as stack:

        async def begin(count: int = 1, port: int = 0) -> Front:
            service = Averages()  # type: ignore[abstract]  # the base answers for what is missing
            server = grpc.aio.server(
                interceptors=[ErrorInterceptor()], options=[("grpc.max_receive_message_length", 2**26)]
            )
            pb_grpc.add_ModelServiceServicer_to_server(service, server)
            frontends = Frontends(
                count,
                Answering(service.predict, service.preprocessing, lambda _: None),
                folder=tmp_path_factory.mktemp("state") / "front ends, 100 %",
                max_message_bytes=2**26,
                max_image_pixels=MAX_IMAGE_PIXELS,
            )
            path = frontends.make_socket()
            server.add_insecure_port(unix_address(path))
            await server.start()
            stack.callback(frontends.remove_socket)
            stack.push_async_callback(server.stop, 0)
            stack.push_async_callback(frontends.stop, 0)
            port = await frontends.start("127.0.0.1", port)
            return Front(service, frontends, f"127.0.0.1:{port}", path)

        yield begin


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_front(start: Start) -> Front:
    """One front end for a file of tests."""
    return await start()


@pytest.fixture
def front(one_front: Front) -> Front:
    """The same, with a service that has forgotten what was before."""
    one_front.service.reset()
    return one_front


@pytest_asyncio.fixture(loop_scope="module")
async def connect() -> AsyncIterator[Callable[[str], Any]]:
    """Makes stubs, each with a connection of its own; they are closed at the end."""
    async with AsyncExitStack() as stack:

        def stub(address: str) -> Any:
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 2**26)]
            channel = grpc.aio.insecure_channel(address, options=options)
            stack.push_async_callback(channel.close)
            return pb_grpc.ModelServiceStub(channel)

        yield stub
