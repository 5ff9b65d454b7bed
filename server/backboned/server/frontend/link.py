"""A front end's end of its link to the daemon."""

import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from google.rpc import status_pb2

from backboned.registry.backbone import Preprocessing
from backboned.server.frontend.frames import CALL, IMAGE, PUSHBACK, FrameProtocol, Kind


@dataclass(frozen=True)
class Told:
    """A preprocessing, and the number that the daemon knows it by."""

    number: int
    preprocessing: Preprocessing


@dataclass(frozen=True)
class InSlot:
    """A prepared image: where it is, and the seconds that preparing it took."""

    slot: int
    seconds: float


@dataclass(frozen=True)
class Failure:
    """The status that a call ends with. `pushback_ms` says when to try again; none is named where it is negative."""

    code: int
    message: str
    details: bytes
    pushback_ms: int


class Stale:
    """The daemon's models have another preprocessing than the one that the images were prepared by."""


Outcome = bytes | Failure | Stale
"""Of a call: a serialised PredictResponse, or why there is none."""


class Link(FrameProtocol):
    """Asks the daemon, and hears what it wants. For one event loop.

    `ordered` is called with SERVE and DRAIN; `free` with the slots of a call that has ended, however it ended.
    """

    def __init__(self, ordered: Callable[[Kind, bytes], None]) -> None:
        super().__init__()
        self._ordered = ordered
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.lost: asyncio.Future[None] = self._loop.create_future()

    async def ask(self, question: bytes) -> Told | None:
        """The preprocessing that a request's models have in common; none if the daemon can't tell one.

        `question` is a serialised PredictRequest without images.
        """
        _, answer = self._send(Kind.ASK, question)
        payload: bytes = await answer
        if not payload:
            return None
        told = json.loads(payload)
        return Told(told["number"], Preprocessing.from_dict(told["preprocessing"]))

    async def call(self, told: Told, images: Sequence[InSlot], request: bytes, ended: Callable[[], None]) -> Outcome:
        """What the daemon answers to a request, serialised without its images, for images that wait in slots.

        `ended` is called once the daemon has done with the slots: after a cancelled call that is later than here.
        Raises `ConnectionError` if the daemon has gone.
        """
        head = CALL.pack(told.number, len(images))
        number, answer = self._send(Kind.CALL, head + b"".join(IMAGE.pack(i.slot, i.seconds) for i in images) + request)
        answer.add_done_callback(lambda _: ended())
        try:
            outcome: Outcome = await asyncio.shield(answer)
        except asyncio.CancelledError:
            self.send(Kind.CANCEL, number)
            raise
        return outcome

    def frame_received(self, kind: Kind, number: int, payload: bytes) -> None:
        """Called for each frame."""
        if kind in (Kind.SERVE, Kind.DRAIN):
            self._ordered(kind, payload)
            return
        answer = self._waiting.pop(number)
        if answer.cancelled():  # only a question is: nobody waits for what was told
            return
        if kind is Kind.FAILURE:
            answer.set_result(_failure(payload))
        elif kind is Kind.STALE:
            answer.set_result(Stale())
        else:
            answer.set_result(payload)

    def connection_lost(self, _: Exception | None) -> None:
        """The daemon has gone, or this end was closed."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the daemon has gone"))
                answer.exception()  # seen, also where nobody waits for it any more
        self._waiting.clear()
        self.lost.set_result(None)

    def _send(self, kind: Kind, payload: bytes) -> tuple[int, "asyncio.Future[Any]"]:
        if self.lost.done():
            raise ConnectionError("the daemon has gone")
        number = next(self._numbers) & 0xFFFFFFFF
        self._waiting[number] = answer = self._loop.create_future()
        self.send(kind, number, payload)
        return number, answer


def _failure(payload: bytes) -> Failure:
    (pushback_ms,) = PUSHBACK.unpack_from(payload)
    details = payload[PUSHBACK.size :]
    status = status_pb2.Status.FromString(details)
    return Failure(status.code, status.message, details, pushback_ms)
