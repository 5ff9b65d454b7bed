"""Deleting versions so that a kill at any moment leaves either all of a version or nothing, and the journal right.

    intend (database) → bury (directory) → journal (database) → clear the files → done (database)

What was intended is known after a start: what is buried is then finished, and what isn't is forgotten, since nobody was
told that it was done.
"""

import threading
from dataclasses import dataclass

from sqlalchemy import BigInteger, Boolean, Engine, String, Text, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from backboned.registry.directory import CheckpointDirectory
from backboned.server.serving.history import Change, Entry, note
from backboned.server.troubles import TroubleKind, Troubles


class _Base(DeclarativeBase):
    pass


class _Deletion(_Base):
    __tablename__ = "deletions"
    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    actor: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    noted: Mapped[bool] = mapped_column(Boolean, default=False)


@dataclass(frozen=True)
class _Unfinished:
    model: str
    version: int
    noted: bool


class Deletions:
    """Deletes, and finishes what couldn't be. Thread-safe; one at a time."""

    def __init__(self, database: Engine, directory: CheckpointDirectory, troubles: Troubles) -> None:
        self._database = database
        self._directory = directory
        self._troubles = troubles
        self._lock = threading.Lock()
        _Base.metadata.create_all(database)

    def delete(self, model: str, version: int, *, actor: str = "", reason: str = "") -> None:
        """Delete a version. Raises `OSError` or `SQLAlchemyError`; then it is there as it was.

        Once it is gone nothing is raised: files or an entry in the journal that have to wait are seen to by `finish`.
        """
        with self._lock:
            with Session(self._database) as session, session.begin():
                session.merge(_Deletion(model=model, version=version, actor=actor, reason=reason, noted=False))
            try:
                self._directory.bury(model, version)
            except OSError:
                if self._directory.holds(model, version):
                    self._forget(model, version)
                    raise
            self._finish()

    def finish(self) -> bool:
        """Finish what was begun and couldn't be finished; tells whether nothing is left to do, and troubles if not."""
        with self._lock:
            return self._finish()

    def _finish(self) -> bool:
        try:
            left = [trouble for each in self._unfinished() if (trouble := self._finish_one(each))]
        except SQLAlchemyError:  # whoever watches the database tells of it
            return False
        self._troubles.tell(TroubleKind.DELETION, *left)
        return not left

    def _finish_one(self, each: _Unfinished) -> str:
        """What keeps it from being finished; empty if it is."""
        key = (each.model, each.version)
        try:
            if not each.noted and self._directory.holds(*key):
                self._forget(*key)  # it was never begun
                return ""
            if not each.noted:
                self._note(*key)
            self._directory.clear(*key)
        except OSError as error:
            return f"files of {each.model} version {each.version}, which is deleted, are left: {error}"
        self._forget(*key)
        return ""

    def _unfinished(self) -> list[_Unfinished]:
        with Session(self._database) as session:
            return [_Unfinished(row.model, row.version, row.noted) for row in session.scalars(select(_Deletion))]

    def _note(self, model: str, version: int) -> None:
        with Session(self._database) as session, session.begin():
            row = session.get_one(_Deletion, (model, version))
            row.noted = True
            note(session, Entry(model, Change.DELETED, 0, version, actor=row.actor, reason=row.reason))

    def _forget(self, model: str, version: int) -> None:
        with Session(self._database) as session, session.begin():
            session.delete(session.get_one(_Deletion, (model, version)))
