"""Events of jobs as they come: kept in the store, and told to whoever watches."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.database import meaning
from backboned.server.training.events import JobEventPayload, StateChanged
from backboned.server.training.jobs import JobEvent, JobStore
from backboned.server.training.settings import TrainingTelemetry

Result = TypeVar("Result")

_RETRY_SECONDS = 1.0


class JobJournal:
    """Publishes events and follows them. For the event loop's thread; the database is used in others."""

    def __init__(self, store: JobStore, telemetry: TrainingTelemetry) -> None:
        self._store = store
        self._telemetry = telemetry
        self._changed = asyncio.Condition()
        self._published = 0
        self._closed = False

    async def publish(self, job_id: str, payload: JobEventPayload) -> None:
        """Keep an event, then tell watchers. A state changes the job, unless it has ended."""
        await asyncio.to_thread(self._store.append, job_id, payload)
        await self._tell(payload)

    async def keep(self, job_id: str, payload: JobEventPayload) -> None:
        """Publish an event of a job that runs, as often as it takes: a locked database or a full disk fails no job."""
        await _patiently(self._store.append, job_id, payload)
        await self._tell(payload)

    async def so_far(self, job_id: str) -> list[JobEvent]:
        """All events of a job until now, as soon as they can be read."""
        events: list[JobEvent] = []
        while page := await _patiently(self._store.events, job_id, events[-1].sequence if events else 0):
            events += page
        return events

    async def count_states(self) -> None:
        """Tell telemetry how many jobs are in each state."""
        self._telemetry.training_jobs(await asyncio.to_thread(self._store.counts))

    async def watch(self, job_id: str, after_sequence: int = 0) -> AsyncIterator[JobEvent]:
        """A job's events in order, from after `after_sequence`, as they come, until the one with its final state.

        Raises `BackbonedError`: `NOT_FOUND`, or `UNAVAILABLE` when the journal is closed first.
        """
        while True:
            published = self._published
            job = await asyncio.to_thread(self._store.get, job_id)
            events = await asyncio.to_thread(self._store.events, job_id, after_sequence)
            for event in events:
                after_sequence = event.sequence
                yield event
                if isinstance(event.payload, StateChanged) and event.payload.state.final:
                    return
            if not events:
                if job.state.final:
                    return  # the watcher had the last event already
                await self._wait(published, after_sequence)

    async def close(self) -> None:
        """End all watching."""
        self._closed = True
        await self._notify()

    async def _wait(self, published: int, after_sequence: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._published != published)
        if self._closed and self._published == published:
            raise BackbonedError(
                ErrorKind.UNAVAILABLE, f"the daemon is stopping; watch again with after_sequence={after_sequence}"
            )

    async def _tell(self, payload: JobEventPayload) -> None:
        if isinstance(payload, StateChanged):
            with suppress(DBAPIError):  # what was published is: it must not seem as if it weren't
                await self.count_states()
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._published += not self._closed
            self._changed.notify_all()


async def _patiently(call: Callable[..., Result], *arguments: object) -> Result:
    """Call in a thread; again and again while the database's file or disk is what fails."""
    while True:
        try:
            return await asyncio.to_thread(call, *arguments)
        except DBAPIError as error:
            if meaning(error) is None:
                raise
        await asyncio.sleep(_RETRY_SECONDS)
