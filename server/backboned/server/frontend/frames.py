"""What a front end and the daemon say to each other: frames over a pair of sockets that has no name.

Each front end has one such link. The link is also its life line: where it ends, the other side is gone.
"""

import asyncio
import struct
from enum import IntEnum

_HEADER = struct.Struct("<BII")
"""The kind, the number of the call or question that it is about, and the payload's length in bytes."""

PUSHBACK = struct.Struct("<i")
"""Before a failure's status: milliseconds until the call may be tried again; negative: none are named."""

CALL = struct.Struct("<HH")
"""Of a call: the number of the preprocessing, as it was told, and how many images follow."""

IMAGE = struct.Struct("<Hf")
"""Of an image: the slot that it is in, and the seconds that preparing it took."""


class Kind(IntEnum):
    """What a frame says, and its payload."""

    # From the daemon.
    SERVE = 1  # begin to listen: FrontendSettings as JSON
    TOLD = 2  # the preprocessing that was asked for, as JSON with its `number`; empty: it can't be told
    ANSWER = 3  # a serialised PredictResponse
    FAILURE = 4  # PUSHBACK and a serialised google.rpc.Status
    STALE = 5  # the models have another preprocessing by now
    ENDED = 6  # a cancelled call has ended
    DRAIN = 7  # accept no more calls, finish those in flight: the seconds for it, as JSON

    # From the front end.
    LISTENING = 17  # calls can come
    ASK = 18  # the preprocessing that a request's models have in common: a serialised PredictRequest without images
    CALL = 19  # CALL, an IMAGE for each image, and a serialised PredictRequest without images
    CANCEL = 20  # the caller has gone


class FrameProtocol(asyncio.Protocol):
    """One end of a link. For one event loop.

    What is sent within one turn of the loop goes out at once, at its end: a batch's answers are one write.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._to_send: list[bytes] = []

    def send(self, kind: Kind, number: int = 0, payload: bytes = b"") -> None:
        """Send a frame. Where the other side has gone, nothing happens."""
        if not self._to_send:
            self._loop.call_soon(self.flush)
        self._to_send += (_HEADER.pack(kind, number, len(payload)), payload)

    def flush(self) -> None:
        """Write what was sent."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._to_send))
        self._to_send.clear()

    def close(self) -> None:
        """End the link."""
        if self._transport is not None:
            self._transport.close()

    def frame_received(self, kind: Kind, number: int, payload: bytes) -> None:
        """Called for each frame."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The link is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take apart what came."""
        self._received += data
        at = 0
        while len(self._received) - at >= _HEADER.size:
            kind, number, length = _HEADER.unpack_from(self._received, at)
            start = at + _HEADER.size
            if len(self._received) < start + length:
                break
            at = start + length
            self.frame_received(Kind(kind), number, bytes(self._received[start:at]))
        del self._received[:at]
