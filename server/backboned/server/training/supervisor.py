"""The jobs of a daemon: asked for, run one after another in trainer processes, watched, cancelled."""

import asyncio
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from backboned.registry.atomic import TEMPORARY_PREFIX
from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.weights import WeightStore
from backboned.server.database import meaning
from backboned.server.training.events import JobEventPayload, JobState, StateChanged
from backboned.server.training.job_run import WORK_PREFIX, JobRun, work_folder
from backboned.server.training.jobs import Job, JobEvent, JobRequest, JobStore
from backboned.server.training.journal import JobJournal
from backboned.server.training.options import TrainingOptions
from backboned.server.training.outcome import Ask
from backboned.server.training.settings import TrainingSettings, TrainingTelemetry
from backboned.server.training.standby import Standby
from backboned.server.training.submission import Submission
from backboned.server.training.uploads import is_upload_id

Removed = TypeVar("Removed")

Publish = Callable[[str, JobEventPayload], Awaitable[None]]

BeforeSuccess = Callable[[str, int], Awaitable[None]]

_logger = logging.getLogger(__name__)
_CANCEL_SECONDS = 15.0
_BEFORE_SUCCESS_SECONDS = 10.0
_FULL_RETRY_SECONDS = 30.0
_RETRY_SECONDS = 1.0


