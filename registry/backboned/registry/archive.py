"""The zip archive that `torch.save` writes, told from any other before torch opens it.

torch and Python each read an archive in their own way. Where a file leaves room for two readings, what was checked need
not be what is loaded: so there must be none.
"""

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backboned.registry.pickled import MAX_PICKLE_BYTES, check_pickle
from backboned.registry.refusal import IncompleteFile, one_line, refused

MAX_CONTENTS_BYTES = 8 * 2**20
"""Of an archive's table of contents: some 70,000 tensors."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 0x1 | 0x40


def check_members(path: Path) -> None:
    """Check an archive's table of contents, and the pickle in it; the tensors aren't read.

    Raises `BackbonedError` `DATA_LOSS` unless `torch.save` may have written it.
    """
    count = check_end(path)
    with _opened(path) as archive:
        members = archive.infolist()
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise refused("this is a TorchScript program, not weights: save model.state_dict() instead")
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise refused("its archive is compressed, which torch.save never does")
        if any(m.flag_bits & _ENCRYPTED for m in members):
            raise refused("its archive is encrypted, which torch.save never does")
        if len(set(names)) != len(names):
            raise refused("its archive has two members of one name")
        if len(members) != count:
            raise IncompleteFile(f"the file is altered: its archive has {len(members)} members, not {count}")
        _check_places(members, archive.start_dir)
        pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise refused("not a checkpoint that can be read: its archive is of something else than torch.save writes")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise refused(f"it holds more than {MAX_PICKLE_BYTES >> 20} MiB beside its tensors")
        pickle = archive.read(pickles[0])
    check_pickle(pickle)


def check_sums(path: Path) -> None:
    """Check that an archive's members match their CRC-32. Raises `IncompleteFile`."""
    with _opened(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise IncompleteFile(f"the file is altered: {broken[:200]!r} in it doesn't match its checksum")


def check_end(path: Path) -> int:
    """Check that an archive ends in one way only, with its table of contents before; returns its number of members.

    Reads no more than that end. Raises `BackbonedError` `DATA_LOSS`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - _LOCATOR.size - _END_64.size))
        tail = file.read()
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
        raise IncompleteFile("the file is truncated or altered: its archive has no end")
    *_, count, contents_bytes, contents_at, comment_bytes = _END.unpack(end)
    contents_end = size - _END.size
    if tail[-_END.size - _LOCATOR.size :].startswith(b"PK\x06\x07"):
        _, _, end_64_at, _ = _LOCATOR.unpack(tail[-_END.size - _LOCATOR.size : -_END.size])
        contents_end -= _LOCATOR.size + _END_64.size
        if end_64_at != contents_end or not tail.startswith(b"PK\x06\x06"):
            raise IncompleteFile("the file is altered: its archive has an end that lies elsewhere")
        *_, count, contents_bytes, contents_at = _END_64.unpack(tail[: _END_64.size])
    if comment_bytes or contents_at + contents_bytes != contents_end:
        raise IncompleteFile("the file is altered: its archive doesn't begin and end where the file does")
    if contents_bytes > MAX_CONTENTS_BYTES:
        raise refused(f"its archive's table of contents has more than {MAX_CONTENTS_BYTES >> 20} MiB")
    return int(count)


def _check_places(members: list[zipfile.ZipInfo], contents_at: int) -> None:
    """Check that no two members share bytes: else a small file could hold any number of large tensors."""
    at = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        if member.header_offset < at:
            raise IncompleteFile(f"the file is altered: {member.filename[:200]!r} in it overlaps another member")
        at = member.header_offset + _LOCAL_HEADER_BYTES + member.file_size
    if at > contents_at:
        raise IncompleteFile("the file is truncated or altered: its last member goes on beyond its end")


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (
        zipfile.BadZipFile,
        EOFError,
        ValueError,
        OSError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ) as error:
        raise IncompleteFile(f"the file is truncated or altered: {one_line(error)}") from error
