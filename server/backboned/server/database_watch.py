"""Finding out whether the database can be written: once a second, and whenever someone couldn't."""

import os
import threading
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import SQLAlchemyError

from backboned.server.database import hasty_transaction, meaning
from backboned.server.troubles import TroubleKind, Troubles

LEAST_FREE_BYTES = 1 << 20
_PAUSE_SECONDS = 1.0
_WAIT_SECONDS = 1.0


class DatabaseWatch:
    """Tells `troubles` of the database. A thread of its own, from `start` to `stop`.

    While all is well it only takes the write lock and gives it back. A failure that anyone met stands until
    something could be written, and the disk has room again.
    """

    def __init__(self, database: Engine, file: Path, troubles: Troubles) -> None:
        self._database = database
        self._file = file
        self._troubles = troubles
        self._failed = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="database", daemon=True)
        event.listen(database, "handle_error", self._note)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop it, and wait for it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def look(self) -> None:
        """Try, and tell what came of it."""
        if not self._file.exists():
            self._failed.set()
            self._troubles.tell(TroubleKind.DATABASE, f"{self._file} is gone: is its disk mounted?")
            return
        write = self._failed.is_set() or self._free_bytes() < LEAST_FREE_BYTES
        self._failed.clear()
        try:
            with hasty_transaction(self._database, _WAIT_SECONDS) as session:
                if write:
                    session.connection().exec_driver_sql("PRAGMA user_version = 1")  # one page, whatever is in it
        except SQLAlchemyError as error:
            self._tell(error)
            return
        full = self._troubles.has(TroubleKind.DATABASE) and self._free_bytes() < LEAST_FREE_BYTES
        if not full and not self._failed.is_set():
            self._troubles.tell(TroubleKind.DATABASE)

    def _run(self) -> None:
        while not self._stop.wait(_PAUSE_SECONDS):
            self.look()

    def _note(self, context: Any) -> None:
        """Someone met an error."""
        if context.sqlalchemy_exception is not None:
            self._tell(context.sqlalchemy_exception)

    def _tell(self, error: BaseException) -> None:
        known = meaning(error)
        if known is not None:
            self._failed.set()
            self._troubles.tell(TroubleKind.DATABASE, known.message)

    def _free_bytes(self) -> int:
        try:
            disk = os.statvfs(self._file.parent)
        except OSError:
            return 0
        return disk.f_bavail * disk.f_frsize
