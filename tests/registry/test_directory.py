"""A look at the checkpoint directory finds what could be served, whatever else lies in it."""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp

import pytest

from backboned.registry.directory import CheckpointDirectory, Tombstone
from backboned.registry.errors import BackbonedError
from backboned.registry.look import Seen, Signature


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    (tmp_path / "checkpoints" / "flowers").mkdir(parents=True)
    return CheckpointDirectory(tmp_path / "checkpoints")


@pytest.fixture
def flowers(directory: CheckpointDirectory) -> Path:
    """The folder of one model."""
    return directory.root / "flowers"


def found(seen: Seen) -> tuple[list[tuple[str, int]], list[str], dict[str, str]]:
    """Versions, names of dropped files, and the reasons of refused ones by name."""
    return sorted(seen.versions), [p.name for p in seen.drops], {p.name: reason for p, reason in seen.refused.items()}


def write_version(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_versions_and_dropped_files_are_found_by_model(directory: CheckpointDirectory, flowers: Path) -> None:
    write_version(flowers / "1")
    write_version(flowers / "20")
    write_version(directory.root / "birds" / "1")
    for name in ("a.pt", "b.pth", "c.safetensors"):
        (flowers / name).write_bytes(b"x")
    seen = directory.scan()
    assert found(seen) == (
        [("birds", 1), ("flowers", 1), ("flowers", 20)],
        ["a.pt", "b.pth", "c.safetensors"],
        {},
    )
    assert {d.model for d in seen.drops.values()} == {"flowers"}
    assert seen.versions["flowers", 1] == Signature.of(flowers / "1" / "manifest.json")


def test_what_is_none_of_it_is_passed_over(directory: CheckpointDirectory, flowers: Path) -> None:
    (directory.root / "loose.pt").write_bytes(b"x")
    (directory.root / "README.md").write_text("x")
    for name in ("notes.txt", "classes.txt", "a.PT", "b.pt.part", ".hidden.pt", ".writing-1.pt"):
        (flowers / name).write_bytes(b"x")
    (flowers / "1").mkdir()  # no manifest yet
    (flowers / "2").write_text("a file")
    write_version(directory.root / ".trash" / "1")
    assert found(directory.scan()) == ([], [], {})


@pytest.mark.parametrize("name", ["0", "01", "-1", "+1", "1.0", "1e3", "²", "\uff11", "9" * 19, "9" * 200, "v1", " 1"])
def test_a_folder_whose_name_is_no_version_is_none(directory: CheckpointDirectory, flowers: Path, name: str) -> None:
    write_version(flowers / name)
    assert found(directory.scan()) == ([], [], {})
    assert directory.versions("flowers") == []


def test_the_highest_version_is_below_2_to_the_62(directory: CheckpointDirectory, flowers: Path) -> None:
    write_version(flowers / str(2**62 - 1))
    write_version(flowers / str(2**62))
    assert directory.versions("flowers") == [2**62 - 1]


def test_a_folder_or_a_link_to_nothing_with_the_name_of_a_file_is_refused(
    directory: CheckpointDirectory, flowers: Path
) -> None:
    (flowers / "folder.pt").mkdir()
    os.mkfifo(flowers / "pipe.pt")
    (flowers / "lost.pt").symlink_to(flowers / "nothing.pt")
    (flowers / "loop.pt").symlink_to("loop.pt")
    assert found(directory.scan())[2] == {
        "folder.pt": "it is not a file",
        "pipe.pt": "it is not a file",
        "lost.pt": "it is a link to nothing",
        "loop.pt": "it is a link to nothing",
    }


def test_links_that_stay_inside_are_followed_and_those_that_lead_out_are_refused(
    directory: CheckpointDirectory, flowers: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    write_version(outside / "1")
    (outside / "a.pt").write_bytes(b"x")
    write_version(directory.root / "birds" / "1")
    (directory.root / "birds" / "b.pt").write_bytes(b"x")
    (flowers / "inside.pt").symlink_to(directory.root / "birds" / "b.pt")
    (flowers / "2").symlink_to(directory.root / "birds" / "1")
    (flowers / "outside.pt").symlink_to(outside / "a.pt")
    (flowers / "1").symlink_to("../../outside/1")
    (directory.root / "whole").symlink_to(outside)
    (directory.root / "loop").symlink_to("loop")
    versions, drops, refused = found(directory.scan())
    assert versions == [("birds", 1), ("flowers", 2)]
    assert drops == ["b.pt", "inside.pt"]
    assert set(refused) == {"outside.pt", "1", "a.pt"}
    assert set(refused.values()) == {"it is a link that leads out of the checkpoint directory"}


def test_the_root_itself_may_be_a_link(directory: CheckpointDirectory, flowers: Path, tmp_path: Path) -> None:
    write_version(flowers / "1")
    (tmp_path / "link").symlink_to(directory.root)
    assert found(CheckpointDirectory(tmp_path / "link").scan()) == ([("flowers", 1)], [], {})


def test_names_that_cannot_be_told_are_refused(directory: CheckpointDirectory, flowers: Path) -> None:
    (directory.root / "two words").mkdir()
    (directory.root / "two words" / "a.pt").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(flowers) + b"/\xff.pt")).write_bytes(b"x")
    refused = found(directory.scan())[2]
    assert "model name 'two words' can't be used" in refused["a.pt"]
    assert refused["\udcff.pt"] == "its name is not UTF-8: rename it"


