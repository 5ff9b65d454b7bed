"""The processes that share the public port, as one thing."""

import asyncio
import socket
from contextlib import suppress
from pathlib import Path

from backboned.server.api.frontend_keeper import SLOT_BYTES, FrontendKeeper
from backboned.server.api.handover import Answering
from backboned.server.compute.device import usable_cores
from backboned.server.frontend.settings import FrontendSettings
from backboned.server.listening import private_socket, reserve

SOCKET_NAME = "grpc.sock"


def frontends_for(cores: int, device_type: str) -> int:
    """How many front ends `auto` means, for that many CPU cores and a `device_type` of torch's.

    On a CPU there are none: preparing images would take the cores from the networks, in whatever process it runs.
    """
    return 0 if device_type == "cpu" else min(8, max(0, cores // 2 - 1))


class Frontends:
    """`count` front ends, which hand what they are asked to `answering`. For one event loop.

    `folder` is made for the socket by which they reach the daemon's own server, and goes with it.
    """

    def __init__(
        self, count: int, answering: Answering, *, folder: Path, max_message_bytes: int, max_image_pixels: int
    ) -> None:
        self._folder = folder
        self._decode_threads = max(1, usable_cores() // max(1, count))
        self._max_message_bytes = max_message_bytes
        self._max_image_pixels = max_image_pixels
        self._settings: asyncio.Future[FrontendSettings] = asyncio.get_running_loop().create_future()
        self._keepers = [FrontendKeeper(i, answering, self._settings) for i in range(1, count + 1)]
        self._reserved: socket.socket | None = None
        self._socket: Path | None = None

    def launch(self) -> None:
        """Start the processes, which take seconds to import what they need. They don't listen yet."""
        for keeper in self._keepers:
            keeper.launch()

    def make_socket(self) -> Path:
        """The path of a Unix socket that only this user can reach, for the daemon's own server to make."""
        self._socket = private_socket(self._folder, SOCKET_NAME)
        return self._socket

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, a free one for 0. Raises `OSError` if it can't be had."""
        assert self._socket is not None, "make_socket comes first"
        self._reserved = reserve(host, port, "gRPC")
        port = self._reserved.getsockname()[1]
        self.launch()
        self._settings.set_result(
            FrontendSettings(
                host,
                port,
                unix_address(self._socket),
                slot_bytes=SLOT_BYTES,
                decode_threads=self._decode_threads,
                max_message_bytes=self._max_message_bytes,
                max_image_pixels=self._max_image_pixels,
            )
        )
        await asyncio.gather(*(keeper.listening for keeper in self._keepers))
        return port

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new calls, finish those in flight within `drain_seconds`, and end the processes."""
        await asyncio.gather(*(keeper.stop(drain_seconds) for keeper in self._keepers))
        if self._reserved is not None:
            self._reserved.close()

    def remove_socket(self) -> None:
        """Remove what `make_socket` led to, once nobody listens there any more."""
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
            with suppress(OSError):
                self._socket.parent.rmdir()


def unix_address(path: Path) -> str:
    """gRPC's address of a Unix socket."""
    return f"unix:{path}"
