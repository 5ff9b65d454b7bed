"""Errors for files that can't be used, and their reasons in one line."""

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
    text = " ".join(str(error).partition("\n")[0].partition("Exception raised from")[0].split())
    return (text[:200] or type(error).__name__).rstrip(".")