def test_without_a_root_a_look_fails(directory: CheckpointDirectory) -> None:
    shutil.rmtree(directory.root)
    with pytest.raises(FileNotFoundError):
        directory.scan()
    directory.root.write_text("a file in its place")
    with pytest.raises(NotADirectoryError):
        directory.scan()


def test_a_signature_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert Signature.of(path) is None
    path.write_bytes(b"one")
    first = Signature.of(path)
    assert first == Signature.of(path)
    (tmp_path / "b.pt").write_bytes(b"two")
    os.utime(tmp_path / "b.pt", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    (tmp_path / "b.pt").replace(path)  # of one size and one time
    assert Signature.of(path) != first


def test_a_drop_knows_what_stands_beside_it(directory: CheckpointDirectory, flowers: Path) -> None:
    (flowers / "a.pt").write_bytes(b"x")
    (before,) = directory.scan().drops.values()
    (again,) = directory.scan().drops.values()
    assert before == again and before.key == again.key
    (flowers / "classes.txt").write_text("ant\nbee")
    (after,) = directory.scan().drops.values()
    assert before != after and before.key != after.key


def test_sixteen_who_reserve_at_once_get_sixteen_versions(directory: CheckpointDirectory) -> None:
    with ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(lambda _: directory.reserve("birds"), range(64)))
    assert sorted(numbers) == list(range(1, 65))
    assert directory.versions("birds") == list(range(1, 65))


def test_a_reserved_version_is_above_all_that_are_there_and_all_that_were(
    directory: CheckpointDirectory, flowers: Path
) -> None:
    (flowers / "7").mkdir()
    (flowers / "3").write_text("taken by a file")
    assert directory.reserve("flowers") == 8
    assert directory.reserve("flowers", above=12) == 13
    assert directory.version("flowers", 13).is_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "-x", "x" * 64, "a b", "é", "a\0"])
def test_a_name_that_is_no_models_is_not_reserved(directory: CheckpointDirectory, name: str) -> None:
    with pytest.raises(BackbonedError, match="model name"):
        directory.reserve(name)
    assert sorted(p.name for p in directory.root.parent.iterdir()) == ["checkpoints"]


def write_adopted(folder: Path, source: str) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"adopted_from": source, "adopted_key": "7@1"}))
    (folder / "epoch-0001.pt").write_bytes(b"weights")
    (folder / "more").mkdir()


def test_a_removed_version_is_gone_and_its_number_is_not_given_again(
    directory: CheckpointDirectory, flowers: Path
) -> None:
    for version in (1, 2, 3):
        write_adopted(flowers / str(version), "")
    directory.remove("flowers", 3)
    directory.remove("flowers", 1)
    seen = directory.scan()
    assert found(seen)[0] == [("flowers", 2)] and seen.deleted == {("flowers", 3)}
    assert sorted(p.name for p in flowers.iterdir()) == ["2", "3"]
    assert [p.name for p in (flowers / "3").iterdir()] == ["deleted.json"]
    assert directory.reserve("flowers") == 4


