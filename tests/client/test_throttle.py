"""A client sends few of the calls that an overloaded daemon would refuse, and all of them as soon as it doesn't."""

import asyncio
import threading
from collections import Counter
from typing import Any

import grpc
import pytest

from backboned.client import ClientError, Throttle

ANSWERS_A_SECOND = 100


class Full(grpc.RpcError):
    """What gRPC raises for a call that is refused."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED, delay: str | None = "800") -> None:
        self._code, self._trailers = code, () if delay is None else (("grpc-retry-pushback-ms", delay),)

    def code(self) -> grpc.StatusCode:
        return self._code

    def trailing_metadata(self) -> Any:
        return self._trailers


class Daemon:
    """Answers a hundred calls a second, in bursts, and refuses the others. It has a clock that calls turn."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.room = 50.0
        self.throttle = Throttle(clock=lambda: self.now)

    def call(self, model: str = "flowers") -> str:
        """What becomes of one call."""
        try:
            with self.throttle.call(model):
                if self.room < 1:
                    raise Full
                self.room -= 1
        except grpc.RpcError:
            return "refused"
        except ClientError:
            return "not sent"
        return "answered"

    def calls(self, seconds: float, rate: float) -> Counter[str]:
        """What becomes of so many calls a second."""
        found: Counter[str] = Counter()
        for _ in range(int(seconds * rate)):
            self.now += 1 / rate
            if int(self.now * 2) > int((self.now - 1 / rate) * 2):
                self.room = ANSWERS_A_SECOND / 2
            found[self.call()] += 1
        return found


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.mark.parametrize("rate", [1, 20, 99])
def test_what_can_be_answered_is_sent(daemon: Daemon, rate: float) -> None:
    assert daemon.calls(60, rate) == {"answered": 60 * rate}


def test_where_few_are_refused_all_is_sent(daemon: Daemon) -> None:
    found = daemon.calls(60, 120)
    assert found["not sent"] == 0 and found["answered"] == pytest.approx(60 * ANSWERS_A_SECOND, rel=0.01)


def test_of_far_too_many_calls_a_few_more_are_sent_than_are_answered_and_none_is_answered_less(daemon: Daemon) -> None:
    daemon.calls(2, 2000)
    found = daemon.calls(30, 2000)
    assert found["answered"] == pytest.approx(30 * ANSWERS_A_SECOND, rel=0.01)
    assert 0.2 * found["answered"] < found["refused"] < 0.4 * found["answered"]
    assert found.total() == 60_000


def test_when_the_daemon_has_room_again_all_is_sent_within_seconds(daemon: Daemon) -> None:
    daemon.calls(60, 2000)
    daemon.calls(2.5, 50)
    assert daemon.calls(60, 50) == {"answered": 3000}


def test_who_asks_now_and_then_is_told_by_the_daemon(daemon: Daemon) -> None:
    for _ in range(300):
        daemon.room = 0
        daemon.now += 0.25
        assert daemon.call() == "refused"


def test_another_models_calls_are_sent(daemon: Daemon) -> None:
    daemon.calls(10, 2000)
    daemon.room = 10
    assert daemon.call("flowers") == "not sent"
    assert daemon.call("pets") == "answered"


def test_a_call_that_is_not_sent_says_when_to_try_again(daemon: Daemon) -> None:
    daemon.calls(10, 2000)
    with (
        pytest.raises(ClientError, match=r"not sent.* flowers; try again in 0\.8 s") as caught,
        daemon.throttle.call("flowers"),
    ):
        pytest.fail("it was sent")
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and caught.value.retry_delay_seconds == 0.8


@pytest.mark.parametrize(
    "error",
    [
        Full(grpc.StatusCode.UNAVAILABLE),
        Full(grpc.StatusCode.INVALID_ARGUMENT),
        Full(delay=None),
        Full(delay="soon"),
        ClientError(grpc.StatusCode.NOT_FOUND, "no such model"),
        ValueError(),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
    ],
)
def test_other_failures_hold_nothing_back(daemon: Daemon, error: BaseException) -> None:
    for _ in range(2000):
        with pytest.raises(type(error)), daemon.throttle.call("flowers"):
            raise error


def test_models_of_long_ago_are_forgotten(daemon: Daemon) -> None:
    for i in range(5000):
        daemon.room = 1
        daemon.call(f"m{i}")
    assert len(daemon.throttle._budgets) == 1024


def test_threads_share_what_may_be_sent() -> None:
    throttle, sent, lock = Throttle(clock=lambda: 5.0), Counter[str](), threading.Lock()

    def call() -> None:
        for _ in range(1000):
            try:
                with throttle.call("flowers"):
                    with lock:
                        sent["sent"] += 1
                    raise Full
            except grpc.RpcError:
                pass
            except ClientError:
                with lock:
                    sent["not sent"] += 1

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 500 <= sent["sent"] <= 508 and sent.total() == 8000
