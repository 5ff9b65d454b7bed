"""The gRPC server: the service, health and reflection on one port."""

import errno

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from backboned.server.api.errors import ErrorInterceptor
from backboned.server.api.frontends import Frontends, unix_address
from backboned.server.api.health import Health
from backboned.server.api.service import ModelService
from backboned.server.handlers import handlers_ended
from backboned.server.listening import listen
from backboned.v1 import model_service_pb2 as pb
from backboned.v1 import model_service_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["ModelService"].full_name


class GrpcServer:
    """The service on a port. For one event loop.

    With `frontends`, these have the port, and the server is behind them, on a Unix socket in a folder of theirs.
    """

    def __init__(self, service: ModelService, *, max_message_bytes: int, frontends: Frontends | None = None) -> None:
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor({f"/{SERVICE}/Predict": service.check_wait})],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._frontends = frontends
        self._health = Health(SERVICE)
        pb_grpc.add_ModelServiceServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def launch(self) -> None:
        """Start the front ends' processes, if there are to be some: what they import takes its time."""
        if self._frontends is not None:
            self._frontends.launch()

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, a free one for 0. Raises `OSError` if it can't be had."""
        if self._frontends is not None:
            return await self._start_behind(self._frontends, host, port)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            listen(host, port, "gRPC").close()  # gRPC itself would say less, on lines of its own
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(errno.EADDRNOTAVAIL, f"can't listen on {address} for gRPC: {error}") from error
        await self._server.start()
        return bound

    def set_serving(self, serving: bool) -> None:
        """What health answers, for the server as a whole and for the service."""
        self._health.set_serving(serving)

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new calls, finish those in flight within `drain_seconds`, then cancel the rest."""
        self._health.end()
        if self._frontends is not None:
            await self._frontends.stop(drain_seconds)  # before what they stand on
        await self._server.stop(drain_seconds)
        await handlers_ended()
        if self._frontends is not None:
            self._frontends.remove_socket()

    async def _start_behind(self, frontends: Frontends, host: str, port: int) -> int:
        path = frontends.make_socket()
        self._server.add_insecure_port(unix_address(path))
        path.chmod(0o600)
        await self._server.start()
        return await frontends.start(host, port)
