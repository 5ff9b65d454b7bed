"""Datasets of uploaded images: made in one step, known by their content, and gone with what they alone held."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.training.upload_declaration import Entry, Part
from backboned.server.training.upload_session import Incomplete, UploadSession
from backboned.server.training.uploads import UploadedDataset, UploadStore, find_upload

PHOTOS = {
    "red/1.png": b"first",
    "red/2.png": b"second",
    "blue/deep/1.png": b"third",
    "blue/again.png": b"first",
}


def entries(photos: dict[str, bytes] = PHOTOS, **parts: Part) -> list[Entry]:
    return [
        Entry(
            path,
            (path.split("/")[0],),
            hashlib.sha256(data).hexdigest(),
            len(data),
            parts.get(path[0], Part.TRAIN),
        )
        for path, data in photos.items()
    ]


@pytest.fixture
def store(tmp_path: Path) -> UploadStore:
    return opened(tmp_path)


def opened(folder: Path, quota_bytes: int = 2**30) -> UploadStore:
    store = UploadStore(folder / "uploads", quota_bytes)
    store.open()
    return store


def upload(
    store: UploadStore, declared: Sequence[Entry], contents: Sequence[bytes] = (), name: str = ""
) -> UploadedDataset | Incomplete:
    session = UploadSession(store)
    session.declare(name, declared)
    for data in contents:
        session.write(hashlib.sha256(data).hexdigest(), 0, data)
    outcome = session.finish()
    session.close()
    return outcome


def whole(store: UploadStore, photos: dict[str, bytes] = PHOTOS, name: str = "") -> UploadedDataset:
    outcome = upload(store, entries(photos), sorted(set(photos.values())), name)
    assert isinstance(outcome, UploadedDataset)
    return outcome


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_missing_is_told_and_only_that_need_come(store: UploadStore) -> None:
    outcome = upload(store, entries(), [b"second"])
    assert isinstance(outcome, Incomplete)
    assert outcome.missing == [hashlib.sha256(data).hexdigest() for data in (b"first", b"third")]
    assert store.list_datasets() == []
    done = upload(store, entries(), [b"first", b"third"])
    assert isinstance(done, UploadedDataset) and done.id == outcome.dataset_id


def test_a_dataset_is_a_folder_of_its_images_with_a_manifest(store: UploadStore) -> None:
    made = whole(store, name="colours")
    folder = store.datasets_folder / made.id
    assert (made.name, made.images, made.size_bytes) == ("colours", 4, 5 + 6 + 5 + 5)
    found = files(folder)
    lines = [json.loads(line) for line in found.pop("labels.jsonl").splitlines()]
    assert lines == [{"file": path, "labels": path.split("/")[0]} for path in PHOTOS]
    assert found.pop(".sha256").decode().split() == [e.sha256 for e in entries()]
    assert json.loads(found.pop(".dataset.json"))["id"] == made.id
    assert found == PHOTOS
    for entry in entries():
        assert (folder / entry.path).samefile(store.images.path(entry.sha256))


def test_parts_and_several_labels_are_in_the_manifest(store: UploadStore) -> None:
    declared = entries({"a.png": b"a", "b.png": b"b", "c.png": b"c"}, b=Part.VALIDATION, c=Part.TEST)
    declared[0] = Entry("a.png", ("night", "city"), declared[0].sha256, 1)
    outcome = upload(store, declared, [b"a", b"b", b"c"])
    assert isinstance(outcome, UploadedDataset)
    lines = (store.datasets_folder / outcome.id / "labels.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": "a.png", "labels": "night|city", "split": "train"},
        {"file": "b.png", "labels": "b.png", "split": "val"},
        {"file": "c.png", "labels": "c.png", "split": "test"},
    ]


def test_the_same_again_is_the_same_dataset_and_nothing_need_come(store: UploadStore, tmp_path: Path) -> None:
    made = whole(store, name="first")
    assert upload(store, list(reversed(entries())), name="second") == made
    again = opened(tmp_path)
    assert upload(again, entries()) == made
    assert again.list_datasets() == [made]


def test_datasets_are_listed_newest_first(store: UploadStore) -> None:
    made = [whole(store, {f"{i}.png": bytes([i])}) for i in range(3)]
    assert store.list_datasets() == made[::-1]


def test_deletion_drops_only_images_that_no_other_dataset_holds(store: UploadStore) -> None:
    one, two = whole(store), whole(store, {"x/1.png": b"first", "x/2.png": b"other"})
    store.purge(store.detach(one.id))
    assert store.list_datasets() == [two]
    held = {data for data in (b"first", b"second", b"third", b"other") if has(store, data)}
    assert held == {b"first", b"other"} and store.images.used_bytes == 10
    store.purge(store.detach(two.id))
    assert store.images.used_bytes == 0 and files(store.datasets_folder) == {}


def has(store: UploadStore, data: bytes) -> bool:
    return store.images.has(hashlib.sha256(data).hexdigest())


def test_an_image_that_is_deleted_during_an_upload_is_missing_again(store: UploadStore) -> None:
    one = whole(store, {"a/1.png": b"first"})
    session = UploadSession(store)
    session.declare("", entries())
    session.write(hashlib.sha256(b"second").hexdigest(), 0, b"second")
    store.purge(store.detach(one.id))
    session.write(hashlib.sha256(b"third").hexdigest(), 0, b"third")
    outcome = session.finish()
    assert isinstance(outcome, Incomplete)
    assert outcome.missing == [hashlib.sha256(b"first").hexdigest()]
    assert isinstance(upload(store, entries(), [b"first"]), UploadedDataset)


def test_an_unknown_dataset_is_not_found_with_the_nearest_ids(store: UploadStore) -> None:
    made = whole(store)
    near = made.id[:-1] + ("0" if made.id[-1] != "0" else "1")
    calls: list[Callable[[], object]] = [
        lambda: store.detach(near),
        lambda: find_upload(store.datasets_folder, near, field="dataset"),
        lambda: store.image(f"{near}/red/1.png"),
    ]
    for call in calls:
        with pytest.raises(BackbonedError) as caught:
            call()
        assert caught.value.kind is ErrorKind.NOT_FOUND
        assert f"unknown uploaded dataset {near!r}; did you mean {made.id!r}?" in caught.value.message
    for strange in ("", "..", "../datasets", ".deleted-1", "ds-", f"{made.id}/red"):
        with pytest.raises(BackbonedError):
            store.detach(strange)
    assert store.list_datasets() == [made]


def test_an_image_is_found_by_dataset_and_path(store: UploadStore) -> None:
    made = whole(store)
    assert store.image(f"{made.id}/blue/deep/1.png").read_bytes() == b"third"
    for name, kind, said in (
        (f"{made.id}/blue/deep/2.png", ErrorKind.NOT_FOUND, "did you mean '1.png'?"),
        (f"{made.id}/blue/deep", ErrorKind.INVALID_ARGUMENT, "its name has no ending"),
        (f"{made.id}/../{made.id}/red/1.png", ErrorKind.INVALID_ARGUMENT, "'..'"),
        (f"{made.id}/.dataset.json", ErrorKind.INVALID_ARGUMENT, "hidden"),
        (f"{made.id}/labels.jsonl", ErrorKind.INVALID_ARGUMENT, "not an image"),
        (f"{made.id}//red/1.png", ErrorKind.INVALID_ARGUMENT, "empty"),
        (made.id, ErrorKind.INVALID_ARGUMENT, "DATASET_ID/path"),
        ("../images/1.png", ErrorKind.INVALID_ARGUMENT, "DATASET_ID/path"),
    ):
        with pytest.raises(BackbonedError) as caught:
            store.image(name)
        assert caught.value.kind is kind and said in caught.value.message, name


def test_a_declaration_beyond_the_quota_is_refused_before_a_byte_comes(tmp_path: Path) -> None:
    store = opened(tmp_path, quota_bytes=16)
    with pytest.raises(BackbonedError, match="quota") as caught:
        whole(store, {f"a/{i}.png": b"photo" + bytes([i]) for i in range(3)})
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED and store.images.used_bytes == 0
    whole(store)  # 16 bytes: one of its images is twice in it


def test_without_hard_links_a_dataset_has_copies(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    made = whole(store)
    found = files(store.datasets_folder / made.id)
    assert PHOTOS.items() <= found.items()


def test_a_full_disk_leaves_no_dataset(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        with pytest.raises(BackbonedError, match="disk full") as caught:
            whole(store)
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED
    assert files(store.datasets_folder) == {} and list(store.datasets_folder.iterdir()) == []
    assert whole(store).images == 4


@pytest.mark.parametrize("when", ["link", "rename", "rmtree"])
def test_a_kill_in_the_midst_leaves_whole_datasets_only(store: UploadStore, tmp_path: Path, when: str) -> None:
    kept = whole(store, {"a/1.png": b"first", "a/2.png": b"kept"})
    program = f"""
