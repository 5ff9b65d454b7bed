"""What was answered, kept until the truth is known: hours later, and after a restart.

In a database of its own, so that the daemon's stays small. Outcomes are counted in the same transaction in which an
answer is marked as known: a daemon that is killed counts none twice, and forgets at most the last second's answers.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Boolean,
    Engine,
    Float,
    Integer,
    LargeBinary,
    String,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from backboned.server.database import open_database
from backboned.server.serving.comparison import Score, Sums, Tally
from backboned.server.troubles import TroubleKind, Troubles

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.5
_MOST_WAITING = 10_000
_ROW_BYTES = 150
_IDS_AT_ONCE = 500


Scores = tuple[Score, Score | None]
"""Of the version that answered and of its shadow."""


class _Base(DeclarativeBase):
    pass


class _Answer(_Base):
    __tablename__ = "answers"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    time: Mapped[float] = mapped_column(Float)
    model: Mapped[str] = mapped_column(String(63))
    version: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    logits: Mapped[bytes] = mapped_column(LargeBinary)
    shadow_version: Mapped[int] = mapped_column(BigInteger)
    shadow_digest: Mapped[str] = mapped_column(String(64))
    shadow_logits: Mapped[bytes] = mapped_column(LargeBinary)
    known: Mapped[bool] = mapped_column(Boolean)


class _Tally(_Base):
    __tablename__ = "tallies"
    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    shadow_version: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    shadow_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    count: Mapped[int] = mapped_column(Integer, default=0)
    losses: Mapped[float] = mapped_column(Float, default=0.0)
    squares: Mapped[float] = mapped_column(Float, default=0.0)
    right: Mapped[int] = mapped_column(Integer, default=0)
    shadow_count: Mapped[int] = mapped_column(Integer, default=0)
    shadow_losses: Mapped[float] = mapped_column(Float, default=0.0)
    shadow_squares: Mapped[float] = mapped_column(Float, default=0.0)
    shadow_right: Mapped[int] = mapped_column(Integer, default=0)
    gains: Mapped[float] = mapped_column(Float, default=0.0)
    gain_squares: Mapped[float] = mapped_column(Float, default=0.0)
    answers: Mapped[int] = mapped_column(Integer, default=0)
    agreements: Mapped[int] = mapped_column(Integer, default=0)


@dataclass(frozen=True)
class Remembered:
    """An answer to one image: its calibrated logits as little-endian float16 bytes, and those of the shadow, if any.

    `known` answers have been scored already; `scores` are those of one whose truth came with its image. `agrees` tells
    whether both said the same.
    """

    id: str
    pair: "Pair"
    logits: bytes
    shadow_logits: bytes = b""
    known: bool = False
    agrees: bool = False
    scores: Scores | None = None


@dataclass(frozen=True, order=True)
class Pair:
    """A model, the version that serves it, and the one that is its shadow; 0: none.

    The digests of their checkpoints tell them from others that have had, or will have, the same numbers.
    """

    model: str
    version: int
    digest: str = ""
    shadow_version: int = 0
    shadow_digest: str = ""

    @property
    def alone(self) -> "Pair":
        """The same without the shadow."""
        return Pair(self.model, self.version, self.digest)


class Memory:
    """The newest answers that take `limit_bytes`, and the tally of each pair of versions. Thread-safe.

    `remember` never waits: a thread writes, twice a second. What can't be written now waits, as far as there is room in
    memory, and `troubles` are told.
    """

    def __init__(self, database: Engine, limit_bytes: int, troubles: Troubles) -> None:
        """A limit of 0 keeps no answers: then only what comes with its truth is counted."""
        _Base.metadata.create_all(database)
        self._database = database
        self._limit_bytes = limit_bytes
        self._waiting: list[Remembered] = []
        self._tallies = self._read_tallies()
        self._bytes = self._measure()
        self._lock = threading.Lock()  # of the list
        self._writing = threading.Lock()
        self._troubles = troubles
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    @classmethod
    def open(cls, file: Path, limit_bytes: int, troubles: Troubles) -> "Memory":
        """That in a database file. One that is damaged is put aside: answers are worth no daemon that doesn't start."""
        try:
            return cls(open_database(file), limit_bytes, troubles)
        except DatabaseError as error:
            if isinstance(error, OperationalError):  # locked, or the disk is full: then it isn't damaged
                raise
            aside = file.with_suffix(".damaged")
            log.error("%s can't be read (%s): it is %s now, and outcomes begin anew", file, error.orig, aside.name)
            for suffix in ("-wal", "-shm"):
                file.with_name(file.name + suffix).unlink(missing_ok=True)
            file.replace(aside)
            return cls(open_database(file), limit_bytes, troubles)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, and close the database."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._try_to_flush()
        self._database.dispose()

    def remember(self, answers: Sequence[Remembered]) -> None:
        """Keep answers. Where writing doesn't keep up, the newest are forgotten."""
        with self._lock:
            if len(self._waiting) < _MOST_WAITING:
                self._waiting += answers

    def tallies(self) -> Mapping[Pair, Tally]:
        """All pairs that have answered."""
        return self._tallies

    def find(self, ids: Sequence[str]) -> dict[str, Remembered]:
        """Those that are remembered, by id. Raises `SQLAlchemyError`."""
        self._flush()
        found = {}
        with Session(self._database) as session:
            for part in _parts(ids):
                for row in session.scalars(select(_Answer).where(_Answer.id.in_(part))):
                    found[row.id.hex()] = Remembered(
                        row.id.hex(), _pair(row), row.logits, row.shadow_logits, known=row.known
                    )
        return found

    def count(self, outcomes: Sequence[tuple[Remembered, Scores]]) -> None:
        """Mark answers as known, and count their scores: both or neither. Raises `SQLAlchemyError`."""
        with self._writing:
            changed: dict[Pair, Tally] = {}
            for answer, scores in outcomes:
                _count(self._tallies, changed, answer.pair, scores)
            with Session(self._database) as session, session.begin():
                for part in _parts([answer.id for answer, _ in outcomes]):
                    session.execute(update(_Answer).where(_Answer.id.in_(part)).values(known=True))
                _write_tallies(session, changed)
            self._tallies = {**self._tallies, **changed}

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            self._try_to_flush()

    def _try_to_flush(self) -> None:
        try:
            self._flush()
        except SQLAlchemyError as error:
            why = getattr(error, "orig", None) or error
            self._troubles.tell(TroubleKind.ANSWERS, f"answers can't be remembered: {why}")
        else:
            self._troubles.tell(TroubleKind.ANSWERS)

    def _flush(self) -> None:
        with self._writing:
            with self._lock:
                answers, self._waiting = self._waiting, []
            if not answers:
                return
            try:
                self._write(answers)
            except OperationalError:  # a lock, or a full disk, which may be over soon
                with self._lock:
                    self._waiting = (answers + self._waiting)[:_MOST_WAITING]
                raise

    def _write(self, answers: Sequence[Remembered]) -> None:
        now = time.time()
        with Session(self._database) as session, session.begin():
            if self._limit_bytes:
                session.execute(insert(_Answer), [_row(answer, now) for answer in answers])
            changed = _with_answers(self._tallies, answers)
            _write_tallies(session, changed)
            size = self._bytes + (sum(map(_size, answers)) if self._limit_bytes else 0)
            if size > self._limit_bytes:
                size = self._drop_oldest(session, size)
        self._bytes = size
        self._tallies = {**self._tallies, **changed}

    def _drop_oldest(self, session: Session, size: int) -> int:
        """Delete the oldest answers until a tenth of the room is free."""
        least, most = session.execute(select(func.min(_Answer.number), func.max(_Answer.number))).one()
        share = 1 - 0.9 * self._limit_bytes / size
        session.execute(delete(_Answer).where(_Answer.number <= least + int(share * (most - least))))
        return self._measure(session)

    def _measure(self, session: Session | None = None) -> int:
        """The bytes that the answers take."""
        query = select(
            func.count() * _ROW_BYTES
            + func.coalesce(func.sum(func.length(_Answer.logits) + func.length(_Answer.shadow_logits)), 0)
        ).select_from(_Answer)
        if session is not None:
            return int(session.execute(query).scalar_one())
        with Session(self._database) as own:
            return int(own.execute(query).scalar_one())

    def _read_tallies(self) -> Mapping[Pair, Tally]:
        with Session(self._database) as session:
            return {_pair(row): _tally(row) for row in session.scalars(select(_Tally))}


