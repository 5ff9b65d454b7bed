"""Typed errors: each says what was wrong, what was expected and what to do.

The registry and everything above it raise these; the gRPC server maps each `ErrorKind` to one status code,
in one place. The message is one line and meant for the caller; what only the log should see is chained as the
cause.
"""

import difflib
from collections.abc import Iterable
from enum import Enum


class ErrorKind(Enum):
    """What went wrong, independent of any transport."""

    NOT_FOUND = "not found"
    INVALID_ARGUMENT = "invalid argument"
    PERMISSION_DENIED = "permission denied"
    FAILED_PRECONDITION = "failed precondition"
    ALREADY_EXISTS = "already exists"
    ABORTED = "aborted"
    RESOURCE_EXHAUSTED = "resource exhausted"
    UNAVAILABLE = "unavailable"
    UNIMPLEMENTED = "unimplemented"
    DATA_LOSS = "data loss"
    INTERNAL = "internal"


MAX_MESSAGE_BYTES = 1000
"""Of UTF-8. A status travels in HTTP/2 headers, several times over, and these must stay below 8 kB."""


class BackbonedError(Exception):
    """An error with a kind, and a message that says what was wrong and what to do.

    The message may quote what came from outside: of one that is too long the end is left out, what is no text is
    escaped, and lines are joined.

    `field` names the request field that is at fault (`images[2]`, `options.learning_rate`);
    `retry_delay_seconds` says when the same call may succeed.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        field: str | None = None,
        retry_delay_seconds: float | None = None,
    ) -> None:
        self.kind = kind
        self.message = _presentable(message)
        super().__init__(self.message)
        self.field = field
        self.retry_delay_seconds = retry_delay_seconds


def not_found(
    what: str, name: str, known: Iterable[str], *, field: str | None = None, hint: str = ""
) -> BackbonedError:
    """The error for an unknown `name`, with the nearest of the `known` names."""
    message = f"unknown {what} {name[:80]!r}{suggestion(name, known)}{hint}"
    return BackbonedError(ErrorKind.NOT_FOUND, message, field=field)


def invalid(message: str, *, field: str | None = None) -> BackbonedError:
    """The error for a value that the caller must change."""
    return BackbonedError(ErrorKind.INVALID_ARGUMENT, message, field=field)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with up to three near names, else a short list of what is known."""
    names = sorted(set(known))
    by_fold = {n.casefold(): n for n in names}
    near = difflib.get_close_matches(name.casefold(), by_fold, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(by_fold[n]) for n in near) + "?"
    if not names:
        return "; none is known yet"
    shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
    return f"; known: {shown}"


def _presentable(message: str) -> str:
    encoded = " ".join(message.splitlines()).encode("utf-8", "backslashreplace")
    if len(encoded) > MAX_MESSAGE_BYTES:
        encoded = encoded[: MAX_MESSAGE_BYTES - 3] + "…".encode()
    return encoded.decode("utf-8", "ignore")
