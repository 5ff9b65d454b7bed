"""The callers: a process of their own, with gRPC's asyncio client, a connection for each caller.

Requests are bytes that were made beforehand and answers stay bytes, so that little of the machine goes into calling.
"""

import asyncio
import base64
import gc
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from backboned.client import ClientError, Throttle
from backboned.v1 import model_service_pb2 as pb
from benchmarks._processes import answer_questions, cpu_seconds

_METHOD = "/backboned.v1.ModelService/Predict"
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # each caller has its own connection, as callers on many machines do
    ("grpc.enable_retries", 0),
    ("grpc.max_send_message_length", 64 * 2**20),
]
_SAMPLES = 12
_Predict = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
_OPEN_CONNECTIONS = 32
_MAX_BURST = 64
_NEIGHBOURS_PAUSE, _NEIGHBOURS_PATIENCE = 0.1, 2.0
"""Seconds: of a caller of another model than all others ask, on one of their connections."""


@dataclass
class Tally:
    """What happened between two moments on the monotonic clock; latencies are in seconds, by status code."""

    begin: float
    end: float
    latencies: dict[str, list[float]] = field(default_factory=dict)
    without_delay: int = 0
    not_sent: int = 0
    samples: list[tuple[str, int, bytes]] = field(default_factory=list)
    answers: list[tuple[float, int, bytes]] | None = None
    """When each answer came, to which photo: all of them, also those before `begin`; None: they aren't kept."""

    def note(self, sent: float, code: str) -> bool:
        """A call that was sent at `sent` ended now; whether it counts."""
        now = time.monotonic()
        if not self.begin <= now < self.end:
            return False
        self.latencies.setdefault(code, []).append(now - sent)
        return True

    def answer(self, sent: float, model: str, photo: int, response: bytes) -> None:
        """A call was answered."""
        if self.answers is not None:
            self.answers.append((time.monotonic(), photo, response))
        if self.note(sent, "OK") and len(self.samples) < _SAMPLES and random.random() < 0.2:
            self.samples.append((model, photo, response))

    def held_back(self, sent: float, error: ClientError) -> None:
        """A call was refused before it was sent."""
        if self.note(sent, error.code.name):
            self.not_sent += 1
            self.without_delay += not error.retry_delay_seconds

    def refusal(self, sent: float, error: grpc.aio.AioRpcError) -> None:
        """A call was refused, or failed."""
        delays = [value for key, value in error.trailing_metadata() if key == "grpc-retry-pushback-ms"]
        code = error.code().name
        if self.note(sent, code) and code == "RESOURCE_EXHAUSTED" and not (delays and int(delays[0]) > 0):
            self.without_delay += 1


class Requests:
    """Requests by turns of the photos and at random of the models, as bytes."""

    def __init__(self, models: Sequence[str], photos: Sequence[bytes], images: int) -> None:
        """`images` of one photo in each request."""
        named = {m: pb.PredictRequest(model=m).SerializeToString() for m in models}
        shown = [pb.PredictRequest(images=[pb.Image(encoded=p)] * images).SerializeToString() for p in photos]
        self._named, self._shown = list(named.items()), list(enumerate(shown))

    def __iter__(self) -> Iterator[tuple[str, int, tuple[bytes, bytes]]]:
        """The model, the number of the photo, and a message in two parts: one after the other they are their sum."""
        for photo, image in itertools.cycle(self._shown):
            model, name = random.choice(self._named)
            yield model, photo, (name, image)


async def closed_loop(
    channels: Sequence[grpc.aio.Channel], requests: Requests, tally: Tally, pause: float, patience: float | None = None
) -> None:
    """One caller a channel: each sends its next request when the last one is answered, or `pause` seconds later."""
    turns = iter(requests)

    async def caller(channel: grpc.aio.Channel) -> None:
        predict: _Predict = channel.unary_unary(_METHOD)
        while time.monotonic() < tally.end:
            model, photo, request = next(turns)
            sent = time.monotonic()
            try:
                tally.answer(sent, model, photo, await predict(b"".join(request), timeout=patience))
            except grpc.aio.AioRpcError as error:
                tally.refusal(sent, error)
                await asyncio.sleep(0.01)
            if pause:
                await asyncio.sleep(pause)

    await asyncio.gather(*map(caller, channels))