import os, shutil, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_uploads as t
store = t.opened(Path({str(tmp_path)!r}))
calls = 0
def die(*_, **__):
    os.kill(os.getpid(), 9)
def die_later(*given, **named):
    global calls
    calls += 1
    return die() if calls == 3 else link(*given, **named)
link = os.link
if {when!r} == "link":
    os.link = die_later
if {when!r} == "rename":
    Path.rename = lambda path, target: die() if "datasets" in str(target) else os.rename(path, target)
if {when!r} == "rmtree":
    shutil.rmtree = die
made = t.whole(store)
store.purge(store.detach(made.id))
"""
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, timeout=100, check=False).returncode == -9
    again = opened(tmp_path)
    assert again.list_datasets() == [kept]
    assert [p.name for p in again.datasets_folder.iterdir()] == [kept.id]
    assert upload(again, entries({"a/1.png": b"first", "a/2.png": b"kept"})) == kept
    assert whole(again).images == 4


def test_the_messages_of_a_call_come_in_their_order(store: UploadStore) -> None:
    session = UploadSession(store)
    sha256 = hashlib.sha256(b"first").hexdigest()
    with pytest.raises(BackbonedError, match="no image is declared"):
        session.write(sha256, 0, b"first")
    with pytest.raises(BackbonedError, match="no image is declared"):
        session.finish()
    session.declare("", entries()[:1])
    session.declare("name", entries()[1:])
    session.write(sha256, 0, b"first")
    with pytest.raises(BackbonedError, match="after the first piece"):
        session.declare("", entries())
    with pytest.raises(BackbonedError, match="wasn't declared: '00'") as caught:
        session.write("00", 0, b"x")
    assert caught.value.field == "chunk.sha256"
    outcome = session.finish()
    assert isinstance(outcome, Incomplete) and outcome.name == "name" and len(outcome.missing) == 2


def test_what_has_come_of_a_missing_image_is_told(store: UploadStore) -> None:
    session = UploadSession(store)
    session.declare("", entries())
    sha256 = hashlib.sha256(b"second").hexdigest()
    session.write(sha256, 0, b"sec")
    outcome = session.finish()
    assert isinstance(outcome, Incomplete) and outcome.received == {sha256: 3}
