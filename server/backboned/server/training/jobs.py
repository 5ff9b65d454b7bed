"""Jobs and their events, in the daemon's database."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, Engine, ForeignKey, Text, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.training.events import JobEventPayload, JobState, StateChanged, from_json, to_json
from backboned.server.training.options import TrainingOptions


@dataclass(frozen=True)
class JobRequest:
    """What was asked for, as it was asked: `dataset` not resolved, `options` not filled in, `request_id` or empty."""

    model: str
    backbone: str
    dataset: str
    options: TrainingOptions
    request_id: str = ""


@dataclass(frozen=True)
class Job:
    """A job. `folder` is the dataset's real path, or its URI.

    Times are in seconds since 1970, None for what hasn't happened.
    """

    id: str
    request: JobRequest
    folder: str
    version: int
    state: JobState
    error: str
    create_time: float
    start_time: float | None
    end_time: float | None

    @property
    def model(self) -> str:
        """The model that it trains."""
        return self.request.model


@dataclass(frozen=True)
class JobEvent:
    """Something that happened in a job; `sequence` counts from 1, `time` is in seconds since 1970."""

    job_id: str
    sequence: int
    time: float
    payload: JobEventPayload


class _Base(DeclarativeBase):
    pass


class _JobRow(_Base):
    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    request_id: Mapped[str | None] = mapped_column(unique=True)
    model: Mapped[str] = mapped_column(index=True)
    backbone: Mapped[str]
    dataset: Mapped[str]
    options: Mapped[dict[str, Any]] = mapped_column(JSON)
    folder: Mapped[str]
    version: Mapped[int]
    state: Mapped[str] = mapped_column(index=True)
    error: Mapped[str] = mapped_column(Text, default="")
    create_time: Mapped[float]
    start_time: Mapped[float | None]
    end_time: Mapped[float | None]


class _EventRow(_Base):
    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float]
    payload: Mapped[str] = mapped_column(Text)


class JobStore:
    """Jobs and events. Every change is committed before the call returns. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writing = threading.Lock()
        _Base.metadata.create_all(engine)

    def add(self, job_id: str, request: JobRequest, folder: str, version: int) -> Job:
        """A new queued job, with its first event. Raises `ALREADY_EXISTS` if its `request_id` is taken."""
        row = _JobRow(
            id=job_id,
            request_id=request.request_id or None,
            model=request.model,
            backbone=request.backbone,
            dataset=request.dataset,
            options=request.options.to_dict(),
            folder=folder,
            version=version,
            state=JobState.QUEUED.value,
            create_time=time.time(),
        )
        try:
            with self._writing, Session(self._engine) as session, session.begin():
                session.add(row)
                session.flush()
                self._append(session, job_id, StateChanged(JobState.QUEUED))
                return _job(row)
        except IntegrityError as error:
            raise _taken(request.request_id) from error

    def repeated(self, request: JobRequest) -> Job | None:
        """The job that the same request started before. Raises `ALREADY_EXISTS` if it was another one's."""
        if not request.request_id:
            return None
        with Session(self._engine) as session:
            row = session.scalar(select(_JobRow).where(_JobRow.request_id == request.request_id))
            if row is None:
                return None
            if _job(row).request != request:
                raise _taken(request.request_id)
            return _job(row)

    def get(self, job_id: str) -> Job:
        """A job. Raises `BackbonedError` `NOT_FOUND`."""
        with Session(self._engine) as session:
            return _job(_row(session, job_id))

    def jobs(self, *, model: str | None = None, states: Sequence[JobState] = ()) -> list[Job]:
        """Jobs, newest first: all, or those of a model, or those in some states."""
        query = select(_JobRow).order_by(_JobRow.number.desc())
        if model is not None:
            query = query.where(_JobRow.model == model)
        if states:
            query = query.where(_JobRow.state.in_([s.value for s in states]))
        with Session(self._engine) as session:
            return [_job(row) for row in session.scalars(query)]

    def last_version(self, model: str) -> int:
        """The highest version that a job of the model was to write; 0 if there was none."""
        with Session(self._engine) as session:
            return session.scalar(select(func.max(_JobRow.version)).where(_JobRow.model == model)) or 0

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        with Session(self._engine) as session:
            found = session.execute(select(_JobRow.state, func.count()).group_by(_JobRow.state)).all()
            return dict.fromkeys(JobState, 0) | {JobState(row[0]): row[1] for row in found}

    def append(self, job_id: str, payload: JobEventPayload) -> None:
        """Add an event; a new state changes the job too, unless it has ended."""
        with self._writing, Session(self._engine) as session, session.begin():
            if isinstance(payload, StateChanged):
                row = _row(session, job_id)
                if JobState(row.state).final:
                    return
                row.state, row.error = payload.state.value, payload.error
                if payload.state is JobState.RUNNING and row.start_time is None:
                    row.start_time = time.time()
                if payload.state.final:
                    row.end_time = time.time()
            self._append(session, job_id, payload)

    def events(self, job_id: str, after_sequence: int = 0, limit: int = 1000) -> list[JobEvent]:
        """Events of a job in order, at most `limit`. Raises `BackbonedError` `NOT_FOUND` for an unknown job."""
        query = select(_EventRow).where(_EventRow.job_id == job_id, _EventRow.sequence > after_sequence)
        with Session(self._engine) as session:
            _row(session, job_id)
            rows = session.scalars(query.order_by(_EventRow.sequence).limit(limit))
            return [JobEvent(r.job_id, r.sequence, r.time, from_json(r.payload)) for r in rows]

    def _append(self, session: Session, job_id: str, payload: JobEventPayload) -> None:
        last = session.scalar(select(func.max(_EventRow.sequence)).where(_EventRow.job_id == job_id))
        session.add(_EventRow(job_id=job_id, sequence=(last or 0) + 1, time=time.time(), payload=to_json(payload)))


def _row(session: Session, job_id: str) -> _JobRow:
    row = session.scalar(select(_JobRow).where(_JobRow.id == job_id))
    if row is None:
        raise BackbonedError(
            ErrorKind.NOT_FOUND, f"unknown job {job_id[:80]!r}; list the jobs to find it", field="job_id"
        )
    return row


def _job(row: _JobRow) -> Job:
    options = TrainingOptions.from_dict(row.options)
    return Job(
        id=row.id,
        request=JobRequest(row.model, row.backbone, row.dataset, options, row.request_id or ""),
        folder=row.folder,
        version=row.version,
        state=JobState(row.state),
        error=row.error,
        create_time=row.create_time,
        start_time=row.start_time,
        end_time=row.end_time,
    )


def _taken(request_id: str) -> BackbonedError:
    return BackbonedError(
        ErrorKind.ALREADY_EXISTS,
        f"request_id {request_id!r} was used before, for another request; give each request one of its own",
        field="request_id",
    )