def test_of_a_removed_version_the_dropped_file_is_remembered_as_long_as_it_is_there(
    directory: CheckpointDirectory, flowers: Path
) -> None:
    (flowers / "kept.pt").write_bytes(b"weights")
    write_adopted(flowers / "1", "kept.pt")
    write_adopted(flowers / "2", "gone.pt")
    write_version(flowers / "3")
    for version in (1, 2):
        directory.remove("flowers", version)
    assert directory.scan().deleted == {("flowers", 1)}
    assert directory.tombstone("flowers", 1) == Tombstone("kept.pt", "7@1")
    assert not (flowers / "2").exists() and (flowers / "kept.pt").exists()


def test_a_removal_that_was_broken_off_can_be_repeated(directory: CheckpointDirectory, flowers: Path) -> None:
    write_adopted(flowers / "1", "")
    (flowers / "1" / "manifest.json").rename(flowers / "1" / "deleted.json")  # killed here
    assert found(directory.scan())[0] == []
    directory.remove("flowers", 1)
    assert [p.name for p in (flowers / "1").iterdir()] == ["deleted.json"]


def test_what_a_link_leads_to_is_not_removed(directory: CheckpointDirectory, flowers: Path) -> None:
    write_adopted(flowers / "1", "")
    (flowers / "2").symlink_to(flowers / "1")
    write_version(flowers / "3")
    (flowers / "3" / "epoch-0001.pt").symlink_to(flowers / "1" / "epoch-0001.pt")
    (flowers / "3" / "more").symlink_to(flowers / "1" / "more")
    directory.remove("flowers", 2)
    directory.remove("flowers", 3)
    assert found(directory.scan())[0] == [("flowers", 1)]
    assert (flowers / "1" / "epoch-0001.pt").read_bytes() == b"weights" and (flowers / "1" / "more").is_dir()
    assert directory.reserve("flowers") == 4


def test_a_tombstone_that_says_nothing_is_of_no_file(directory: CheckpointDirectory, flowers: Path) -> None:
    (flowers / "1").mkdir()
    for content in ("", "[]", "{}", '{"adopted_from": "../../etc/passwd", "adopted_key": 1}'):
        (flowers / "1" / "deleted.json").write_text(content)
        assert directory.tombstone("flowers", 1) in {Tombstone(), Tombstone("passwd", "1")}


@pytest.mark.parametrize("kind", ["deep", "pipe", "endless"])
def test_a_tombstone_beyond_all_measure_is_of_no_file(directory: CheckpointDirectory, flowers: Path, kind: str) -> None:
    (flowers / "1").mkdir()
    tombstone = flowers / "1" / "deleted.json"
    if kind == "deep":
        tombstone.write_text("[" * 100_000)
    elif kind == "pipe":
        os.mkfifo(tombstone)
    else:
        tombstone.symlink_to("/dev/zero")
    assert directory.scan().deleted == {("flowers", 1)}
    assert directory.tombstone("flowers", 1) == Tombstone()


def test_a_version_whose_manifest_is_a_link_to_nothing_is_refused(
    directory: CheckpointDirectory, flowers: Path
) -> None:
    (flowers / "1").mkdir()
    (flowers / "1" / "manifest.json").symlink_to("nowhere")
    assert found(directory.scan()) == ([], [], {"1": "its manifest.json is a link to nothing"})


@pytest.fixture
def stranger() -> Iterator[Path]:
    """A folder that belongs to somebody without rights, as whom the test runs."""
    folder, me = Path(mkdtemp()), os.geteuid()
    if me == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    os.seteuid(me)
    shutil.rmtree(folder)


def test_what_may_not_be_entered_hides_nothing_else(stranger: Path) -> None:
    write_version(stranger / "closed" / "1")
    write_version(stranger / "flowers" / "1")
    write_version(stranger / "flowers" / "2")
    (stranger / "closed").chmod(0)
    (stranger / "flowers" / "1").chmod(0)
    seen = CheckpointDirectory(stranger).scan()
    (stranger / "closed").chmod(0o700)
    (stranger / "flowers" / "1").chmod(0o700)
    why = "it can't be looked at: Permission denied"
    assert found(seen) == ([("flowers", 2)], [], {"1": why, "closed": why})