def _row(answer: Remembered, now: float) -> dict[str, object]:
    return {
        "id": bytes.fromhex(answer.id),
        "time": now,
        **vars(answer.pair),
        "logits": answer.logits,
        "shadow_logits": answer.shadow_logits,
        "known": answer.known or answer.scores is not None,
    }


def _size(answer: Remembered) -> int:
    return _ROW_BYTES + len(answer.logits) + len(answer.shadow_logits)


def _with_answers(tallies: Mapping[Pair, Tally], answers: Iterable[Remembered]) -> dict[Pair, Tally]:
    """The tallies of those pairs that these are of, with them."""
    changed: dict[Pair, Tally] = {}
    for answer in answers:
        if answer.pair.shadow_version:
            tally = changed.get(answer.pair) or tallies.get(answer.pair) or Tally()
            changed[answer.pair] = replace(
                tally, answers=tally.answers + 1, agreements=tally.agreements + int(answer.agrees)
            )
        if answer.scores is not None:
            _count(tallies, changed, answer.pair, answer.scores)
    return changed


def _count(tallies: Mapping[Pair, Tally], changed: dict[Pair, Tally], pair: Pair, scores: Scores) -> None:
    """One outcome more. Where there is no score of the shadow, it counts for the version that answered alone."""
    pair = pair if scores[1] is not None else pair.alone
    tally = changed.get(pair) or tallies.get(pair) or Tally()
    changed[pair] = tally.plus(*scores)


def _pair(row: _Answer | _Tally) -> Pair:
    return Pair(row.model, row.version, row.digest, row.shadow_version, row.shadow_digest)


def _tally(row: _Tally) -> Tally:
    return Tally(
        Sums(row.count, row.losses, row.squares, row.right),
        Sums(row.shadow_count, row.shadow_losses, row.shadow_squares, row.shadow_right),
        row.gains,
        row.gain_squares,
        row.answers,
        row.agreements,
    )


def _write_tallies(session: Session, tallies: Mapping[Pair, Tally]) -> None:
    for pair, tally in tallies.items():
        session.merge(
            _Tally(
                **vars(pair),
                count=tally.serving.count,
                losses=tally.serving.losses,
                squares=tally.serving.squares,
                right=tally.serving.right,
                shadow_count=tally.shadow.count,
                shadow_losses=tally.shadow.losses,
                shadow_squares=tally.shadow.squares,
                shadow_right=tally.shadow.right,
                gains=tally.gains,
                gain_squares=tally.gain_squares,
                answers=tally.answers,
                agreements=tally.agreements,
            )
        )


def _parts(ids: Sequence[str]) -> Iterator[list[bytes]]:
    whole = [bytes.fromhex(each) for each in ids]
    for begin in range(0, len(whole), _IDS_AT_ONCE):
        yield whole[begin : begin + _IDS_AT_ONCE]
