"""The process of a front end: `python -m backboned.server.frontend.process LINK IMAGES`, both file descriptors.

LINK is a socket to the daemon, IMAGES the memory that they share. It lives as long as the link, whatever signals come:
the daemon tells it when to stop, and is gone where the link ends.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys

import grpc
import torch

from backboned.server.frontend.frames import Kind
from backboned.server.frontend.link import Link
from backboned.server.frontend.predict import Predict
from backboned.server.frontend.proxy import PREDICT, Proxy
from backboned.server.frontend.settings import FrontendSettings
from backboned.server.frontend.slots import Slots
from backboned.server.handlers import handlers_ended

log = logging.getLogger(__name__)


class Frontend:
    """Serves on the public port what the daemon answers. For one event loop."""

    def __init__(self, link: Link, images: int, settings: FrontendSettings) -> None:
        self._settings = settings
        # What a message may measure is for the daemon to say.
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.aio.insecure_channel(settings.daemon, options=unlimited)
        proxy = Proxy(self._channel)
        self._predict = Predict(
            link,
            Slots(images, settings.slot_bytes),
            proxy.unary(PREDICT),
            decode_threads=settings.decode_threads,
            max_image_pixels=settings.max_image_pixels,
        )
        proxy.answer(PREDICT, self._predict.answer)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", 1),
            ]
        )
        self._server.add_generic_rpc_handlers((proxy,))

    async def start(self) -> None:
        """Listen. Raises `RuntimeError` if the address can't be had."""
        host, port = self._settings.host, self._settings.port
        self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        await self._server.start()

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new calls, finish those in flight within `drain_seconds`, then cancel the rest."""
        await self._server.stop(drain_seconds)
        await handlers_ended()
        self._predict.close()
        await self._channel.close()


async def serve(link_socket: socket.socket, images: int) -> None:
    """Serve until the daemon says that it is enough. Where the daemon is gone, the process ends on the spot."""
    orders: asyncio.Queue[tuple[Kind, bytes]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(
        lambda: Link(lambda kind, payload: orders.put_nowait((kind, payload))), sock=link_socket
    )
    link.lost.add_done_callback(lambda _: os._exit(1))
    _, settings = await orders.get()
    frontend = Frontend(link, images, FrontendSettings.from_json(settings))
    await frontend.start()
    link.send(Kind.LISTENING)
    _, drain_seconds = await orders.get()
    await frontend.stop(json.loads(drain_seconds))


def main() -> None:
    """Run a front end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also sent to all processes of a terminal, or of a systemd unit
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    link, images = map(int, sys.argv[1:])
    asyncio.run(serve(socket.socket(fileno=link), images))


if __name__ == "__main__":
    main()
