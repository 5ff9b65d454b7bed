"""An archive that torch and Python could read differently is refused before torch opens it."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backboned.registry.archive import check_members, check_sums
from backboned.registry.errors import BackbonedError

Refusal = Callable[[bytes], str]


def saved() -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.arange(64.0)}, file)
    return file.getvalue()


GOOD = saved()


def rewritten(method: int = zipfile.ZIP_STORED, *, comment: bytes = b"") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.comment = comment
    return out.getvalue()


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """Why an archive of these bytes is refused."""

    def refuse(content: bytes) -> str:
        (tmp_path / "file.pt").write_bytes(content)
        with pytest.raises(BackbonedError) as caught:
            check_members(tmp_path / "file.pt")
        return caught.value.message

    return refuse


@pytest.mark.parametrize("content", [GOOD, rewritten()], ids=["torch", "zip"])
def test_an_archive_passes_with_or_without_the_64_bit_end(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    check_members(tmp_path / "file.pt")
    check_sums(tmp_path / "file.pt")


def test_an_archive_that_begins_or_ends_elsewhere_than_the_file_is_refused(refusal: Refusal) -> None:
    plain = rewritten()
    assert "doesn't begin and end where the file does" in refusal(b"PK\x03\x04" + plain)
    assert "has no end" in refusal(rewritten(comment=b"a note"))
    assert "has no end" in refusal(plain + b"\x00")


def test_a_second_table_of_contents_is_refused(refusal: Refusal) -> None:
    at = len(GOOD) - 22 - 20 + 8  # where the locator says that the 64-bit end is
    moved = GOOD[:at] + struct.pack("<Q", 0) + GOOD[at + 8 :]
    assert "has an end that lies elsewhere" in refusal(moved)


def test_members_that_share_bytes_are_refused(refusal: Refusal) -> None:
    content = bytearray(rewritten())
    entries = [i for i in range(len(content)) if content[i : i + 4] == b"PK\x01\x02"]
    content[entries[1] + 42 : entries[1] + 46] = content[entries[0] + 42 : entries[0] + 46]
    assert "overlaps another member" in refusal(bytes(content))


def test_a_compressed_archive_is_refused(refusal: Refusal) -> None:
    assert refusal(rewritten(zipfile.ZIP_DEFLATED)) == "its archive is compressed, which torch.save never does"
