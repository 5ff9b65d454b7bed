"""Images come piece by piece, from several calls at once, and are whole or not there."""

import errno
import hashlib
import os
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.training.upload_declaration import Entry
from backboned.server.training.upload_images import MAX_PIECE_BYTES, ORPHAN_SECONDS, ImageStore, Writer

DATA = bytes(range(256)) * 40


def entry_of(data: bytes, path: str = "red/1.png") -> Entry:
    return Entry(path, ("red",), hashlib.sha256(data).hexdigest(), len(data))


ENTRY = entry_of(DATA)


@pytest.fixture
def images(tmp_path: Path) -> ImageStore:
    return opened(tmp_path)


def opened(folder: Path, quota_bytes: int = 2**30, now: float | None = None) -> ImageStore:
    images = ImageStore(folder / "images", quota_bytes)
    images.open(now)
    return images


def refused(images: ImageStore, offset: int, data: bytes, entry: Entry = ENTRY) -> BackbonedError:
    with pytest.raises(BackbonedError) as caught:
        images.write(Writer(), entry, offset, data)
    return caught.value


def test_an_image_is_there_once_its_last_byte_is(images: ImageStore) -> None:
    writer = Writer()
    for offset in range(0, len(DATA), 1000):
        assert not images.has(ENTRY.sha256)
        images.write(writer, ENTRY, offset, DATA[offset : offset + 1000])
    assert images.path(ENTRY.sha256).read_bytes() == DATA
    assert images.used_bytes == len(DATA)
    assert [f.name for f in images.path(ENTRY.sha256).parent.iterdir()] == [ENTRY.sha256]
    images.write(Writer(), ENTRY, 0, b"whatever")  # it is here: nothing is read
    assert images.path(ENTRY.sha256).read_bytes() == DATA


def test_another_call_goes_on_where_one_broke_off_also_after_a_restart(images: ImageStore, tmp_path: Path) -> None:
    images.write(Writer(), ENTRY, 0, DATA[:3000])
    assert images.received(ENTRY.sha256) == images.used_bytes == 3000
    images = opened(tmp_path)
    assert images.received(ENTRY.sha256) == images.used_bytes == 3000
    images.write(Writer(), ENTRY, 3000, DATA[3000:])
    assert images.has(ENTRY.sha256) and images.received(ENTRY.sha256) == 0


def test_a_gap_is_refused_with_the_byte_to_go_on_at(images: ImageStore) -> None:
    images.write(Writer(), ENTRY, 0, DATA[:3000])
    for offset in (3001, -1):
        error = refused(images, offset, b"x")
        assert (error.kind, error.field) == (ErrorKind.INVALID_ARGUMENT, "chunk.offset")
        assert "'red/1.png'" in error.message and "3000 have come" in error.message
    assert images.received(ENTRY.sha256) == 3000


def test_it_can_be_begun_anew(images: ImageStore) -> None:
    images.write(Writer(), ENTRY, 0, b"x" * 5000)
    images.write(Writer(), ENTRY, 0, DATA[:10])
    assert images.received(ENTRY.sha256) == images.used_bytes == 10
    images.write(Writer(), ENTRY, 10, DATA[10:])
    assert images.path(ENTRY.sha256).read_bytes() == DATA


@pytest.mark.parametrize("cuts", [(0, len(DATA)), (0, 100, len(DATA))])
def test_wrong_bytes_are_named_and_leave_nothing(images: ImageStore, cuts: tuple[int, ...]) -> None:
    wrong = b"X" + DATA[1:]
    *firsts, last = [(start, wrong[start:end]) for start, end in pairwise(cuts)]
    for offset, data in firsts:
        images.write(Writer(), ENTRY, offset, data)
    error = refused(images, *last)
    assert (error.kind, error.field) == (ErrorKind.INVALID_ARGUMENT, "chunk.sha256")
    assert "'red/1.png'" in error.message and hashlib.sha256(wrong).hexdigest() in error.message
    assert not images.has(ENTRY.sha256) and images.received(ENTRY.sha256) == images.used_bytes == 0


def test_more_bytes_than_declared_are_refused(images: ImageStore) -> None:
    error = refused(images, 0, DATA + b"x")
    assert error.field == "chunk.data" and f"declared {len(DATA)} bytes" in error.message
    assert images.used_bytes == 0


@pytest.mark.parametrize("size", [0, MAX_PIECE_BYTES + 1])
def test_a_piece_is_neither_empty_nor_too_large(images: ImageStore, size: int) -> None:
    error = refused(images, 0, bytes(size), entry_of(bytes(2 * MAX_PIECE_BYTES)))
    assert error.field == "chunk.data" and f"has {size} bytes" in error.message


