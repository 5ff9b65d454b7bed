"""The loader over a real directory, in this process: what is on disk is what answers."""

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backboned.registry import BackbonedError, ErrorKind
from backboned.registry.digest import file_digest
from backboned.registry.manifest import Manifest
from backboned.server.serving.snapshot import State
from tests.serving.rooms import Room, state


def test_a_dropped_file_answers_and_a_second_one_takes_over(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    assert room.predict("m").version == 1
    room.drop("m", seed=2)
    room.wait(lambda: room.versions("m") == {1: State.SERVING, 2: State.SERVING})
    assert room.predict("m").version == 2
    assert room.predict("m", version=1).predictions[0].classes != room.predict("m").predictions[0].classes


def test_the_same_content_again_makes_no_version(room: Room) -> None:
    file = room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    file.write_bytes(file.read_bytes())
    marker = room.drop("other", seed=2)
    room.wait(lambda: room.versions("other"))  # the look that finds this one has looked at the first, too
    marker.unlink()
    room.wait(lambda: not room.loader.snapshot.refused)
    assert room.versions("m") == {1: State.SERVING}


def test_versions_beyond_the_limit_are_loaded_when_they_are_asked_for(room: Room) -> None:
    for version in (1, 2, 3):
        room.drop("m", seed=version)
        room.wait_for_version("m", version)
    room.wait(lambda: room.versions("m") == {1: State.AVAILABLE, 2: State.SERVING, 3: State.SERVING})
    assert room.predict("m", version=1).version == 1
    assert room.predict("m").version == 3


def test_an_alias_keeps_its_version_loaded(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: 1 in room.versions("m"))
    room.records.aliases.set("m", "stable", 1)
    for version in (2, 3, 4):
        room.drop("m", seed=version)
        room.wait_for_version("m", version)
    room.wait(lambda: room.versions("m")[2] is State.AVAILABLE)
    assert room.versions("m")[1] is State.SERVING
    assert room.predict("m", alias="stable").version == 1
    assert room.predict("m", alias="latest").version == 4


def test_a_version_that_is_removed_is_retired_and_its_stages_are_freed(room: Room) -> None:
    room.drop("m", seed=1).unlink()
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    (room.root / "m" / "model.pt").unlink()
    shutil.rmtree(room.root / "m" / "1")
    room.wait(lambda: not room.versions("m"))
    with pytest.raises(BackbonedError, match="unknown model 'm'"):
        room.predict("m")
    room.wait(lambda: room.stages.loaded() == (0, 0))


def test_a_damaged_manifest_keeps_what_served_and_tells_why(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    manifest = room.root / "m" / "1" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:50])
    room.wait(lambda: room.versions("m") == {1: State.QUARANTINED})
    assert room.predict("m").version == 1
    manifest.write_text(whole)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})


def test_a_better_epoch_that_is_damaged_leaves_the_earlier_one_serving(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    before = room.predict("m").predictions[0].classes
    folder = room.root / "m" / "1"
    manifest = Manifest.read(folder)
    (folder / "epoch-0001.pt").write_bytes(b"damaged")
    torch.save(state(2, 3), room.root / "whole.pt")
    whole = file_digest(room.root / "whole.pt")
    size_bytes = (room.root / "whole.pt").stat().st_size
    better = replace(manifest.best, epoch=1, file="epoch-0001.pt", sha256=whole, size_bytes=size_bytes)
    manifest.with_epoch(better, best=True, stages=manifest.stages).write(folder)
    room.wait(lambda: room.versions("m") == {1: State.QUARANTINED})
    assert "epoch-0001.pt is truncated or altered" in room.loader.snapshot.models["m"].versions[1].reason
    assert room.predict("m").predictions[0].classes == before
    (room.root / "whole.pt").replace(folder / "epoch-0001.pt")  # mended
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    assert room.predict("m").predictions[0].classes != before


def test_newer_versions_that_are_all_damaged_do_not_push_out_the_one_that_serves(room: Room) -> None:
    room.drop("m", seed=1)
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    manifest = Manifest.read(room.root / "m" / "1")
    for version in (2, 3, 4):  # two is all that is kept loaded
        folder = room.root / "m" / str(version)
        folder.mkdir()
        (folder / manifest.best.file).write_bytes(b"damaged")
        replace(manifest, version=version).write(folder)
    room.wait(lambda: room.versions("m") == {1: State.SERVING} | dict.fromkeys((2, 3, 4), State.QUARANTINED))
    assert room.predict("m").version == 1


def test_what_is_not_there_is_told_with_the_nearest_name(room: Room) -> None:
    room.drop("flowers", seed=1)
    room.wait(lambda: room.versions("flowers"))
    with pytest.raises(BackbonedError, match="did you mean 'flowers'") as caught:
        room.predict("flower")
    assert caught.value.kind is ErrorKind.NOT_FOUND
    with pytest.raises(BackbonedError, match="unknown version of flowers '7'"):
        room.predict("flowers", version=7)


def test_a_file_that_the_full_disk_keeps_out_is_adopted_once_there_is_room(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]
    copy = shutil.copyfile

    def copyfile(source: Path, target: Path) -> object:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    room.drop("m", seed=1)
    room.wait(lambda: any("No space left" in f.reason for f in room.loader.snapshot.refused))
    assert not room.versions("m")
    full[0] = False
    room.wait(lambda: room.versions("m") == {1: State.SERVING})
    assert not room.loader.snapshot.refused
