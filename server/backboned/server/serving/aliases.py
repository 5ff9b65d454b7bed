"""Aliases of versions: kept in the database, read from memory."""

import threading
from collections.abc import Mapping
from types import MappingProxyType

from sqlalchemy import BigInteger, Engine, String, delete, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found
from backboned.registry.manifest import check_name
from backboned.server.serving.history import Journal, note

LATEST = "latest"
"""Always the newest version that is complete; can't be set."""


class _Base(DeclarativeBase):
    pass


class _Alias(_Base):
    __tablename__ = "aliases"
    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)


class Aliases:
    """The aliases of all models. Thread-safe; readers get an immutable mapping and never wait for the disk."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._lock = threading.Lock()
        _Base.metadata.create_all(database)
        with Session(database) as session:
            self._all: Mapping[str, Mapping[str, int]] = _read(session)

    def all(self) -> Mapping[str, Mapping[str, int]]:
        """Versions by alias, by model."""
        return self._all

    def of(self, model: str) -> Mapping[str, int]:
        """Versions by alias."""
        return self._all.get(model, {})

    def set(self, model: str, alias: str, version: int, expected: int | None = None, *, journal: Journal = ()) -> None:
        """Point an alias to a version; `expected` is where it must point now (0: nowhere, None: anywhere).

        The `journal` is noted with it, or neither is. Raises `BackbonedError`: `INVALID_ARGUMENT` for a bad name,
        `ABORTED` if it points elsewhere.
        """
        check_name(alias, "alias", "alias")
        if alias == LATEST or alias.isdigit():
            raise invalid(f"alias {alias!r} can't be set: it {_reserved(alias)}", field="alias")
        with self._lock:
            self._expect(model, alias, expected)
            with Session(self._database) as session, session.begin():
                session.merge(_Alias(model=model, alias=alias, version=version))
                note(session, *journal)
                changed = _read(session)
            self._all = changed

    def delete(self, model: str, alias: str, expected: int | None = None, *, journal: Journal = ()) -> None:
        """Remove an alias. Raises `BackbonedError`: `NOT_FOUND`, or `ABORTED` if it doesn't point to `expected`."""
        with self._lock:
            if alias not in self.of(model):
                raise not_found(f"alias of {model}", alias, self.of(model), field="alias")
            self._expect(model, alias, expected)
            with Session(self._database) as session, session.begin():
                session.execute(delete(_Alias).where(_Alias.model == model, _Alias.alias == alias))
                note(session, *journal)
                changed = _read(session)
            self._all = changed

    def _expect(self, model: str, alias: str, expected: int | None) -> None:
        current = self.of(model).get(alias, 0)
        if expected is not None and current != expected:
            where = f"version {current}" if current else "no version"
            raise BackbonedError(
                ErrorKind.ABORTED,
                f"alias {alias!r} of {model} points to {where}, not to {expected}: read it again and retry",
                field="expected_version",
            )


def _read(session: Session) -> Mapping[str, Mapping[str, int]]:
    session.flush()
    aliases: dict[str, dict[str, int]] = {}
    for row in session.scalars(select(_Alias)):
        aliases.setdefault(row.model, {})[row.alias] = row.version
    return MappingProxyType({m: MappingProxyType(a) for m, a in aliases.items()})


def _reserved(alias: str) -> str:
    return "always means the newest complete version" if alias == LATEST else "looks like a version"