class JobSupervisor:
    """Runs jobs one at a time, in the order they were asked for. For the event loop's thread.

    A trainer that is killed is followed by another one; a job that fails ends nothing but itself.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        directory: CheckpointDirectory,
        catalogue: Catalogue,
        weights: WeightStore,
        settings: TrainingSettings,
        telemetry: TrainingTelemetry,
        standby: Standby,
        before_success: BeforeSuccess,
    ) -> None:
        """Trainers come from `standby`, which the caller closes once this has stopped.

        `before_success(model, version)` is awaited, 10 seconds at most, before a job is said to have succeeded.
        """
        self._store = store
        self._directory = directory
        self._settings = settings
        self._telemetry = telemetry
        self._before_success = before_success
        self._journal = JobJournal(store, telemetry)
        self._submission = Submission(directory, catalogue, weights, settings)
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._run: JobRun | None = None
        self._standby = standby
        self._turn = asyncio.Lock()  # held while a queued job is added, starts or is cancelled
        self._stopping = False
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Go on with what an earlier daemon left running, and then with what it left waiting."""
        running = await asyncio.to_thread(self._store.jobs, states=(JobState.RUNNING,))
        waiting = await asyncio.to_thread(self._store.jobs, states=(JobState.QUEUED,))
        await asyncio.to_thread(self._clear_work_dir, {job.id for job in (*running, *waiting)})
        for job in running:
            await self._journal.publish(job.id, StateChanged(JobState.QUEUED))
        for job in (*reversed(running), *reversed(waiting)):
            self._waiting.put_nowait(job.id)
        await self._journal.count_states()
        self._worker = asyncio.create_task(self._work())

    async def stop(self, timeout_seconds: float) -> None:
        """Stop the running job, which the next start goes on with; what waits stays queued; watching ends.

        After `timeout_seconds` its trainer is killed.
        """
        self._stopping = True
        async with self._turn:
            run = self._run
        if run is not None:
            run.ask(Ask.SHUTDOWN)
            try:
                await asyncio.wait_for(run.ended.wait(), timeout_seconds)
            except TimeoutError:
                _logger.warning("the trainer did not stop within %g seconds and is killed", timeout_seconds)
        if self._worker is not None:
            self._worker.cancel()
            with suppress(asyncio.CancelledError):
                await self._worker
        await self._journal.close()

    async def submit(
        self, *, model: str, backbone: str, dataset: str, options: TrainingOptions, request_id: str = ""
    ) -> Job:
        """A new queued job, or the one that the same `request_id` started before.

        Raises `BackbonedError` for whatever is wrong with it, as far as names and manifests tell.
        """
        request = JobRequest(model, backbone, dataset, options, request_id)
        if repeated := await asyncio.to_thread(self._store.repeated, request):
            return repeated
        folder = await asyncio.to_thread(self._submission.check, request)
        async with self._turn:
            if repeated := await asyncio.to_thread(self._store.repeated, request):
                return repeated  # it came twice at once
            if self._stopping:
                raise BackbonedError(ErrorKind.UNAVAILABLE, "the daemon is stopping; ask again when it is back")
            job = await asyncio.to_thread(self._add, request, folder)
            self._waiting.put_nowait(job.id)
        await self._journal.count_states()
        return job

    async def get(self, job_id: str) -> Job:
        """A job. Raises `BackbonedError` `NOT_FOUND`."""
        return await asyncio.to_thread(self._store.get, job_id)

    async def list_jobs(self, model: str | None = None) -> list[Job]:
        """Jobs, newest first; those of a model if one is given."""
        return await asyncio.to_thread(self._store.jobs, model=model)

    async def writes(self, model: str, version: int) -> bool:
        """Whether a job that hasn't ended is to write a version."""
        states = (JobState.QUEUED, JobState.RUNNING)
        jobs = await asyncio.to_thread(self._store.jobs, model=model, states=states)
        return any(job.version == version for job in jobs)

    def watch(self, job_id: str, after_sequence: int = 0) -> AsyncIterator[JobEvent]:
        """The job's events in order, from after `after_sequence`, as they come, until the one with its final state.

        Raises `BackbonedError`: `NOT_FOUND`, or `UNAVAILABLE` when the daemon stops first.
        """
        return self._journal.watch(job_id, after_sequence)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job and return it as it then is; its epochs are kept. One that has ended stays as it is.

        A trainer gets 10 seconds to end its batch. Raises `BackbonedError` `NOT_FOUND`.
        """
        async with self._turn:
            job = await self.get(job_id)
            run = self._run if self._run is not None and self._run.job.id == job_id else None
            if run is None and not job.state.final:
                await self._end(job, StateChanged(JobState.CANCELLED), self._journal.publish)
        if run is not None:
            run.ask(Ask.CANCEL)
            with suppress(TimeoutError):
                await asyncio.wait_for(run.ended.wait(), _CANCEL_SECONDS)
        return await self.get(job_id)

    async def release(self, folder: Path, remove: Callable[[], Removed]) -> Removed:
        """Call `remove`, which makes the dataset in `folder` unknown, in a thread; no job can be added meanwhile.

        Raises `BackbonedError` `FAILED_PRECONDITION` if a job that hasn't ended uses the dataset.
        """
        async with self._turn:
            jobs = await asyncio.to_thread(self._store.jobs, states=(JobState.QUEUED, JobState.RUNNING))
            using = [job.id for job in jobs if job.folder == str(folder)]
            if using:
                raise BackbonedError(
                    ErrorKind.FAILED_PRECONDITION,
                    f"job {using[0]} uses dataset {folder.name!r}: wait for its end, or cancel it",
                )
            return await asyncio.to_thread(remove)

    async def _work(self) -> None:
        while True:
            job_id = await self._waiting.get()
            while True:
                if await self._took_its_turn(job_id):
                    break
                await asyncio.sleep(_RETRY_SECONDS)

    async def _took_its_turn(self, job_id: str) -> bool:
        """Whether a job's turn is over; not while the database can't be written."""
        try:
            await self._run_next(job_id)
        except Exception as error:
            if meaning(error) is not None:
                return False
            _logger.exception("job %s was lost", job_id)  # other jobs may still do
        return True

    async def _run_next(self, job_id: str) -> None:
        async with self._turn:
            job = await self.get(job_id)
            if self._stopping or job.state is not JobState.QUEUED:
                return
            await self._journal.publish(job_id, StateChanged(JobState.RUNNING))
            self._run = run = JobRun(
                job, self._directory, self._settings, self._journal, self._telemetry, standby=self._standby
            )
        start = time.monotonic()
        try:
            final = await run.run()
            if final is None:  # the daemon is stopping
                return
            if final.state is JobState.SUCCEEDED:
                await self._await_before_success(job)
            await self._end(job, final, self._journal.keep)
            self._telemetry.job_duration(time.monotonic() - start)
        finally:
            self._run = None
            run.ended.set()
        if not self._stopping:
            self._standby.rest()

    async def _await_before_success(self, job: Job) -> None:
        try:
            await asyncio.wait_for(self._before_success(job.model, job.version), _BEFORE_SUCCESS_SECONDS)
        except Exception:  # the job did succeed, whatever keeps its version from being served
            _logger.exception("%s version %d is trained, and could not be served at once", job.model, job.version)

    async def _end(self, job: Job, final: StateChanged, publish: Publish) -> None:
        if final.state is not JobState.SUCCEEDED:
            await asyncio.to_thread(_remove_if_unused, self._directory.version(job.model, job.version))
        await publish(job.id, final)
        await asyncio.to_thread(shutil.rmtree, work_folder(self._settings, job.id), ignore_errors=True)
        _logger.info("job %s %s %s", job.id, final.state.value, final.error)

    def _add(self, request: JobRequest, folder: str) -> Job:
        if is_upload_id(request.dataset) and not Path(folder).exists():  # it was deleted just now
            raise BackbonedError(ErrorKind.NOT_FOUND, f"dataset {request.dataset!r} has gone", field="dataset")
        limit = self._settings.max_queued_jobs
        if len(self._store.jobs(states=(JobState.QUEUED,))) >= limit:
            raise BackbonedError(
                ErrorKind.RESOURCE_EXHAUSTED,
                f"{limit} jobs are queued already, which is the limit (max_queued_jobs); try again later",
                retry_delay_seconds=_FULL_RETRY_SECONDS,
            )
        try:
            version = self._directory.reserve(request.model, above=self._store.last_version(request.model))
        except OSError as error:
            raise BackbonedError(
                ErrorKind.RESOURCE_EXHAUSTED, f"no folder can be made in the checkpoint directory: {error.strerror}"
            ) from error
        try:
            return self._store.add(secrets.token_hex(8), request, folder, version)
        except BaseException:
            _remove_if_unused(self._directory.version(request.model, version))
            raise

    def _clear_work_dir(self, unended: set[str]) -> None:
        kept = {work_folder(self._settings, job_id) for job_id in unended}
        for folder in self._settings.work_dir.glob(f"{WORK_PREFIX}*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def _remove_if_unused(folder: Path) -> None:
    """Remove a version's folder if there is nothing in it but what a killed trainer was writing."""
    with suppress(OSError):
        for file in folder.glob(f"{TEMPORARY_PREFIX}*"):
            file.unlink()
        folder.rmdir()
