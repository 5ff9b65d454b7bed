"""A tar archive, read in place: its headers are read once, and then each file from its offset."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backboned.server.training.datasets.archive_names import ArchiveNames
from backboned.server.training.datasets.samples import unusable
from backboned.server.training.datasets.sources import Listing, Presence, check_size, damaged

_BLOCK_BYTES = 512
_MEMBERS_BETWEEN_CHECKS = 1000


@dataclass(frozen=True)
class _Member:
    offset: int
    size_bytes: int
    mtime: float


class TarArchive:
    """The files in an uncompressed tar. Safe to use from several threads."""

    def __init__(
        self, file: Path, where: str, check: Callable[[], None] = lambda: None, *, name: str = "", descend: bool = True
    ) -> None:
        """Read all headers of the tar at `file`. In errors `where` is what the dataset is called, and `name` the file.

        Unless `descend` is false a folder that holds all else is left out of names. `check` is called now and then;
        what it raises ends the reading. Raises `BackbonedError` `INVALID_ARGUMENT` for what is no whole tar, and
        `OSError`.
        """
        self._file = file
        name = name or file.name
        names: ArchiveNames[_Member] = ArchiveNames()
        try:
            with tarfile.open(file, "r:") as tar:
                end = 0
                for number, member in enumerate(tar):
                    if number % _MEMBERS_BETWEEN_CHECKS == 0:
                        check()
                        tar.members = []  # type: ignore[attr-defined]  # what it keeps of each would take gigabytes for many shards
                    _add(names, member)
                    end = tar.offset
                whole = _has_end_mark(file, end)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise unusable(where, f"{name} is no tar archive, or only a part of one ({error}): make it again, or "
                                  "copy it again") from error  # fmt: skip
        if not whole:
            raise unusable(where, f"{name} has no end mark, so that it is only a part of a tar archive: copy it "
                                  "again, or make it again")  # fmt: skip
        self._entries, self._listing = names.finish(descend=descend)

    def listing(self) -> Listing:
        """See `Source.listing`."""
        return self._listing

    def find(self, name: str) -> Presence:
        """See `Source.find`."""
        return Presence.THERE if name in self._entries else Presence.ABSENT

    def read(self, name: str) -> bytes:
        """See `Source.read`."""
        member = self._entries[name]
        check_size(name, member.size_bytes)
        with self._file.open("rb") as file:
            file.seek(member.offset)
            content = file.read(member.size_bytes)
        if len(content) < member.size_bytes:
            raise damaged(name, "the archive has become shorter")
        return content

    def stamp(self, name: str) -> str:
        """Size and modification time."""
        member = self._entries[name]
        return f"{member.size_bytes}\0{member.mtime}"


def _add(names: ArchiveNames[_Member], member: tarfile.TarInfo) -> None:
    if member.isdir():
        names.add_folder(member.name)
    elif member.issym() or member.islnk():
        names.skip(member.name, "a link: these are not followed in an archive")
    elif not member.isreg() or member.issparse():
        names.skip(member.name, "not a plain file")
    else:
        names.add(member.name, _Member(member.offset_data, member.size, member.mtime))


def _has_end_mark(file: Path, end: int) -> bool:
    """Whether a block of zeros follows the last member: whoever writes a tar puts it there at last."""
    with file.open("rb") as opened:
        opened.seek(end)
        return opened.read(_BLOCK_BYTES) == bytes(_BLOCK_BYTES)
