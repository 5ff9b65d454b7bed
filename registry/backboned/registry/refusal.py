"""Errors for files that can't be used, and their reasons in one line."""

import re

from backboned.registry.errors import BackbonedError, ErrorKind


class IncompleteFile(BackbonedError):
    """A file that isn't whole: truncated, altered, or still being written. Waiting may mend it."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorKind.DATA_LOSS, message)


def refused(message: str) -> BackbonedError:
    """The error for a file that can't be used, and won't be until someone changes it."""
    return BackbonedError(ErrorKind.DATA_LOSS, message)


def one_line(error: BaseException) -> str:
    """What another library says of a file: its first line, without where in its own code that was."""
    text = _ASIDE.sub("", str(error).partition("\n")[0])
    return (" ".join(text.split())[:200] or type(error).__name__).rstrip(".")


_ASIDE = re.compile(
    r"Exception raised from.*|This is an internal miniz error.*|\(Could this error.*|\[enforce fail at [^]]*\] \."
)
"""What torch says to its own developers."""