async def open_loop(
    channels: Sequence[grpc.aio.Channel], requests: Requests, tally: Tally, rate: float, *, throttled: bool
) -> int:
    """`rate` requests a second whatever becomes of them; returns how many there were between the tally's moments.

    `throttled`: as the Python client asks, which doesn't send all, and names the model in the metadata.
    """
    throttle = Throttle()
    calls: set[asyncio.Task[None]] = set()
    predicts: Iterator[_Predict] = itertools.cycle([channel.unary_unary(_METHOD) for channel in channels])

    async def call(model: str, photo: int, request: tuple[bytes, bytes], sending: ExitStack) -> None:
        metadata = (("backboned-model", model),) if throttled else None
        sent = time.monotonic()
        try:
            with sending:
                response = await next(predicts)(b"".join(request), timeout=30, metadata=metadata)
            tally.answer(sent, model, photo, response)
        except grpc.aio.AioRpcError as error:
            tally.refusal(sent, error)

    def ask(model: str, photo: int, request: tuple[bytes, bytes]) -> None:
        asked, sending = time.monotonic(), ExitStack()
        try:
            sending.enter_context(throttle.call(model) if throttled else nullcontext())
        except ClientError as error:
            tally.held_back(asked, error)
            return
        task = asyncio.create_task(call(model, photo, request, sending))
        calls.add(task)
        task.add_done_callback(calls.discard)

    turns, sent = iter(requests), 0
    started = time.monotonic()
    total = 0
    while (now := time.monotonic()) < tally.end:
        due = min(int((now - started) * rate) - total, _MAX_BURST)
        for _ in range(due):
            ask(*next(turns))
        total += max(due, 0)
        sent += max(due, 0) if now >= tally.begin else 0
        await asyncio.sleep(0.001)
    for task in calls:
        task.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return sent


async def measure(photos: Sequence[bytes], question: Mapping[str, Any]) -> dict[str, Any]:
    """Load a daemon as `question` says, and tell what happened after the warm-up.

    Each model in `beside` has one caller with a deadline that is near.
    """
    gc.collect()
    begin = time.monotonic() + question["warm_up"]
    tally = Tally(begin, begin + question["seconds"], answers=[] if question["all"] else None)
    requests = Requests(question["models"], photos, question["images"])
    rate = question["rate"]
    channels = [
        grpc.aio.insecure_channel(question["address"], options=_OPTIONS)
        for _ in range(_OPEN_CONNECTIONS if rate else question["callers"])
    ]
    watching = asyncio.create_task(_cpu(tally, question["pid"]))
    beside, asked = Tally(tally.begin, tally.end), Requests(question["beside"], photos, 1)
    neighbours = [channels[0] for _ in question["beside"]]
    waiting = asyncio.create_task(closed_loop(neighbours, asked, beside, _NEIGHBOURS_PAUSE, _NEIGHBOURS_PATIENCE))
    try:
        if rate:
            sent = await open_loop(channels, requests, tally, rate, throttled=question["throttled"])
        else:
            await closed_loop(channels, requests, tally, question["pause"])
            sent = sum(map(len, tally.latencies.values()))
        await waiting
        told = _told(tally, question["seconds"], question["images"])
        return told | {"sent": sent, "beside_ms": _by_code(beside)} | await watching
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def _cpu(tally: Tally, pid: int) -> dict[str, float]:
    """What the daemon and this process compute between the tally's moments, in seconds."""
    await asyncio.sleep(max(0.0, tally.begin - time.monotonic()))
    daemon, own = cpu_seconds(pid), time.process_time()
    await asyncio.sleep(max(0.0, tally.end - time.monotonic()))
    return {"daemon_cpu_seconds": cpu_seconds(pid) - daemon, "callers_cpu_seconds": time.process_time() - own}


def _told(tally: Tally, seconds: float, images: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "images_per_second": images * len(tally.latencies.get("OK", ())) / seconds,
        "codes": dict(Counter({code: len(found) for code, found in tally.latencies.items()})),
        "latency_ms": _by_code(tally),
        "refused_without_delay": tally.without_delay,
        "not_sent": tally.not_sent,
        "latencies": tally.latencies.get("OK", []) if tally.answers is not None else [],
        "answers": [(at, photo, base64.b64encode(answer).decode()) for at, photo, answer in tally.answers or ()],
        "samples": [(model, photo, base64.b64encode(answer).decode()) for model, photo, answer in tally.samples],
    }


def _by_code(tally: Tally) -> dict[str, dict[str, float]]:
    return {code: _percentiles(found) for code, found in tally.latencies.items()}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    found = {name: 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in shares.items()}
    return found | {"count": len(ordered)}


def main() -> None:
    """Answer questions about the photos in a folder until there are no more."""
    gc.disable()  # with thousands of calls under way it would stop all of them, as no caller on its own does
    photos = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
    answer_questions(lambda question: asyncio.run(measure(photos, question)))


if __name__ == "__main__":
    main()
