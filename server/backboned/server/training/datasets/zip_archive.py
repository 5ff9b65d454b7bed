"""A zip archive, read in place."""

import lzma
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

from backboned.server.training.datasets.archive_names import ArchiveNames
from backboned.server.training.datasets.samples import unusable
from backboned.server.training.datasets.sources import Listing, Presence, check_size, damaged

_ENCRYPTED = 0x1
_BROKEN = (BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)


class ZipArchive:
    """The files in a zip. Members are unpacked one by one in memory; safe to use from several threads."""

    def __init__(self, file: Path, where: str, *, name: str = "") -> None:
        """Read the directory of the zip at `file`; `where` is what the dataset is called in errors, `name` the file.

        Raises `BackbonedError` `INVALID_ARGUMENT` for what is no whole zip, and `OSError`.
        """
        name = name or file.name
        try:
            self._zip = ZipFile(file)
        except _BROKEN as error:
            raise unusable(where, f"{name} is no zip archive, or only a part of one ({error}): make it again, or "
                                  "copy it again") from error  # fmt: skip
        names: ArchiveNames[ZipInfo] = ArchiveNames()
        for info in self._zip.infolist():
            path = info.filename.replace("\\", "/")  # as some programs for Windows write it
            if info.is_dir():
                names.add_folder(path)
            elif info.flag_bits & _ENCRYPTED:
                names.skip(path, "encrypted")
            else:
                names.add(path, info)
        self._entries, self._listing = names.finish()

    def listing(self) -> Listing:
        """See `Source.listing`."""
        return self._listing

    def find(self, name: str) -> Presence:
        """See `Source.find`."""
        return Presence.THERE if name in self._entries else Presence.ABSENT

    def read(self, name: str) -> bytes:
        """See `Source.read`. The member's checksum is verified."""
        info = self._entries[name]
        check_size(name, info.file_size)
        try:
            return self._zip.read(info)  # never more than the size that it declares
        except _BROKEN as error:
            raise damaged(name, str(error) or type(error).__name__) from error

    def stamp(self, name: str) -> str:
        """Size and checksum."""
        info = self._entries[name]
        return f"{info.file_size}\0{info.CRC}"
