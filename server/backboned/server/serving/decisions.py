"""What was decided about models: policies, rejected versions, the division of traffic. Kept in the database."""

import hashlib
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

from sqlalchemy import BigInteger, Engine, Float, Integer, String, Text, delete, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from backboned.server.serving.history import Journal, note
from backboned.server.serving.policy import Policy, VersionPolicy


class _Base(DeclarativeBase):
    pass


class _Policy(_Base):
    __tablename__ = "policies"
    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    version: Mapped[int | None] = mapped_column(BigInteger)


class _Rejected(_Base):
    __tablename__ = "rejected_versions"
    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    reason: Mapped[str] = mapped_column(Text)
    time: Mapped[float] = mapped_column(Float)


class _Share(_Base):
    __tablename__ = "traffic"
    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    weight: Mapped[int] = mapped_column(Integer)


Split = Mapping[str, int]
"""Weights by alias, all above 0."""


class Decisions:
    """All that was decided. Thread-safe; readers get immutable mappings and never wait for the disk.

    Each change takes a `journal`, which is noted with it, or neither is.
    """

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._lock = threading.Lock()
        _Base.metadata.create_all(database)
        with Session(database) as session:
            self._policies, self._splits = _read(session)

    def policies(self) -> Mapping[str, Policy]:
        """Of the models that have one of their own, or a rejected version."""
        return self._policies

    def policy(self, model: str) -> Policy:
        """The policy of a model."""
        return self._policies.get(model, Policy())

    def split(self, model: str) -> Split:
        """How calls that name no version are divided; empty: they aren't."""
        return self._splits.get(model, {})

    def choose(self, model: str, kind: VersionPolicy, version: int | None = None, *, journal: Journal = ()) -> None:
        """Set a model's policy. A version that is named isn't rejected any more."""
        with self._lock, self._changing(journal) as session:
            session.merge(_Policy(model=model, kind=kind.value, version=version))
            if version is not None:
                session.execute(delete(_Rejected).where(_Rejected.model == model, _Rejected.version == version))

    def reject(self, model: str, version: int, reason: str, *, instead: int, journal: Journal = ()) -> None:
        """Never choose `version` again; where it is the one that the policy names, name another one `instead`."""
        policy = self.policy(model)
        with self._lock, self._changing(journal) as session:
            session.merge(_Rejected(model=model, version=version, reason=reason, time=time.time()))
            session.execute(delete(_Rejected).where(_Rejected.model == model, _Rejected.version == instead))
            if policy.kind in (VersionPolicy.PINNED, VersionPolicy.MANUAL):
                session.merge(_Policy(model=model, kind=policy.kind.value, version=instead))

    def divide(self, model: str, split: Split, *, journal: Journal = ()) -> None:
        """Divide the calls that name no version between aliases, by weight; by nothing: not any more."""
        with self._lock, self._changing(journal) as session:
            session.execute(delete(_Share).where(_Share.model == model))
            session.add_all(_Share(model=model, alias=alias, weight=weight) for alias, weight in split.items())

    @contextmanager
    def _changing(self, journal: Journal) -> Iterator[Session]:
        """A transaction; what it has changed is read anew, and counts once it is over."""
        with Session(self._database) as session, session.begin():
            yield session
            note(session, *journal)
            session.flush()
            changed = _read(session)
        self._policies, self._splits = changed


def _read(session: Session) -> tuple[Mapping[str, Policy], Mapping[str, Split]]:
    policies: dict[str, Policy] = {}
    rejected: dict[str, dict[int, str]] = {}
    splits: dict[str, dict[str, int]] = {}
    for row in session.scalars(select(_Policy)):
        policies[row.model] = Policy(VersionPolicy(row.kind), row.version)
    for refusal in session.scalars(select(_Rejected)):
        rejected.setdefault(refusal.model, {})[refusal.version] = refusal.reason
    for part in session.scalars(select(_Share)):
        splits.setdefault(part.model, {})[part.alias] = part.weight
    for model, reasons in rejected.items():
        policies[model] = replace(policies.get(model, Policy()), rejected=MappingProxyType(reasons))
    return MappingProxyType(policies), MappingProxyType({m: MappingProxyType(s) for m, s in splits.items()})


def share(split: Split, model: str, sticky_key: str) -> str:
    """The alias into whose share of traffic a call falls: for a key always the same, without one by chance."""
    place = random.random()
    if sticky_key:
        digest = hashlib.sha256(f"{model}\0{sticky_key}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
    place *= sum(split.values())
    *others, last = sorted(split)
    for alias in others:
        place -= split[alias]
        if place < 0:
            return alias
    return last
