"""A folder on the daemon's machine."""

import os
from collections.abc import Sequence
from pathlib import Path

from backboned.server.training.datasets.data_roots import within
from backboned.server.training.datasets.sources import Listing, Presence, check_size, in_order, is_text
from backboned.server.training.events import SkippedFile


class LocalFolder:
    """A folder below the data roots. Links are followed while they stay below these. For several threads."""

    def __init__(self, folder: Path, roots: Sequence[Path]) -> None:
        self._folder = folder
        self._real_roots = [r.resolve() for r in roots]

    def listing(self) -> Listing:
        """All files and folders; links that can't be followed are skipped. Raises `OSError`."""
        return _Walk(self._folder, self._real_roots).listing()

    def find(self, name: str) -> Presence:
        """See `Source.find`."""
        path = self._folder / name
        if not path.is_file():
            return Presence.ABSENT
        return Presence.THERE if within(path, self._real_roots) else Presence.OUTSIDE

    def read(self, name: str) -> bytes:
        """See `Source.read`."""
        path = self._folder / name
        check_size(name, path.stat().st_size)
        return path.read_bytes()

    def stamp(self, name: str) -> str:
        """Size and modification time. Raises `OSError`."""
        stat = (self._folder / name).stat()
        return f"{stat.st_size}\0{stat.st_mtime_ns}"


class _Walk:
    def __init__(self, folder: Path, real_roots: Sequence[Path]) -> None:
        self._folder = folder
        self._real_roots = real_roots
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._skipped: list[SkippedFile] = []

    def listing(self) -> Listing:
        real = self._folder.resolve()
        self._visit(self._folder, "", real, frozenset({real}))
        return Listing(in_order(self._files), frozenset(self._folders), tuple(self._skipped))

    def _visit(self, folder: Path, prefix: str, real: Path, above: frozenset[Path]) -> None:
        """`real` is the folder's real path, `above` are those of the folders that it is in, and its own."""
        with os.scandir(folder) as entries:
            ordered = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        for entry in ordered:
            name = prefix + entry.name
            path = folder / entry.name
            if not is_text(entry.name):
                self._skip(os.fsencode(name).decode(errors="backslashreplace"), "its name is no UTF-8")
            elif entry.is_symlink() and not within(path, self._real_roots):
                self._skip(name, Presence.OUTSIDE.value)
            elif entry.is_dir():
                inner = path.resolve() if entry.is_symlink() else real / entry.name
                if inner in above:
                    self._skip(name, "a link to a folder that it is in")
                else:
                    self._folders.add(name)
                    self._visit(path, f"{name}/", inner, above | {inner})
            elif entry.is_file():
                self._files.add(name)
            else:
                self._skip(name, "a link to nothing" if entry.is_symlink() else "not a file")

    def _skip(self, name: str, reason: str) -> None:
        self._skipped.append(SkippedFile(name, reason))
