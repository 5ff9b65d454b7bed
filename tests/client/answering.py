"""A real gRPC server whose service answers as a test tells it to."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import grpc

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.api.errors import ErrorInterceptor
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server

UNAVAILABLE = BackbonedError(ErrorKind.UNAVAILABLE, "not loaded yet")


def answered(name: str) -> Any:
    """A method that answers what the test says under its `name`."""

    async def call(service: "Service", request: Any, context: Any) -> Any:
        service.requests.append(request)
        service.metadata = dict(context.invocation_metadata())
        reply = service.replies[name](request)
        if isinstance(reply, grpc.StatusCode):
            await context.abort(reply)
        return reply

    return call


class Service(ModelServiceServicer):
    """Answers from `replies`, a function a method, and keeps every request, and the last call's metadata."""

    FineTune = answered("FineTune")
    GetJob = answered("GetJob")
    ListJobs = answered("ListJobs")
    ListCheckpoints = answered("ListCheckpoints")
    ListModels = answered("ListModels")
    Predict = answered("Predict")
    SetAlias = answered("SetAlias")

    def __init__(self) -> None:
        self.replies: dict[str, Callable[[Any], Any]] = {}
        self.requests: list[Any] = []
        self.metadata: dict[str, str | bytes] = {}

    async def PredictStream(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for request in requests:
            self.requests.append(request)
            yield self.replies["Predict"](request)

    async def WatchJob(self, request: Any, _: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.requests.append(request)
        for event in self.replies["WatchJob"](request):
            if isinstance(event, BackbonedError):
                raise event
            yield event


class RunningServer:
    """A grpc.aio server in a thread of its own; `restart` brings it back on the same port."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._run(self._start()).result(10)

    def stop(self) -> None:
        self._run(self._server.stop(None)).result(10)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, work: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self) -> None:
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[("grpc.so_reuseport", 0)])
        add_ModelServiceServicer_to_server(self._service, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()


def answer(request: pb.PredictRequest) -> pb.PredictResponse:
    """A prediction an image, whose best class is the image's bytes."""
    predictions = [pb.Prediction(classes=[pb.ClassProbability(label=i.encoded.decode())]) for i in request.images]
    return pb.PredictResponse(model=request.model, version=7, predictions=predictions)


def first_fails(times: int, then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A reply that fails as unavailable so often before it succeeds."""
    left = [None] * times

    def reply(request: Any) -> Any:
        if left:
            left.pop()
            raise UNAVAILABLE
        return then(request)

    return reply
