"""The daemon's end of its link to a front end: calls whose images are prepared already."""

import asyncio
import json
import mmap
import warnings
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError
from backboned.server.api.errors import status_of, unexpected
from backboned.server.api.predictions import to_call, to_response
from backboned.server.frontend.frames import CALL, IMAGE, PUSHBACK, FrameProtocol, Kind
from backboned.server.serving.calls import Call, Prepared, Result, StalePreprocessing, Target
from backboned.v1 import model_service_pb2 as pb


@dataclass(frozen=True)
class Answering:
    """What front ends ask of the daemon.

    `predict` answers a call; it raises `StalePreprocessing` for images that were prepared in another way than its
    models want. `preprocessing` is that of what a target names; none if that isn't loaded. `prepared` is told, for each
    image, the seconds that preparing it took.
    """

    predict: Callable[[Call], Awaitable[Sequence[Result]]]
    preprocessing: Callable[[Target], Preprocessing | None]
    prepared: Callable[[float], None]


class Handover(FrameProtocol):
    """Answers one front end, whose slots of `slot_bytes` are in `memory`. For one event loop.

    `listens` is called once the front end takes calls. When it has gone, its calls are cancelled.
    """

    def __init__(
        self, answering: Answering, memory: mmap.mmap, slot_bytes: int, listens: "Callable[[Handover], None]"
    ) -> None:
        super().__init__()
        self._answering = answering
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._slot_bytes = slot_bytes
        self._listens = listens
        self._told: list[Preprocessing] = []
        self._calls: dict[int, asyncio.Task[None]] = {}

    def frame_received(self, kind: Kind, number: int, payload: bytes) -> None:
        """Called for each frame."""
        if kind is Kind.CALL:
            self._calls[number] = task = self._loop.create_task(self._answer(number, payload))
            task.add_done_callback(lambda _: self._ended(number))
        elif kind is Kind.ASK:
            self.send(Kind.TOLD, number, self._tell(payload))
        elif kind is Kind.CANCEL:
            if number in self._calls:
                self._calls[number].cancel()
        elif kind is Kind.LISTENING:
            self._listens(self)

    def connection_lost(self, _: Exception | None) -> None:
        """The front end has gone."""
        for task in self._calls.values():
            task.cancel()

    async def _answer(self, number: int, payload: bytes) -> None:
        try:
            call, request = self._read(payload)
            results = await self._answering.predict(call)
            self.send(Kind.ANSWER, number, to_response(request, results).SerializeToString())
        except StalePreprocessing:
            self.send(Kind.STALE, number)
        except BackbonedError as error:
            self.send(Kind.FAILURE, number, _failure(error))
        except Exception as error:
            self.send(Kind.FAILURE, number, _failure(unexpected(error, "Predict")))

    def _ended(self, number: int) -> None:
        if self._calls.pop(number).cancelled():
            self.send(Kind.ENDED, number)

    def _read(self, payload: bytes) -> tuple[Call, pb.PredictRequest]:
        which, count = CALL.unpack_from(payload)
        preprocessing = self._told[which]
        end = CALL.size + count * IMAGE.size
        request = pb.PredictRequest.FromString(payload[end:])
        images = []
        for slot, seconds in IMAGE.iter_unpack(payload[CALL.size : end]):
            images.append(Prepared(self._image(slot, preprocessing.crop_size), preprocessing))
            self._answering.prepared(seconds)
        return replace(to_call(request), images=images), request

    def _image(self, slot: int, side: int) -> Tensor:
        """What is in a slot, `[3, side, side]`: a view of the shared memory, not to be written to."""
        start = slot * self._slot_bytes
        return self._memory[start : start + side * side * 3].view(side, side, 3).permute(2, 0, 1)

    def _tell(self, question: bytes) -> bytes:
        try:
            targets = to_call(pb.PredictRequest.FromString(question)).targets
        except BackbonedError:
            return b""
        wanted = {self._answering.preprocessing(target) for target in targets}
        preprocessing = wanted.pop()
        if preprocessing is None or wanted:
            return b""
        if preprocessing not in self._told:
            self._told.append(preprocessing)
        number = self._told.index(preprocessing)
        return json.dumps({"number": number, "preprocessing": preprocessing.to_dict()}).encode()


def _failure(error: BackbonedError) -> bytes:
    delay = error.retry_delay_seconds
    pushback_ms = -1 if delay is None else round(delay * 1000)
    details: bytes = status_of(error).SerializeToString()
    return PUSHBACK.pack(pushback_ms) + details
