"""Whenever a daemon is killed while it deletes, all of the version is there, or nothing, and the journal is right."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import Manifest
from backboned.server.serving.deletions import Deletions
from backboned.server.serving.history import Change, History
from backboned.server.troubles import Troubles


class Killed(BaseException):
    """Ends what is going on at once, as SIGKILL does; nobody catches it."""


@pytest.fixture
def directory(tmp_path: Path, make_manifest: Callable[..., Manifest]) -> CheckpointDirectory:
    found = CheckpointDirectory(tmp_path / "checkpoints")
    for version in (1, 2):
        folder = found.version("flowers", version)
        folder.mkdir(parents=True)
        (folder / "epoch-0001.pt").write_bytes(b"weights")
        make_manifest(version=version).write(folder)
    return found


@pytest.fixture
def troubles() -> Troubles:
    return Troubles()


@pytest.fixture
def start(database: Engine, directory: CheckpointDirectory, troubles: Troubles) -> Callable[[], Deletions]:
    """What a daemon has after a start."""
    History(database)
    return lambda: Deletions(database, directory, troubles)


def told(database: Engine) -> list[tuple[Change, int, str, str]]:
    return [(e.change, e.previous_version, e.actor, e.reason) for e in History(database).entries("flowers")]


ONCE = [(Change.DELETED, 2, "ann", "old")]


def delete(deletions: Deletions) -> None:
    deletions.delete("flowers", 2, actor="ann", reason="old")


def test_a_version_that_is_deleted_leaves_a_tombstone_and_one_entry(
    start: Callable[[], Deletions], directory: CheckpointDirectory, database: Engine
) -> None:
    delete(start())
    assert directory.scan().deleted == {("flowers", 2)}
    assert [f.name for f in directory.version("flowers", 2).iterdir()] == ["deleted.json"]
    assert start().finish() and told(database) == ONCE


@pytest.mark.parametrize("place", ["bury", "clear", "after bury"])
def test_a_kill_at_any_moment_is_made_good_at_the_next_start(
    start: Callable[[], Deletions],
    directory: CheckpointDirectory,
    database: Engine,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    bury = CheckpointDirectory.bury

    def killed(self: CheckpointDirectory, model: str, version: int) -> None:
        if place == "after bury":
            bury(self, model, version)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointDirectory, place.removeprefix("after "), killed)
        with pytest.raises(Killed):
            delete(start())
    assert start().finish()
    if place == "bury":  # nothing had happened: nothing has
        assert directory.holds("flowers", 2) and not told(database)
        assert directory.version("flowers", 2).joinpath("epoch-0001.pt").exists()
    else:
        assert [f.name for f in directory.version("flowers", 2).iterdir()] == ["deleted.json"]
        assert told(database) == ONCE
    assert start().finish() and len(told(database)) == (place != "bury")


def test_files_that_cannot_be_removed_are_told_and_tried_again(
    start: Callable[[], Deletions],
    directory: CheckpointDirectory,
    database: Engine,
    troubles: Troubles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clear(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    deletions = start()
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointDirectory, "clear", clear)
        delete(deletions)  # it is gone all the same
        assert not deletions.finish()
    assert "flowers version 2, which is deleted, are left" in troubles.now()[0].text
    assert directory.scan().deleted == {("flowers", 2)} and told(database) == ONCE
    assert deletions.finish() and not troubles.now()
    assert [f.name for f in directory.version("flowers", 2).iterdir()] == ["deleted.json"]


def test_what_cannot_be_buried_is_there_as_it_was(
    start: Callable[[], Deletions], directory: CheckpointDirectory, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bury(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(CheckpointDirectory, "bury", bury)
    with pytest.raises(OSError, match="Read-only"):
        delete(start())
    assert directory.holds("flowers", 2) and start().finish() and not told(database)


def test_a_journal_that_cannot_be_written_gets_its_entry_later(
    start: Callable[[], Deletions], directory: CheckpointDirectory, database: Engine
) -> None:
    deletions = start()
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE history RENAME TO elsewhere")
    delete(deletions)
    assert not directory.holds("flowers", 2) and not deletions.finish()
    with database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO history")
    assert deletions.finish() and told(database) == ONCE


def test_a_database_that_cannot_be_written_keeps_the_version(
    start: Callable[[], Deletions], directory: CheckpointDirectory, database: Engine
) -> None:
    deletions = start()
    with database.begin() as connection:
        connection.exec_driver_sql("DROP TABLE deletions")
    with pytest.raises(OperationalError):
        delete(deletions)
    assert directory.holds("flowers", 2)


def test_a_directory_that_is_gone_says_nothing_about_what_was_deleted(
    start: Callable[[], Deletions], directory: CheckpointDirectory, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointDirectory, "bury", killed)
        with pytest.raises(Killed):
            delete(start())
    directory.root.rename(directory.root.with_name("away"))
    directory.root.mkdir()  # what an unmounted disk leaves behind
    assert not start().finish() and not told(database)
    directory.root.rmdir()
    directory.root.with_name("away").rename(directory.root)
    assert start().finish() and not told(database) and directory.holds("flowers", 2)
