"""Streams of predictions and of a job's events: in order, over broken connections, and ended at any moment."""

import itertools
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from backboned.client import Client, ClientError
from backboned.registry import BackbonedError, ErrorKind
from backboned.v1 import model_service_pb2 as pb
from tests.client.answering import UNAVAILABLE, RunningServer, Service, answer


def test_a_stream_cuts_images_and_labels_into_requests_in_order(service: Service, client: Client) -> None:
    service.replies["Predict"] = answer
    replies = client.predict_stream(
        "m", (str(i).encode() for i in range(7)), labels=map(str, range(7)), top_k=1, batch_size=3
    )
    assert [p.classes[0].label for reply in replies for p in reply.predictions] == list("0123456")
    assert [list(request.labels) for request in service.requests] == [list("012"), list("345"), ["6"]]
    assert {request.top_k for request in service.requests} == {1}


def test_a_stream_keeps_requests_below_the_message_limit(service: Service, server: RunningServer) -> None:
    service.replies["Predict"] = lambda request: pb.PredictResponse(version=len(request.images))
    with Client(server.address, max_message_bytes=100_000) as client:
        replies = client.predict_stream("m", [b"x" * 20_000] * 5, batch_size=100)
        assert [reply.version for reply in replies] == [2, 2, 1]


def test_a_stream_ends_at_an_image_that_is_not_there(service: Service, client: Client, tmp_path: Path) -> None:
    service.replies["Predict"] = answer
    with pytest.raises(ClientError, match=r"nowhere\.jpg") as caught:
        list(client.predict_stream("m", [b"x", tmp_path / "nowhere.jpg"], batch_size=1))
    assert caught.value.field == "images[1]"


def test_more_labels_than_images_are_refused(service: Service, client: Client) -> None:
    service.replies["Predict"] = answer
    with pytest.raises(ClientError, match="only 1 images"):
        list(client.predict_stream("m", [b"x"], labels=["a", "b"]))


def test_a_stream_passes_on_what_the_server_refuses(service: Service, client: Client) -> None:
    def refuse(_: Any) -> None:
        raise BackbonedError(ErrorKind.NOT_FOUND, "unknown model 'm'", field="model")

    service.replies["Predict"] = refuse
    with pytest.raises(ClientError, match="unknown model") as caught:
        list(client.predict_stream("m", [b"x"]))
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.NOT_FOUND, "model")


EVENTS = [pb.JobEvent(sequence=i, log=str(i)) for i in range(1, 5)]
END = pb.JobEvent(sequence=5, state=pb.JOB_STATE_SUCCEEDED)


def test_a_watch_ends_with_the_jobs_last_event(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda _: [*EVENTS, END]
    service.replies["GetJob"] = lambda request: pb.Job(id=request.job_id, state=pb.JOB_STATE_SUCCEEDED)
    assert [event.sequence for event in client.watch("j")] == [1, 2, 3, 4, 5]
    assert client.wait("j").state == pb.JOB_STATE_SUCCEEDED


def test_a_watch_goes_on_where_it_was_when_the_daemon_comes_back(
    service: Service, server: RunningServer, client: Client
) -> None:
    def events(request: pb.WatchJobRequest) -> list[Any]:
        left = [event for event in [*EVENTS, END] if event.sequence > request.after_sequence]
        return left if request.after_sequence >= 2 else [*left[:2], UNAVAILABLE]

    service.replies["WatchJob"] = events
    seen = []
    for event in client.watch("j"):
        seen.append(event.sequence)
        if event.sequence == 2:
            server.stop()
            threading.Timer(0.3, server.start).start()
    assert seen == [1, 2, 3, 4, 5]


def test_a_watch_gives_up_when_the_daemon_stays_away(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda request: (
        [EVENTS[0], UNAVAILABLE] if not request.after_sequence else [UNAVAILABLE]
    )
    watch = client.watch("j", reconnect_seconds=0.3)
    assert next(watch).sequence == 1
    with pytest.raises(ClientError, match="not loaded yet"):
        next(watch)


def test_a_watch_from_behind_the_last_event_ends_at_once(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda _: []
    service.replies["GetJob"] = lambda request: pb.Job(id=request.job_id, state=pb.JOB_STATE_CANCELLED)
    assert list(client.watch("j", after_sequence=5)) == []


def test_a_watch_of_an_unknown_job_says_so(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda _: [BackbonedError(ErrorKind.NOT_FOUND, "unknown job 'j'")]
    with pytest.raises(ClientError, match="unknown job"):
        next(client.watch("j"))


class Interrupt(BaseException):
    """What the handler of a signal raises in the main thread, as Ctrl-C's does."""


@pytest.fixture
def interrupted() -> Iterator[Callable[[Iterator[Any], float], None]]:
    """Reads a stream until a signal strikes after some seconds."""

    def strike(*_: object) -> None:
        raise Interrupt

    def run(stream: Iterator[Any], seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with suppress(Interrupt):
            try:
                deque(stream, 0)
                pytest.fail("it ended by itself")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, strike)
    yield run
    signal.signal(signal.SIGALRM, before)


def test_a_client_answers_on_after_streams_that_were_interrupted_at_any_moment(
    service: Service, server: RunningServer, interrupted: Callable[[Iterator[Any], float], None]
) -> None:
    service.replies["Predict"] = answer
    service.replies["WatchJob"] = lambda _: (pb.JobEvent(sequence=i, log="on") for i in itertools.count(1))
    service.replies["GetJob"] = lambda request: pb.Job(id=request.job_id)
    chance = random.Random(0)
    client = Client(server.address, timeout_seconds=10)
    asked: SimpleQueue[pb.Job] = SimpleQueue()
    for i in range(60):
        stream: Iterator[Any] = client.predict_stream("m", itertools.repeat(b"x"), batch_size=1)
        if i % 2:
            stream = client.watch("j")
        interrupted(stream, chance.uniform(0.001, 0.03))
        threading.Thread(target=lambda: asked.put(client.get_job("j")), daemon=True).start()
        assert asked.get(timeout=10).id == "j"  # gRPC's locks are all let go of
    client.close()


def test_a_stream_that_is_left_is_cancelled(service: Service, client: Client) -> None:
    gone = threading.Event()

    def events(_: Any) -> Iterator[pb.JobEvent]:
        try:
            for i in itertools.count(1):
                yield pb.JobEvent(sequence=i)
        finally:
            gone.set()

    service.replies["WatchJob"] = events
    watch = client.watch("j")
    assert [next(watch).sequence for _ in range(3)] == [1, 2, 3]
    del watch
    assert gone.wait(10)


def test_a_stream_is_the_same_in_another_thread(service: Service, client: Client) -> None:
    service.replies["WatchJob"] = lambda _: [*EVENTS, END]
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: list(client.watch("j"))).result(10) == list(client.watch("j"))
