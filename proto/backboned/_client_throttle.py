"""Which calls aren't sent while the daemon refuses most of them."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import grpc

from backboned._client_status import ClientError, full_for_seconds

_SENT_FOR_AN_ANSWER = 1.25
_SENT_A_SECOND = 5.0
"""Besides; this grows with each second in which nothing is refused, so that calls don't come back all at once."""
_GROWTH = 4.0
_MINDED_SECONDS = 5.0
"""How long a refusal is: after that all is sent."""
_MOST_AT_ONCE = 500.0
"""More than the answers of a few batches, which come all at once, allow."""
_MAX_MODELS = 1024


class Throttle:
    """Refuses by itself what an overloaded daemon would refuse, which costs both sides what answers could be had for.

    While calls for a model are refused for want of room, a quarter more are sent than are answered, and five a second
    besides. The others raise `ClientError` at once, with `RESOURCE_EXHAUSTED` and the delay that the daemon told last.
    See "adaptive throttling" in Beyer et al., "Site Reliability Engineering" (2016), chapter 21; here it is by tokens,
    not by chance.

    `Client` has one. With stubs, of gRPC's asyncio too:

        throttle = Throttle()
        with throttle.call("flowers"):
            reply = stub.Predict(request, timeout=1, metadata=[("backboned-model", "flowers")])

    One is for one daemon. It may be shared between threads.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()
        self._lock = Lock()

    @contextmanager
    def call(self, model: str) -> Iterator[None]:
        """The block is a Predict call for `model`; raises `ClientError` instead if it isn't to be sent."""
        with self._lock:
            self._of(model).spend(model)
        try:
            yield
        except Exception as error:
            delay = full_for_seconds(error)
            if delay is not None:
                with self._lock:
                    self._of(model).refused(delay)
            raise
        with self._lock:
            self._of(model).earn(_SENT_FOR_AN_ANSWER)

    def _of(self, model: str) -> "_Budget":
        now = self._clock()
        budget = self._budgets.get(model)
        if budget is None:
            budget = self._budgets[model] = _Budget(now)
            if len(self._budgets) > _MAX_MODELS:
                self._budgets.popitem(last=False)
        else:
            self._budgets.move_to_end(model)
            budget.pass_time(now)
        return budget


def for_model(model: str) -> list[tuple[str, str]]:
    """Metadata of a Predict call: by it the daemon knows, before it reads a message, whose queue the call is for."""
    return [("backboned-model", model)] if model.isascii() and model.isprintable() else []


@dataclass
class _Budget:
    """Calls that may be sent for one model while the daemon refuses some."""

    now: float
    tokens: float = _MOST_AT_ONCE
    refused_at: float = -math.inf
    delay_seconds: float = 0.0

    def pass_time(self, now: float) -> None:
        unrefused = min(now - self.refused_at, _MINDED_SECONDS)
        self.earn(_SENT_A_SECOND * _GROWTH**unrefused * (now - self.now))
        self.now = now

    def earn(self, tokens: float) -> None:
        self.tokens = min(self.tokens + tokens, _MOST_AT_ONCE)

    def spend(self, model: str) -> None:
        if self.tokens < 1 and self.now - self.refused_at < _MINDED_SECONDS:
            raise ClientError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"not sent, as the daemon refuses most calls for {model}; try again in {self.delay_seconds:.1f} s",
                retry_delay_seconds=self.delay_seconds,
            )
        self.tokens = max(self.tokens - 1, 0.0)

    def refused(self, delay_seconds: float) -> None:
        self.refused_at = self.now
        self.delay_seconds = delay_seconds
