from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.training.datasets import Access, Dataset, Store, read_dataset
from backboned.server.training.datasets import remote as remote_module
from backboned.server.training.options import TrainingOptions

Members = dict[str, bytes]
Contents = Callable[[Dataset], Members]
Write = Callable[..., Path]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system in memory in place of a bucket: one that lists folders, as those of s3 and gs do."""
    monkeypatch.setitem(remote_module.DRIVERS, "memory", "fsspec")
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access([tmp_path], ["memory"], Store(tmp_path / ".fetched"))


def fill(bucket: Any, members: Members) -> None:
    for name, content in members.items():
        bucket.pipe_file(f"/photos/{name}", content)


def read(uri: str, access: Access) -> Dataset:
    return read_dataset(uri, TrainingOptions(), access)


def test_a_folder_is_listed_and_its_images_are_fetched(
    bucket: Any, access: Access, photos: Members, contents: Contents
) -> None:
    fill(bucket, {**photos, "rose/.hidden.jpg": b"", "README.md": b""})
    dataset = read("memory://photos/", access)
    bucket.rm("/photos", recursive=True)
    assert contents(dataset) == photos
    assert [s.path for s in dataset.skipped] == ["README.md"]


def test_a_single_folder_in_it_is_a_class_and_not_entered(bucket: Any, access: Access) -> None:
    fill(bucket, {f"rose/{colour}/{i}.jpg": b"x" for colour in ("red", "white") for i in range(3)})
    with pytest.raises(BackbonedError, match=r"one class only \(rose\)"):
        read("memory://photos", access)


def test_only_what_has_changed_is_fetched_again(
    bucket: Any, access: Access, tmp_path: Path, photos: Members, contents: Contents
) -> None:
    fill(bucket, photos)
    read("memory://photos", access)
    before = {f: f.stat().st_ino for f in (tmp_path / ".fetched").rglob("*") if f.is_file()}
    fill(bucket, {"rose/1.jpg": b"another"})
    assert contents(read("memory://photos", access))["rose/1.jpg"] == b"another"
    after = {f: f.stat().st_ino for f in (tmp_path / ".fetched").rglob("*") if f.is_file()}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


def test_a_manifest_in_the_folder_is_heeded_and_its_files_must_be_there(
    bucket: Any, access: Access, photos: Members
) -> None:
    rows = "".join(f"{name},{i % 2}\n" for i, name in enumerate(photos))
    fill(bucket, {**photos, "labels.csv": f"file,labels\n{rows}".encode()})
    assert read("memory://photos", access).classes == ("0", "1")
    fill(bucket, {"labels.csv": f"file,labels\n{rows}gone.jpg,1\n".encode()})
    with pytest.raises(BackbonedError, match=r"line 10: there is no file 'gone\.jpg'"):
        read("memory://photos", access)


def test_a_folder_of_shards_is_one_dataset(bucket: Any, access: Access, tmp_path: Path, write_tar: Write) -> None:
    for i in range(2):
        members = {"a.jpg": b"", "a.cls": b"0", "b.jpg": b"", "b.cls": b"1"}
        fill(bucket, {f"s{i}.tar": write_tar(tmp_path / "s", members).read_bytes()})
    fill(bucket, {"classes.txt": b"zebra\napple"})
    dataset = read("memory://photos", access)
    assert dataset.classes == ("zebra", "apple")
    assert len(dataset.train) + len(dataset.validation) == 4


def test_an_empty_address_is_not_found(bucket: Any, access: Access) -> None:
    with pytest.raises(BackbonedError, match="there is nothing at") as caught:
        read("memory://photos", access)
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_names_with_dots_in_a_bucket_lead_nowhere(
    bucket: Any, access: Access, tmp_path: Path, photos: Members, contents: Contents
) -> None:
    fill(bucket, photos)
    bucket.store["/photos/rose/../../../escaped.jpg"] = bucket.store["/photos/rose/1.jpg"]
    assert contents(read("memory://photos", access)) == photos
    assert not list(tmp_path.parent.glob("**/escaped.jpg"))
