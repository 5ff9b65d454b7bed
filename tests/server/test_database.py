"""A database that can't be written says why, and who watches it tells until it can be written again."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError

from backboned.registry.errors import ErrorKind
from backboned.server.database import hasty_transaction, meaning, open_database
from backboned.server.database_watch import DatabaseWatch
from backboned.server.troubles import Troubles


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a folder" / "state #1.sqlite"


@pytest.fixture
def database(file: Path) -> Iterator[Engine]:
    engine = open_database(file)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE numbers (number INTEGER PRIMARY KEY)")
    yield engine
    engine.dispose()


@pytest.fixture
def troubles() -> Troubles:
    return Troubles()


@pytest.fixture
def watch(database: Engine, file: Path, troubles: Troubles) -> DatabaseWatch:
    return DatabaseWatch(database, file, troubles)


@contextmanager
def lock_of(file: Path) -> Iterator[None]:
    """What another program that works on the file holds."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


def put(database: Engine, *several: int) -> None:
    with hasty_transaction(database, 0.01) as session:
        for number in several:
            session.connection().exec_driver_sql("INSERT INTO numbers VALUES (?)", (number,))


def numbers(database: Engine) -> list[int]:
    with database.connect() as connection:
        return [row[0] for row in connection.exec_driver_sql("SELECT number FROM numbers ORDER BY 1")]


def full(database: Engine) -> None:
    """Let it have not one page more, as on a disk that is full."""
    with database.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")


def test_a_transaction_is_made_wholly_or_not_at_all(database: Engine) -> None:
    put(database, 1)
    with pytest.raises(IntegrityError) as caught:
        put(database, 2, 1)
    assert meaning(caught.value) is None  # a defect of whoever asked
    put(database, 3)
    assert numbers(database) == [1, 3]


def test_a_lock_is_worth_another_try(database: Engine, file: Path) -> None:
    with lock_of(file), pytest.raises(DBAPIError) as caught:
        put(database, 1)
    error = meaning(caught.value)
    assert error is not None and error.kind is ErrorKind.UNAVAILABLE and error.retry_delay_seconds
    assert "locked by another process" in error.message
    put(database, 1)
    assert numbers(database) == [1]


def test_a_full_disk_is_no_defect_of_ours(database: Engine) -> None:
    full(database)
    with pytest.raises(DBAPIError) as caught, database.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE more (text TEXT)")
    error = meaning(caught.value)
    assert error is not None and error.kind is ErrorKind.RESOURCE_EXHAUSTED and "full" in error.message


def test_a_file_that_is_damaged_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DBAPIError) as caught:
        open_database(tmp_path / "bad.sqlite").connect()
    error = meaning(caught.value)
    assert error is not None and error.kind is ErrorKind.DATA_LOSS


def test_a_folder_that_is_gone_gets_no_new_empty_database(database: Engine, file: Path) -> None:
    database.dispose()
    file.parent.rename(file.parent.with_name("away"))
    file.parent.mkdir()
    with pytest.raises(DBAPIError) as caught:
        numbers(database)
    error = meaning(caught.value)
    assert error is not None and error.kind is ErrorKind.FAILED_PRECONDITION
    assert not file.exists()
    file.parent.rmdir()
    file.parent.with_name("away").rename(file.parent)
    assert numbers(database) == []


def test_other_errors_mean_nothing() -> None:
    assert meaning(ValueError("locked")) is None


def test_a_lock_is_told_while_it_is_held(
    watch: DatabaseWatch, file: Path, troubles: Troubles, caplog: pytest.LogCaptureFixture
) -> None:
    watch.look()
    assert not troubles.now()
    with lock_of(file):
        watch.look()
        watch.look()
        assert "locked by another process" in troubles.now()[0].text
    watch.look()
    assert not troubles.now() and len(caplog.messages) == 1


def test_a_failure_of_anyone_is_told_until_something_can_be_written(
    watch: DatabaseWatch, database: Engine, troubles: Troubles
) -> None:
    full(database)
    with pytest.raises(DBAPIError), database.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE more (text TEXT)")
    assert "the disk of the state folder is full" in troubles.now()[0].text
    watch.look()
    assert not troubles.now()


def test_a_file_that_is_gone_is_told_until_it_is_back(watch: DatabaseWatch, file: Path, troubles: Troubles) -> None:
    file.rename(file.with_name("away"))
    watch.look()
    assert "is gone" in troubles.now()[0].text
    file.with_name("away").rename(file)
    watch.look()
    assert not troubles.now()


def test_it_watches_by_itself_until_it_is_stopped(watch: DatabaseWatch, file: Path, troubles: Troubles) -> None:
    watch.start()
    watch.stop()
    with lock_of(file):
        assert not troubles.now()
