"""Health, as `grpc.health.v1` has it.

The package's own servicer won't do: a watcher that leaves takes the news from all others, and watchers, who never end
by themselves, hold up a stop until the whole drain time is over.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """Tells whether the server, and its `service`, can be called. For one event loop."""

    def __init__(self, service: str) -> None:
        self._names = ("", service)
        self._serving = False
        self._ended = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """What is answered from now on; watchers are told."""
        self._serving = serving
        self._wake_watchers()

    def end(self) -> None:
        """End all watching, once each watcher has the last news."""
        self._ended = True
        self._wake_watchers()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The health of a service, or of the server as a whole where none is named."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service; known: {self._names[1]}")
        return self._answer(request)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The health now, and whenever it changes, until the server stops."""
        told = None
        while True:
            changed = self._changed
            if (answer := self._answer(request)) != told:
                yield answer
                told = answer
            elif self._ended:
                return
            else:
                await changed.wait()

    def _answer(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse.SERVING if self._serving else health_pb2.HealthCheckResponse.NOT_SERVING
        if request.service not in self._names:
            status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return health_pb2.HealthCheckResponse(status=status)

    def _wake_watchers(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
