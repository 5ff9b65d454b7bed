"""The names in an archive: which are taken as they are, and which can't be."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from backboned.server.training.datasets.sources import Listing, in_order, is_hidden, is_text
from backboned.server.training.events import SkippedFile

Entry = TypeVar("Entry")


class ArchiveNames(Generic[Entry]):
    """Collects the members of an archive. Nothing is ever written under their names. For one thread."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._folders: set[str] = set()
        self._skipped: list[SkippedFile] = []

    def add(self, name: str, entry: Entry) -> None:
        """A file. Of two with one name the later counts, as it would after unpacking."""
        path = self._path(name)
        if not path:
            return
        if path in self._entries:
            self._skipped.append(SkippedFile(path, "it is in the archive twice: the later one counts"))
        self._entries[path] = entry
        self._add_folders(path.rpartition("/")[0])

    def add_folder(self, name: str) -> None:
        """A folder, perhaps empty."""
        self._add_folders(self._path(name.rstrip("/")))

    def skip(self, name: str, reason: str) -> None:
        """What is no file that can be read."""
        if path := self._path(name):
            self._skipped.append(SkippedFile(path, reason))

    def finish(self, *, descend: bool = True) -> tuple[Mapping[str, Entry], Listing]:
        """The entries by name, and the listing.

        Where all lies in one folder that has folders or a manifest in it, as when a folder was packed, names are those
        within that folder, unless `descend` is false.
        """
        prefix = self._only_folder() if descend else ""
        cut = len(prefix)
        entries = {name[cut:]: entry for name, entry in self._entries.items()}
        folders = frozenset(name[cut:] for name in self._folders if len(name) > cut)
        skipped = tuple(SkippedFile(s.path.removeprefix(prefix), s.reason) for s in self._skipped)
        return entries, Listing(in_order(set(entries)), folders, skipped)

    def _only_folder(self) -> str:
        top = {name for name in self._folders if "/" not in name}
        if len(top) != 1 or any("/" not in name for name in self._entries):
            return ""
        prefix = f"{top.pop()}/"
        manifest = any(f"{prefix}labels.{ending}" in self._entries for ending in ("csv", "jsonl"))
        return prefix if manifest or any(name.startswith(prefix) for name in self._folders) else ""

    def _path(self, name: str) -> str:
        """The name as a path within the archive; empty if it is passed over."""
        shown = name.encode(errors="backslashreplace").decode()
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not is_text(name):
            self._skipped.append(SkippedFile(shown, "its name is no UTF-8"))
        elif name.startswith("/") or ".." in parts or "\0" in name or name[1:3] == ":/":
            self._skipped.append(SkippedFile(shown, "its name leads out of the archive"))
        elif not is_hidden("/".join(parts)):
            return "/".join(parts)
        return ""

    def _add_folders(self, path: str) -> None:
        while path and path not in self._folders:
            self._folders.add(path)
            path = path.rpartition("/")[0]
