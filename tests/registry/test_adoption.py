"""What a killed daemon left half adopted is removed, and what another one is at is left alone."""

from pathlib import Path

import pytest

from backboned.registry.adoption import MARKER_NAME, remove_abandoned
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.lock import locked
from backboned.registry.look import Drop, Seen, Signature, look_alike


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    for version in (1, 2, 3):
        (tmp_path / "flowers" / str(version)).mkdir(parents=True)
        (tmp_path / "flowers" / str(version) / "epoch-0001.pt").write_bytes(b"weights")
    return CheckpointDirectory(tmp_path)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_half_versions_and_copies_of_killed_daemons_are_removed(directory: CheckpointDirectory) -> None:
    flowers = directory.root / "flowers"
    for version in (1, 2):
        (flowers / str(version) / MARKER_NAME).touch()
    (flowers / "2" / "manifest.json").write_text("{}")  # killed after it was whole
    for name in (".writing-mine", ".writing-theirs", ".hidden"):
        (flowers / name).write_bytes(b"weights")
    with locked(flowers / ".writing-theirs"):
        remove_abandoned(directory)
    kept = {".writing-theirs", ".hidden", "2", "2/epoch-0001.pt", "2/manifest.json", "3", "3/epoch-0001.pt"}
    assert names(flowers) == kept  # 3 is a trainer's


def test_a_version_that_another_daemon_is_adopting_is_left_alone(directory: CheckpointDirectory) -> None:
    with locked(directory.root / "flowers" / "1" / MARKER_NAME):
        remove_abandoned(directory)
        assert (directory.root / "flowers" / "1" / "epoch-0001.pt").exists()
    remove_abandoned(directory)
    assert not (directory.root / "flowers" / "1").exists()
    remove_abandoned(CheckpointDirectory(directory.root / "nowhere"))


def test_keys_that_differ_in_times_of_change_alone_look_alike() -> None:
    def key(size: int, mtime: int, ctime: int) -> str:
        signature = Signature(size, mtime, 1, ctime)
        return Drop("flowers", Path("a.pt"), signature, (None, signature)).key

    assert key(1, 2, 3) != key(1, 2, 4) and look_alike(key(1, 2, 3), key(1, 2, 4))
    assert not look_alike(key(1, 2, 3), key(1, 3, 3)) and not look_alike(key(1, 2, 3), key(2, 2, 3))
    assert not look_alike("7@1 -", "7@1")


def test_only_a_look_that_finds_nothing_at_all_has_found_nothing() -> None:
    assert Seen().nothing
    assert not Seen(unreadable={"flowers": "permission denied"}).nothing
    assert not Seen(deleted={("flowers", 1)}).nothing
