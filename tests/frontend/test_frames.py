"""Frames arrive as they were sent, however the bytes are cut."""

import asyncio
import socket

from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.server.frontend.frames import FrameProtocol, Kind

Frame = tuple[Kind, int, bytes]
frames = st.lists(
    st.tuples(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=200)), min_size=1, max_size=20
)


class Recorder(FrameProtocol):
    """Keeps what came."""

    def __init__(self) -> None:
        super().__init__()
        self.came: list[Frame] = []

    def frame_received(self, kind: Kind, number: int, payload: bytes) -> None:
        self.came.append((kind, number, payload))


class Wire(asyncio.Transport):
    """Keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return False


@given(frames, st.lists(st.integers(1, 300), min_size=1))
@settings(max_examples=50, deadline=None)
def test_frames_come_whole_and_in_order(sent: list[Frame], sizes: list[int]) -> None:
    async def transfer() -> list[Frame]:
        sender, receiver, wire = Recorder(), Recorder(), Wire()
        sender.connection_made(wire)
        for frame in sent:
            sender.send(*frame)
        sender.flush()
        data = b"".join(wire.writes)
        for i in range(len(data)):
            if not data:
                break
            size = sizes[i % len(sizes)]
            receiver.data_received(data[:size])
            data = data[size:]
        return receiver.came

    assert asyncio.run(transfer()) == sent


async def test_what_is_sent_in_one_turn_is_one_write() -> None:
    sender, wire = Recorder(), Wire()
    sender.connection_made(wire)
    for number in range(5):
        sender.send(Kind.ANSWER, number, b"payload")
    await asyncio.sleep(0)
    assert len(wire.writes) == 1
    sender.send(Kind.ANSWER, 5, b"payload")
    await asyncio.sleep(0)
    assert len(wire.writes) == 2


async def test_sending_to_one_who_has_gone_does_nothing() -> None:
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    transport, link = await loop.create_unix_connection(Recorder, sock=ours)
    theirs.close()
    transport.abort()
    link.send(Kind.ANSWER, 1, b"payload")
    await asyncio.sleep(0)
    assert transport.is_closing()
