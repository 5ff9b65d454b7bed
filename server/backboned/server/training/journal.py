"""Events of jobs as they come: kept in the store, and told to whoever watches."""

import asyncio
from collections.abc import AsyncIterator

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.training.events import JobEventPayload, StateChanged
from backboned.server.training.jobs import JobEvent, JobStore
from backboned.server.training.settings import TrainingTelemetry


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
        if isinstance(payload, StateChanged):
            await self.count_states()
        await self._notify()

    async def so_far(self, job_id: str) -> list[JobEvent]:
        """All events of a job until now."""
        events: list[JobEvent] = []
        while page := await asyncio.to_thread(self._store.events, job_id, events[-1].sequence if events else 0):
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

    async def _notify(self) -> None:
        async with self._changed:
            self._published += not self._closed
            self._changed.notify_all()
