"""The journal of models: what served when, and who changed what. Kept in the database."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from sqlalchemy import BigInteger, Engine, Float, Index, Integer, String, Text, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from backboned.server.database import hasty_transaction


class Change(Enum):
    """What was changed."""

    SERVING = "SERVING"
    POLICY = "POLICY"
    ALIAS = "ALIAS"
    TRAFFIC = "TRAFFIC"
    REJECTED = "REJECTED"
    DELETED = "DELETED"
    PROMOTED = "PROMOTED"


class _Base(DeclarativeBase):
    pass


class _Entry(_Base):
    __tablename__ = "history"
    __table_args__ = (Index("history_of_a_model", "model", "change", "id"),)
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    time: Mapped[float] = mapped_column(Float)
    model: Mapped[str] = mapped_column(String(63))
    change: Mapped[str] = mapped_column(String(16))
    version: Mapped[int] = mapped_column(BigInteger)
    previous_version: Mapped[int] = mapped_column(BigInteger)
    subject: Mapped[str] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)


@dataclass(frozen=True)
class Entry:
    """A change of a model, `number` 1, 2, 3, … over all models; `time` in Unix seconds.

    `version` is what it came to, and `previous_version` what it was before; 0 is none. `subject` names what else it is
    about, such as the alias. `actor` is who did it; the daemon itself, if empty.
    """

    model: str
    change: Change
    version: int = 0
    previous_version: int = 0
    subject: str = ""
    actor: str = ""
    reason: str = ""
    time: float = 0.0
    number: int = 0


Journal = Sequence[Entry]
"""What is noted with a change, in one transaction."""


class History:
    """All entries, in the order in which they were noted. Thread-safe."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._pending: list[Entry] = []
        _Base.metadata.create_all(database)

    def add(self, *entries: Entry) -> None:
        """Changes that were made just now: they are noted by the next `catch_up` that succeeds, with their time."""
        now = time.time()
        with self._lock:
            self._pending += [replace(entry, time=now) for entry in entries]

    def catch_up(self, wait_seconds: float) -> None:
        """Note what was added. Raises `SQLAlchemyError`, also if it would have to wait longer: then it stays to do."""
        with self._lock:
            pending = list(self._pending)
            if pending:
                with hasty_transaction(self._database, wait_seconds) as session:
                    note(session, *pending)
                self._pending.clear()

    def entries(self, model: str | None = None) -> list[Entry]:
        """Those of all models, or of one, newest first."""
        query = select(_Entry).order_by(_Entry.id.desc())
        with Session(self._database) as session:
            rows = session.scalars(query if model is None else query.where(_Entry.model == model))
            return [_entry(row) for row in rows]

    def served(self, model: str) -> Sequence[int]:
        """The versions that have served by default, newest first; one that came back is there again."""
        query = select(_Entry.version).where(_Entry.model == model, _Entry.change == Change.SERVING.value)
        with self._lock, Session(self._database) as session:
            noted = session.scalars(query.order_by(_Entry.id.desc())).all()
            pending = [e.version for e in self._pending if (e.model, e.change) == (model, Change.SERVING)]
        return [version for version in (*reversed(pending), *noted) if version]

    def serving(self) -> Mapping[str, int]:
        """For each model the version that it came to last; a daemon that is killed may not have noted the very last."""
        newest = select(func.max(_Entry.id)).where(_Entry.change == Change.SERVING.value).group_by(_Entry.model)
        with Session(self._database) as session:
            rows = session.scalars(select(_Entry).where(_Entry.id.in_(newest)))
            return {row.model: row.version for row in rows if row.version}


def note(session: Session, *entries: Entry) -> None:
    """Note changes in the transaction that makes them. Those without a time were made just now."""
    now = time.time()
    session.add_all(
        _Entry(
            time=e.time or now,
            model=e.model,
            change=e.change.value,
            version=e.version,
            previous_version=e.previous_version,
            subject=e.subject,
            actor=e.actor,
            reason=e.reason,
        )
        for e in entries
    )


def _entry(row: _Entry) -> Entry:
    return Entry(
        row.model,
        Change(row.change),
        row.version,
        row.previous_version,
        row.subject,
        row.actor,
        row.reason,
        row.time,
        row.id,
    )
