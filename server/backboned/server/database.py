"""The daemon's database: one SQLite file in the state folder; and what it means when it can't be written."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from backboned.registry.errors import BackbonedError, ErrorKind

BUSY_TIMEOUT_MS = 5_000
"""How long who writes waits for another one."""

_PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_MS}")
_RETRY_SECONDS = 1.0

_MEANINGS = {
    sqlite3.SQLITE_BUSY: (ErrorKind.UNAVAILABLE, "is locked by another process; try again"),
    sqlite3.SQLITE_LOCKED: (ErrorKind.UNAVAILABLE, "is locked; try again"),
    sqlite3.SQLITE_FULL: (ErrorKind.RESOURCE_EXHAUSTED, "can't be written: the disk of the state folder is full"),
    sqlite3.SQLITE_READONLY: (ErrorKind.FAILED_PRECONDITION, "may only be read, or has been moved: mend its folder"),
    sqlite3.SQLITE_PERM: (
        ErrorKind.FAILED_PRECONDITION,
        "may not be written: mend the rights of the state folder",
    ),
    sqlite3.SQLITE_CANTOPEN: (ErrorKind.FAILED_PRECONDITION, "can't be opened: the state folder is gone, or not ours"),
    sqlite3.SQLITE_IOERR: (ErrorKind.UNAVAILABLE, "can't be read or written: the disk of the state folder fails"),
    sqlite3.SQLITE_CORRUPT: (ErrorKind.DATA_LOSS, "is damaged: stop the daemon, and bring back a copy"),
    sqlite3.SQLITE_NOTADB: (ErrorKind.DATA_LOSS, "is no database any more: stop the daemon, and bring back a copy"),
}


def open_database(path: Path) -> Engine:
    """An engine on the SQLite file at `path`, which is made if it isn't there. For use from several threads.

    In WAL mode: readers don't wait for a writer, and what was committed survives the end of the process. A file that
    vanishes later isn't made anew, empty. The caller disposes of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    uri = f"{path.absolute().as_uri()}?mode=rw"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, check_same_thread=False)

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)

    @event.listens_for(engine, "connect")
    def _set_pragmas(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for pragma in _PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


@contextmanager
def hasty_transaction(database: Engine, wait_seconds: float) -> Iterator[Session]:
    """A transaction that is given up if another writer keeps it waiting for longer than that.

    Raises `DBAPIError`, also at its end; then nothing has been changed.
    """
    with database.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA busy_timeout={round(1000 * wait_seconds)}")
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            with Session(connection) as session:
                yield session
                session.flush()
            connection.commit()
        finally:
            connection.rollback()
            connection.exec_driver_sql(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")


def meaning(error: BaseException) -> BackbonedError | None:
    """What an error of the database's file or disk means to a caller; None for any other error: a defect of ours."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    code = getattr(cause, "sqlite_errorcode", None)
    if code is None or code & 0xFF not in _MEANINGS:
        return None
    kind, what = _MEANINGS[code & 0xFF]
    delay = _RETRY_SECONDS if kind is ErrorKind.UNAVAILABLE else None
    return BackbonedError(kind, f"the database {what} ({cause})", retry_delay_seconds=delay)
