"""What is wrong right now, and mends by itself: told in health, metrics and log, while what serves serves on."""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

log = logging.getLogger(__name__)

_MOST_LOGGED = 10


class TroubleKind(Enum):
    """What can be wrong; the value names it in health and metrics."""

    CHECKPOINT_DIRECTORY = "checkpoint_directory"
    LOADING = "loading"
    DATABASE = "database"
    ANSWERS = "answers"
    DELETION = "deletion"


@dataclass(frozen=True)
class Trouble:
    """Something that is wrong `since` a Unix time, in seconds; each message says what, in a line."""

    kind: TroubleKind
    messages: tuple[str, ...]
    since: float

    @property
    def text(self) -> str:
        """The kind, the first message, and how many more there are."""
        others = len(self.messages) - 1
        return f"{self.kind.value}: {self.messages[0]}" + (f" (and {others} more)" if others else "")


class Troubles:
    """What is wrong now. Thread-safe; whoever finds something out tells it, also that it is well again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: Mapping[TroubleKind, Trouble] = {}

    def now(self) -> tuple[Trouble, ...]:
        """All of it, in the order of the kinds."""
        now = self._now
        return tuple(now[kind] for kind in TroubleKind if kind in now)

    def has(self, kind: TroubleKind) -> bool:
        """Whether something of a kind is wrong."""
        return kind in self._now

    def tell(self, kind: TroubleKind, *messages: str) -> None:
        """These messages are all that is wrong of a kind; none: nothing is. What is new is logged, once."""
        with self._lock:
            before = self._now.get(kind)
            told = () if before is None else before.messages
            others = {k: trouble for k, trouble in self._now.items() if k is not kind}
            if messages:
                others[kind] = Trouble(kind, messages, time.time() if before is None else before.since)
            self._now = others
        new = [message for message in messages if message not in told]
        for message in new[:_MOST_LOGGED]:
            log.error("trouble with %s: %s; what is loaded serves on", _words(kind), message)
        if len(new) > _MOST_LOGGED:
            log.error("trouble with %s: %d more of the kind", _words(kind), len(new) - _MOST_LOGGED)
        if told and not messages:
            log.info("the trouble with %s is over", _words(kind))


def _words(kind: TroubleKind) -> str:
    return kind.value.replace("_", " ")