def test_who_began_an_image_last_writes_it_and_the_others_are_passed_over(images: ImageStore) -> None:
    first, second = Writer(), Writer()
    images.write(first, ENTRY, 0, DATA[:4000])
    images.write(second, ENTRY, 0, DATA[:100])
    images.write(first, ENTRY, 4000, DATA[4000:8000])
    assert images.received(ENTRY.sha256) == 100
    images.write(second, ENTRY, 100, DATA[100:])
    images.write(first, ENTRY, 8000, DATA[8000:])
    assert images.path(ENTRY.sha256).read_bytes() == DATA and images.used_bytes == len(DATA)


def test_a_call_that_has_ended_can_be_followed_by_another(images: ImageStore) -> None:
    first, second = Writer(), Writer()
    images.write(first, ENTRY, 0, DATA[:4000])
    images.release(first)
    images.write(second, ENTRY, 4000, DATA[4000:])
    assert images.has(ENTRY.sha256)


def test_many_threads_send_the_same_images_at_once(images: ImageStore) -> None:
    pictures = [os.urandom(5000) for _ in range(20)]
    start = threading.Barrier(4)
    errors: list[Exception] = []

    def send(shift: int) -> None:
        writer = Writer()
        start.wait()
        try:
            for i in range(len(pictures)):
                data = pictures[(i + shift) % len(pictures)]
                for offset in range(0, len(data), 700):
                    images.write(writer, entry_of(data), offset, data[offset : offset + 700])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(shift,)) for shift in (0, 0, 1, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for data in pictures:
        entry = entry_of(data)
        if not images.has(entry.sha256):  # overtaken by one that went on with another image: the next call sends it
            images.write(Writer(), entry, 0, data)
        assert images.path(entry.sha256).read_bytes() == data
    assert images.used_bytes == 20 * 5000


def test_the_quota_is_for_all_images_together(tmp_path: Path) -> None:
    images = opened(tmp_path, quota_bytes=len(DATA) + 10)
    images.write(Writer(), ENTRY, 0, DATA)
    error = refused(images, 0, b"12345678901", entry_of(b"12345678901"))
    assert error.kind is ErrorKind.RESOURCE_EXHAUSTED and "--upload-quota" in error.message
    images.write(Writer(), entry_of(b"1234567890"), 0, b"1234567890")
    images.drop(ENTRY.sha256)
    assert images.used_bytes == 10
    images.write(Writer(), entry_of(b"12345678901"), 0, b"12345678901")


def test_a_full_disk_is_said_and_what_came_before_is_kept(images: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    images.write(Writer(), ENTRY, 0, DATA[:100])

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        error = refused(images, 100, DATA[100:])
    assert error.kind is ErrorKind.RESOURCE_EXHAUSTED and error.message.startswith("disk full")
    assert not images.has(ENTRY.sha256)
    images.write(Writer(), ENTRY, 100, DATA[100:])
    assert images.has(ENTRY.sha256) and images.used_bytes == len(DATA)


def test_an_image_that_something_holds_is_not_dropped(images: ImageStore, tmp_path: Path) -> None:
    images.write(Writer(), ENTRY, 0, DATA)
    (tmp_path / "held").hardlink_to(images.path(ENTRY.sha256))
    images.drop(ENTRY.sha256)
    assert images.has(ENTRY.sha256)
    (tmp_path / "held").unlink()
    images.drop(ENTRY.sha256)
    images.drop(ENTRY.sha256)
    assert not images.has(ENTRY.sha256) and images.used_bytes == 0


def test_room_is_made_of_what_nobody_has_held_for_a_day(tmp_path: Path) -> None:
    images = opened(tmp_path, quota_bytes=len(DATA) + 10)
    images.write(Writer(), ENTRY, 0, DATA)
    with pytest.raises(BackbonedError, match="quota"):
        images.make_room(11)
    old = time.time() - ORPHAN_SECONDS - 60
    os.utime(images.path(ENTRY.sha256), (old, old))
    images.make_room(10)
    assert images.has(ENTRY.sha256)
    images.make_room(11)
    assert not images.has(ENTRY.sha256) and images.used_bytes == 0


def test_a_start_removes_what_nobody_has_held_for_a_day(images: ImageStore, tmp_path: Path) -> None:
    held, orphan, part = DATA, b"orphan", b"beginning"
    images.write(Writer(), entry_of(held), 0, held)
    images.write(Writer(), entry_of(orphan), 0, orphan)
    images.write(Writer(), entry_of(part + b"end"), 0, part)
    (tmp_path / "held").hardlink_to(images.path(entry_of(held).sha256))
    (images.path(entry_of(held).sha256).parent / ".nfs0001").touch()  # not ours
    assert opened(tmp_path, now=time.time() + ORPHAN_SECONDS - 60).used_bytes == len(held + orphan + part)
    assert opened(tmp_path, now=time.time() + ORPHAN_SECONDS + 60).used_bytes == len(held)
    assert images.has(entry_of(held).sha256) and not images.has(entry_of(orphan).sha256)
