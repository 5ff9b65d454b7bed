"""Streams of answers, in which Ctrl-C may strike at any moment."""

import threading
from collections.abc import Callable, Generator
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

_Came: TypeAlias = SimpleQueue[tuple[Any, BaseException | None]]

_END = object()
_WAIT_SECONDS = 0.5  # on Windows a signal is heard when a wait ends


def answers(start: Callable[[], Any]) -> Generator[Any, None, None]:
    """The answers of the call that `start` makes, each asked for when it is wanted; cancels the call when closed.

    In the main thread, in which signals strike, gRPC is left to a thread of its own: a `KeyboardInterrupt` inside gRPC
    can leave a lock of the channel held for good, and then every later call hangs, as does closing the channel.
    """
    if threading.current_thread() is not threading.main_thread():
        call = start()
        try:
            yield from call
        finally:
            call.cancel()
        return
    wanted: SimpleQueue[bool] = SimpleQueue()
    came: _Came = SimpleQueue()
    threading.Thread(target=_bring, args=(start, wanted, came), name="stream", daemon=True).start()
    call, waiting = None, False
    try:
        call = _next(came)
        while True:
            waiting = True
            wanted.put(True)
            answer = _next(came)
            waiting = False
            if answer is _END:
                return
            yield answer
    finally:
        wanted.put(False)  # upon which the thread cancels the call, if it isn't waiting for an answer
        if waiting:
            call.cancel()


def _bring(start: Callable[[], Any], wanted: SimpleQueue[bool], came: _Came) -> None:
    """Put the call, and then an answer or its end whenever one is wanted; in the end an error, if there was one."""
    try:
        call = start()
        came.put((call, None))
        try:
            while wanted.get():
                came.put((next(call, _END), None))
        finally:
            call.cancel()  # also where the other thread was interrupted before it had the call
    except BaseException as error:  # for whom it is, in the other thread
        came.put((None, error))


def _next(came: _Came) -> Any:
    while True:
        try:
            found, error = came.get(timeout=_WAIT_SECONDS)
        except Empty:
            continue
        if error is not None:
            raise error
        return found
