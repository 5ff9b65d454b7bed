"""Predict in a front end: images are prepared here, and the daemon is handed what its networks read.

Whatever is out of the ordinary (an image that can't be read, a model that isn't known, too many images) is passed on
as it came, so that the daemon alone says what is wrong with it.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError

from backboned.registry.backbone import Preprocessing
from backboned.server.compute.preprocess import read, read_pixels
from backboned.server.frontend.link import Failure, InSlot, Link, Outcome, Stale, Told
from backboned.server.frontend.proxy import Context, Unary
from backboned.server.frontend.slots import Slots
from backboned.v1 import model_service_pb2 as pb

Targets = tuple[tuple[str, int | None, str | None], ...]
"""Of a request: model, version and alias of each that is to answer."""

Source = bytes | tuple[bytes, tuple[int, ...]]
"""An image file's bytes, or raw pixels with their shape."""

_KNOWN_TARGETS = 4096
_REFUSAL_SECONDS = 0.05
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Predict:
    """Answers Predict. For one event loop.

    `pass_on` gives a request to the daemon as it came. `decode_threads` prepare images.
    """

    def __init__(self, link: Link, slots: Slots, pass_on: Unary, *, decode_threads: int, max_image_pixels: int) -> None:
        self._link = link
        self._slots = slots
        self._pass_on = pass_on
        self._max_image_pixels = max_image_pixels
        self._told: dict[Targets, Told] = {}
        self._refused: dict[Targets, _Refusal] = {}
        self._pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")

    def close(self) -> None:
        """Prepare no more images."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def answer(self, serialised: bytes, context: Context) -> bytes:
        """Answer a call."""
        try:
            outcome = await self._answer(serialised)
        except _Refused as refused:
            outcome = refused.failure
        except ConnectionError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{error}; try again")
        if isinstance(outcome, bytes):
            return outcome
        if isinstance(outcome, Failure):
            await _abort(context, outcome)
        return await self._pass_on(serialised, context)

    async def _answer(self, serialised: bytes) -> Outcome | None:
        """The outcome; none where the request is to be passed on as it came."""
        try:
            request = pb.PredictRequest.FromString(serialised)
        except DecodeError:
            return None
        sources = [_source(image) for image in request.images]
        targets = _targets(request)
        self._check(targets, len(sources))
        request.ClearField("images")
        bare = request.SerializeToString()
        told = self._told.get(targets) or await self._ask(targets, bare)
        if told is None or not sources or None in sources:
            return None
        return await self._hand_over(targets, told, [s for s in sources if s is not None], bare)

    async def _ask(self, targets: Targets, bare: bytes) -> Told | None:
        told = await self._link.ask(bare)
        if told is not None:
            self._told[targets] = told
            if len(self._told) > _KNOWN_TARGETS:
                del self._told[next(iter(self._told))]
        return told

    async def _hand_over(self, targets: Targets, told: Told, sources: Sequence[Source], bare: bytes) -> Outcome | None:
        side = told.preprocessing.crop_size
        slots = self._slots.take(len(sources), 3 * side * side)
        if slots is None:
            return None
        jobs = [
            self._pool.submit(self._prepare, source, slot, told.preprocessing, targets, len(sources))
            for source, slot in zip(sources, slots, strict=True)
        ]
        try:
            images = await asyncio.gather(*map(asyncio.wrap_future, jobs))
        except _Refused:
            self._release_after(jobs, slots)
            raise
        except Exception:  # the daemon will say what is wrong with an image
            self._release_after(jobs, slots)
            return None
        except BaseException:
            self._release_after(jobs, slots)
            raise
        outcome = await self._link.call(told, images, bare, ended=lambda: self._slots.release(slots))
        if isinstance(outcome, Stale):
            self._told.pop(targets, None)
        elif isinstance(outcome, Failure):
            self._note(targets, len(sources), outcome)
        return outcome

    def _prepare(self, source: Source, slot: int, preprocessing: Preprocessing, targets: Targets, count: int) -> InSlot:
        started = time.monotonic()
        self._check(targets, count)
        if isinstance(source, bytes):
            image = read(source, preprocessing, max_pixels=self._max_image_pixels)
        else:
            image = read_pixels(*source, preprocessing, max_pixels=self._max_image_pixels)
        self._slots.write(slot, image.permute(1, 2, 0).numpy())
        return InSlot(slot, time.monotonic() - started)

    def _release_after(self, jobs: "Sequence[Future[InSlot]]", slots: Sequence[int]) -> None:
        """Free slots once no thread writes to them."""
        for job in jobs:
            job.cancel()
        running = [asyncio.wrap_future(job) for job in jobs if not job.done()]
        if not running:
            self._slots.release(slots)
            return
        ended = asyncio.gather(*running, return_exceptions=True)
        ended.add_done_callback(lambda _: self._slots.release(slots))

    def _note(self, targets: Targets, count: int, failure: Failure) -> None:
        """Remember that the daemon is full, so that no image is prepared in vain."""
        if failure.code != grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] or failure.pushback_ms < 0:
            return
        seconds = min(failure.pushback_ms / 1000, _REFUSAL_SECONDS)
        if len(self._refused) >= _KNOWN_TARGETS:
            self._refused.clear()
        self._refused[targets] = _Refusal(time.monotonic() + seconds, count, failure)

    def _check(self, targets: Targets, count: int) -> None:
        """Raise `_Refused` where the daemon has just refused such a call."""
        refusal = self._refused.get(targets)
        if refusal is not None and count >= refusal.count:
            if time.monotonic() < refusal.until:
                raise _Refused(refusal.failure)
            self._refused.pop(targets, None)


class _Refusal:
    """Until when the daemon takes no call for so many images."""

    def __init__(self, until: float, count: int, failure: Failure) -> None:
        self.until, self.count, self.failure = until, count, failure


class _Refused(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


async def _abort(context: Context, failure: Failure) -> NoReturn:
    metadata: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", failure.details)]
    if failure.pushback_ms >= 0:
        metadata.append(("grpc-retry-pushback-ms", str(failure.pushback_ms)))
    await context.abort(_CODES[failure.code], failure.message, tuple(metadata))


def _targets(request: pb.PredictRequest) -> Targets:
    one = _target(request)
    return (one, *map(_target, request.models)) if request.models else (one,)


def _target(named: pb.PredictRequest | pb.ModelTarget) -> tuple[str, int | None, str | None]:
    target = named.WhichOneof("target")
    return (
        named.model,
        named.version if target == "version" else None,
        named.alias if target == "alias" else None,
    )


def _source(image: pb.Image) -> Source | None:
    kind = image.WhichOneof("source")
    if kind == "encoded":
        return image.encoded
    if kind == "tensor":
        return image.tensor.data, tuple(image.tensor.shape)
    return None
