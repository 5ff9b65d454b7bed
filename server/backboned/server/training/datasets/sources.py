"""Where the files of a dataset are: what a folder, an archive and a bucket have in common."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from backboned.registry.errors import BackbonedError, invalid
from backboned.server.training.events import SkippedFile

MAX_FILE_BYTES = 2**30
"""A file in a dataset that is larger isn't read: it would take as much memory."""


@dataclass(frozen=True)
class Listing:
    """Files and folders by path, with `/`, without what is hidden; files are sorted folder by folder."""

    files: tuple[str, ...]
    folders: frozenset[str]
    skipped: tuple[SkippedFile, ...] = ()

    def within(self, folder: str) -> list[str]:
        """The names of the folders that lie directly in `folder`; at the top if that is empty."""
        prefix = f"{folder}/" if folder else ""
        return sorted(
            name for f in self.folders if f.startswith(prefix) and "/" not in (name := f[len(prefix) :]) and name
        )


class Presence(Enum):
    """Whether a file is there, as far as can be told without reading it."""

    THERE = "there"
    ABSENT = "absent"
    OUTSIDE = "a link that leads out of the data roots"


class Source(Protocol):
    """Files by name. Safe to use from several threads."""

    def listing(self) -> Listing:
        """What there is. Raises `OSError` or `BackbonedError`."""

    def find(self, name: str) -> Presence:
        """Whether there is a file of this name."""

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises `OSError`, or `BackbonedError` for one that is damaged or too large."""

    def stamp(self, name: str) -> str:
        """What changes when the file does, such as its size and time. Raises `OSError`."""


def in_order(names: set[str]) -> tuple[str, ...]:
    """Sorted folder by folder, as a walk would come by them."""
    return tuple(sorted(names, key=lambda n: n.split("/")))


def check_size(name: str, size_bytes: int) -> None:
    """Raise `BackbonedError` `INVALID_ARGUMENT` for a file that is too large to be read."""
    if size_bytes > MAX_FILE_BYTES:
        raise invalid(
            f"{name!r} has {size_bytes / 1e9:.1f} GB; a file of at most {MAX_FILE_BYTES / 1e9:.1f} GB is read"
        )


def damaged(name: str, reason: str) -> BackbonedError:
    """The error for a file that can't be had from its archive."""
    return invalid(f"{name!r} can't be read from the archive: {reason}")


def is_hidden(name: str) -> bool:
    """Whether a path is passed over: a part of it begins with a dot, or it is what macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_text(name: str) -> bool:
    """Whether a name from a file system or an archive is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
