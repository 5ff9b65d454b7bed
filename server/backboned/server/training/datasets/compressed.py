"""A compressed tar: it is unpacked to a tar once, since nothing in it can be read without all that comes before."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.training.datasets.samples import unusable
from backboned.server.training.datasets.store import Store

_PIECE_BYTES = 2**20
_MOST_TIMES = 50
_HARMLESS_BYTES = 2**28


def plain_tar(file: Path, where: str, store: Store | None, check: Callable[[], None]) -> Path:
    """`file` itself, or if it is compressed the tar in it, in the store.

    Only the tar is written, not the files in it. Raises `BackbonedError`: `INVALID_ARGUMENT` for one that is damaged,
    or grows so much that it can hold no images; `RESOURCE_EXHAUSTED` if it takes more than half of the free disk.
    """
    with file.open("rb") as opened:
        magic = opened.read(6)
    opener = _opener(magic)
    if opener is None:
        return file
    if store is None:
        raise ValueError(f"there is nowhere to unpack {file}")
    stat = file.stat()
    key = f"unpacked\0{file}\0{stat.st_size}\0{stat.st_mtime_ns}"

    def unpack(target: Path) -> None:
        try:
            with opener(file) as packed, target.open("wb") as unpacked:
                _copy(packed, unpacked, stat.st_size, where, store, check)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise unusable(where, f"{file.name} is damaged or only a part of an archive ({error}): copy it again, or "
                                  "make it again") from error  # fmt: skip

    return store.get(key) or store.add(key, unpack)


def _copy(  # noqa: PLR0917 - what bounds it
    packed: IO[bytes], unpacked: IO[bytes], packed_bytes: int, where: str, store: Store, check: Callable[[], None]
) -> None:
    room = store.room_bytes()
    size = 0
    while piece := packed.read(_PIECE_BYTES):
        check()
        size += len(piece)
        if size > max(_HARMLESS_BYTES, _MOST_TIMES * packed_bytes):
            raise unusable(where, f"unpacked it has more than {_MOST_TIMES} times its size: images don't pack so well")
        if size > room:
            raise BackbonedError(
                ErrorKind.RESOURCE_EXHAUSTED,
                f"dataset {where!r} takes more than half of the free disk once unpacked: make room in the state "
                "folder, or give an uncompressed .tar or a .zip, which are read in place",
                field="dataset",
            )
        unpacked.write(piece)


def _opener(magic: bytes) -> Callable[[Path], IO[bytes]] | None:
    """What opens a file that begins with `magic`; None if it isn't compressed."""
    known: tuple[tuple[bytes, object], ...] = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
    found = next((function for start, function in known if magic.startswith(start)), None)
    return cast("Callable[[Path], IO[bytes]] | None", found)
