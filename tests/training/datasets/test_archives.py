import os
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backboned.registry import BackbonedError
from backboned.server.training.datasets import Access, Dataset, Sample, Store, read_dataset
from backboned.server.training.datasets import compressed as compressed_module
from backboned.server.training.datasets import sources as sources_module
from backboned.server.training.options import TrainingOptions

Members = dict[str, bytes]
Pack = Callable[[Members], Path]
Write = Callable[..., Path]
Read = Callable[..., Dataset]
Refusal = Callable[..., str]
Contents = Callable[[Dataset], Members]


@pytest.fixture(params=["zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def pack(request: pytest.FixtureRequest, tmp_path: Path, write_zip: Write, write_tar: Write) -> Pack:
    """Packs files into each kind of archive."""
    file = tmp_path / f"photos.{request.param}"
    if request.param == "zip":
        return lambda members: write_zip(file, members)
    mode = {"tar": "w", "tgz": "w:gz"}.get(request.param) or f"w:{request.param.partition('.')[2]}"
    return lambda members: write_tar(file, members, mode)


def test_an_archive_of_class_folders_is_read_as_the_folder_would_be(
    pack: Pack, read: Read, tmp_path: Path, photos: Members, contents: Contents
) -> None:
    for name, content in photos.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    folder, archive = read(tmp_path / "folder"), read(pack(photos))
    assert (archive.classes, archive.train, archive.validation) == (folder.classes, folder.train, folder.validation)
    assert contents(archive) == photos


def test_a_packed_folder_is_entered(pack: Pack, read: Read, photos: Members, contents: Contents) -> None:
    members = {f"./flowers/{name}": content for name, content in photos.items()}
    members |= {"__MACOSX/flowers/._1.jpg": b"", "flowers/.DS_Store": b"", "flowers/README": b""}
    dataset = read(pack(members))
    assert contents(dataset) == photos
    assert [(s.path, s.reason) for s in dataset.skipped] == [("README", "not an image: its name has no ending")]


def test_an_archive_may_have_parts_and_a_manifest(pack: Pack, read: Read, photos: Members) -> None:
    rows = "".join(f"{name},{name[0]},{'val' if '3' in name else 'train'}\n" for name in photos)
    dataset = read(pack({**photos, "labels.csv": f"file,labels,split\n{rows}".encode()}))
    assert dataset.classes == ("d", "r")
    assert [s.path for s in dataset.validation] == ["daisy/3.jpg", "rose/3.jpg"]
    assert dataset.warnings[0].startswith("labels are those in labels.csv; the 2 folders beside it, such as 'daisy'")


def test_names_that_lead_out_are_skipped_and_nothing_is_written_under_them(
    pack: Pack, read: Read, tmp_path: Path, photos: Members, contents: Contents
) -> None:
    strange = {"../escaped.jpg": b"x", "/tmp/escaped.jpg": b"x", "rose/../../escaped.jpg": b"x", "C:/escaped.jpg": b"x"}
    dataset = read(pack({**photos, **strange}))
    assert {s.reason for s in dataset.skipped} == {"its name leads out of the archive"}
    assert len(dataset.skipped) == 4
    assert contents(dataset) == photos
    assert not list(tmp_path.parent.glob("**/escaped.jpg"))


def test_of_two_files_with_one_name_the_later_counts(
    tmp_path: Path, read: Read, photos: Members, write_tar: Write, contents: Contents
) -> None:
    file = write_tar(tmp_path / "photos.tar", photos)
    write_tar(file, {"./rose/1.jpg": b"newer"}, "a")
    dataset = read(file)
    assert contents(dataset)["rose/1.jpg"] == b"newer"
    assert [(s.path, s.reason) for s in dataset.skipped] == [
        ("rose/1.jpg", "it is in the archive twice: the later one counts")
    ]


def test_links_and_devices_in_a_tar_are_skipped(tmp_path: Path, read: Read, photos: Members, write_tar: Write) -> None:
    file = write_tar(tmp_path / "photos.tar", photos)
    kinds = {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE}
    with tarfile.open(file, "a") as archive:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(f"rose/{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert {(s.path, s.reason) for s in read(file).skipped} == {
        ("rose/soft.jpg", "a link: these are not followed in an archive"),
        ("rose/hard.jpg", "a link: these are not followed in an archive"),
        ("rose/pipe.jpg", "not a plain file"),
    }


@pytest.mark.parametrize("part", [0.05, 0.5, 0.7])
def test_a_part_of_an_archive_is_refused_whichever_it_is(
    pack: Pack, refusal: Refusal, part: float, photos: Members
) -> None:
    file = pack({name: os.urandom(3000) for name in photos})
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    assert "part of" in refusal(file)


def test_a_tar_cut_off_between_two_files_is_refused(
    tmp_path: Path, refusal: Refusal, photos: Members, write_tar: Write
) -> None:
    file = write_tar(tmp_path / "photos.tar", photos)
    file.write_bytes(file.read_bytes()[: 4 * 1024])
    assert "has no end mark" in refusal(file)


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar", "photos.tar.gz"])
@pytest.mark.parametrize("content", [b"", b"hello", bytes(2000), b"\x1f\x8b\x08hello", b"PK\x03\x04hello"])
def test_what_is_no_archive_is_refused(tmp_path: Path, refusal: Refusal, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refusal(tmp_path / name)


def test_an_empty_archive_is_refused(pack: Pack, refusal: Refusal) -> None:
    assert "no class folders" in refusal(pack({}))


def test_a_damaged_member_is_told_when_it_is_read(tmp_path: Path, read: Read, photos: Members) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name, content in photos.items():
            archive.writestr(name, content)
    damaged = (tmp_path / "photos.zip").read_bytes().replace(b"rose 2", b"rose X")
    (tmp_path / "photos.zip").write_bytes(damaged)
    dataset = read(tmp_path / "photos.zip")
    with pytest.raises(BackbonedError, match=r"'rose/2\.jpg' can't be read from the archive: Bad CRC-32"):
        dataset.read(Sample("rose/2.jpg", (1,)))
    assert dataset.read(Sample("rose/1.jpg", (1,))) == b"rose 1"


def test_an_encrypted_member_is_skipped(tmp_path: Path, read: Read, photos: Members, write_zip: Write) -> None:
    file = write_zip(tmp_path / "photos.zip", photos)
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")  # the first member's in the directory
    content[entry + 8] |= 1
    file.write_bytes(content)
    assert [(s.path, s.reason) for s in read(file).skipped] == [("daisy/0.jpg", "encrypted")]


def test_a_member_that_is_too_large_is_not_unpacked(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch, photos: Members, write_zip: Write
) -> None:
    monkeypatch.setattr(sources_module, "MAX_FILE_BYTES", 10_000)
    dataset = read(write_zip(tmp_path / "photos.zip", {**photos, "rose/bomb.jpg": bytes(10**6)}))
    with pytest.raises(BackbonedError, match="a file of at most"):
        dataset.read(Sample("rose/bomb.jpg", (1,)))


def test_a_tar_that_grows_beyond_reason_is_refused_and_leaves_nothing(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, write_tar: Write
) -> None:
    monkeypatch.setattr(compressed_module, "_HARMLESS_BYTES", 2**20)
    bomb = write_tar(tmp_path / "photos.tar.gz", {"rose/bomb.jpg": bytes(2**26)}, "w:gz")
    assert "more than 50 times its size" in refusal(bomb)
    assert [f for f in (tmp_path / ".fetched").rglob("*") if f.is_file()] == []


def test_a_tar_that_leaves_no_room_is_refused(
    tmp_path: Path, access: Access, monkeypatch: pytest.MonkeyPatch, photos: Members, write_tar: Write
) -> None:
    monkeypatch.setattr(Store, "room_bytes", lambda _: 5000)
    file = write_tar(tmp_path / "photos.tar.gz", photos, "w:gz")
    with pytest.raises(BackbonedError, match="more than half of the free disk"):
        read_dataset(file, TrainingOptions(), access)


def test_a_compressed_tar_is_unpacked_once_while_it_stays_the_same(
    tmp_path: Path, read: Read, photos: Members, write_tar: Write
) -> None:
    file = write_tar(tmp_path / "photos.tar.gz", photos, "w:gz")
    read(file)
    (unpacked,) = [f for f in (tmp_path / ".fetched").rglob("*") if f.is_file()]
    before = unpacked.stat().st_ino
    read(file)
    assert unpacked.stat().st_ino == before
    write_tar(file, {**photos, "rose/9.jpg": b"new"}, "w:gz")
    dataset = read(file)
    assert dataset.read(Sample("rose/9.jpg", (1,))) == b"new"


def test_what_is_asked_meanwhile_may_stop_the_unpacking(
    tmp_path: Path, access: Access, photos: Members, write_tar: Write
) -> None:
    def stop() -> None:
        raise InterruptedError("cancelled")

    file = write_tar(tmp_path / "photos.tar.gz", photos, "w:gz")
    with pytest.raises((InterruptedError, BackbonedError)):
        read_dataset(file, TrainingOptions(), Access(access.roots, store=access.store, check=stop))
    assert [f for f in (tmp_path / ".fetched").rglob("*") if f.is_file()] == []


def test_members_are_read_by_many_threads_at_once(pack: Pack, read: Read) -> None:
    members = {f"{name}/{i}.jpg": os.urandom(2000) + b"x" * i for name in "ab" for i in range(100)}
    dataset = read(pack(members))
    samples = [*dataset.train, *dataset.validation] * 5
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.read, samples)) == [members[s.path] for s in samples]


def test_the_fingerprint_of_an_archive_changes_with_its_files(pack: Pack, read: Read, photos: Members) -> None:
    first = read(pack(photos)).fingerprint
    assert read(pack(photos)).fingerprint == first
    assert read(pack({**photos, "rose/1.jpg": b"another length"})).fingerprint != first
