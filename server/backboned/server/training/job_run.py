"""One job while it runs: its trainer processes, what they tell, and how it ends."""

import asyncio
import logging
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path

from backboned.registry.directory import CheckpointDirectory
from backboned.server.training.events import (
    CheckpointWritten,
    EpochDone,
    Evaluation,
    FeatureProgress,
    JobEventPayload,
    JobState,
    LogLine,
    StateChanged,
)
from backboned.server.training.jobs import Job
from backboned.server.training.journal import JobJournal
from backboned.server.training.outcome import Ask, Ended, kept_epochs, outcome
from backboned.server.training.reason import reason
from backboned.server.training.settings import TrainingSettings, TrainingTelemetry
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.standby import Standby
from backboned.server.training.trainer_process import TrainerProcess

WORK_PREFIX = "job-"
"""Folders of jobs in the work folder begin so."""

_logger = logging.getLogger(__name__)
_KILL_AFTER_SECONDS = 10.0
_PAUSE_SECONDS = 0.5


class JobRun:
    """Runs one job, by as many trainer processes as it takes. For the event loop's thread."""

    def __init__(
        self,
        job: Job,
        directory: CheckpointDirectory,
        settings: TrainingSettings,
        journal: JobJournal,
        telemetry: TrainingTelemetry,
        *,
        standby: Standby,
    ) -> None:
        self.job = job
        self.ended = asyncio.Event()
        self._directory = directory
        self._settings = settings
        self._journal = journal
        self._telemetry = telemetry
        self._standby = standby
        self._asked: Ask | None = None
        self._stop = asyncio.Event()
        self._told: set[Hashable] = set()
        self._furthest: tuple[int, int] = (0, 0)
        self._counted = FeatureProgress(0, 0, 0.0)

    def ask(self, why: Ask) -> None:
        """Ask the trainer to stop; to cancel counts more than to stop. Returns at once: wait for `ended`."""
        if self._asked is not Ask.CANCEL:
            self._asked = why
        self._stop.set()

    async def run(self) -> StateChanged | None:
        """Train, publishing events, and return the final state without publishing it.

        A trainer that dies is followed by another one, which goes on from the last epoch. None if the daemon stops
        first. The job's folder stays, and its next run goes on from there.
        """
        folder = work_folder(self._settings, self.job.id)
        try:
            self._told = {_identity(event.payload) for event in await self._journal.so_far(self.job.id)}
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            version = self._directory.version(self.job.model, self.job.version)
            for needed in (version.parent, version):  # nothing above: a directory that is gone isn't made anew
                await asyncio.to_thread(needed.mkdir, exist_ok=True)
            return await self._train_to_the_end(folder)
        except Exception as error:  # a full disk, no process to be had: the job fails, the daemon goes on
            _logger.exception("job %s could not be run", self.job.id)
            return StateChanged(JobState.FAILED, f"the job could not be run: {reason(error)}")

    async def _train_to_the_end(self, folder: Path) -> StateChanged | None:
        fruitless = 0
        while self._asked is None:
            before = self._furthest
            ended = await self._train(folder)
            fruitless = fruitless + 1 if self._furthest == before else 1
            kept = await asyncio.to_thread(kept_epochs, self._directory, self.job.model, self.job.version)
            final = outcome(ended, self._asked, fruitless, kept)
            if final is not None or self._asked is not None:
                return final
            _logger.warning("job %s: %s; another trainer goes on", self.job.id, ended.how)
            await self._journal.keep(self.job.id, LogLine(f"{ended.how}; another one goes on from where it was"))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _PAUSE_SECONDS * (fruitless - 1))
        return StateChanged(JobState.CANCELLED) if self._asked is Ask.CANCEL else None

    async def _train(self, folder: Path) -> Ended:
        process = await self._standby.take()
        process.begin(self._spec(folder))
        _logger.info("job %s: trainer process %d started", self.job.id, process.pid)
        stopper = asyncio.create_task(self._stop_when_asked(process))
        self._counted = FeatureProgress(0, 0, 0.0)
        told: StateChanged | None = None
        try:
            async for payload in process.events():
                if isinstance(payload, StateChanged):
                    told = payload
                else:
                    self._measure(payload, new=await self._publish(payload))
            how = await process.ended()
            if told is None or told.state is JobState.FAILED:
                _logger.warning("job %s: %s; its last words: %s", self.job.id, how, process.last_words)
            return Ended(told, how, process.was_killed)
        finally:
            stopper.cancel()
            process.kill()
            await process.ended()  # it is gone when this is over, also when the daemon stops

    async def _publish(self, payload: JobEventPayload) -> bool:
        """Publish what hasn't been told yet, and say whether that was so: a trainer that goes on repeats some of it."""
        identity = _identity(payload)
        if identity in self._told:
            return False
        await self._journal.keep(self.job.id, payload)
        self._told.add(identity)
        return True

    async def _stop_when_asked(self, process: TrainerProcess) -> None:
        await self._stop.wait()
        with suppress(TimeoutError):
            await process.stop(_KILL_AFTER_SECONDS)

    def _measure(self, payload: JobEventPayload, *, new: bool) -> None:
        if isinstance(payload, EpochDone) and new:
            self._furthest = max(self._furthest, (payload.epoch, 0))
            self._telemetry.training_epoch(
                self.job.model,
                payload.epoch,
                payload.train_loss,
                payload.train_accuracy,
                payload.val_loss,
                payload.val_accuracy,
            )
        elif isinstance(payload, FeatureProgress):
            self._furthest = max(self._furthest, (0, payload.done))
            last, self._counted = self._counted, payload
            self._telemetry.feature_images("cache", payload.cached - last.cached)
            self._telemetry.feature_images("computed", payload.done - payload.cached - (last.done - last.cached))

    def _spec(self, folder: Path) -> TrainerSpec:
        request, settings = self.job.request, self._settings
        return TrainerSpec(
            model=request.model,
            version=self.job.version,
            backbone=request.backbone,
            dataset=self.job.folder,
            data_roots=settings.roots_for(self.job.folder),
            options=request.options,
            checkpoint_dir=self._directory.root.absolute(),
            work_dir=folder.absolute(),
            weight_files={name: file.absolute() for name, file in settings.weight_files.items()},
            plugin_modules=settings.plugin_modules,
            device=settings.device,
            threads=settings.threads,
            max_image_pixels=settings.max_image_pixels,
            precision=settings.precision,
            cache_dir=settings.cache_dir.absolute(),
            cache_bytes=settings.cache_bytes,
            compiled_dir=settings.compiled_dir,
            remote_data=settings.remote_data,
            fetched_dir=settings.fetched_dir,
            signing_key=settings.signing_key,
            trusted_keys=settings.trusted_keys,
        )


def work_folder(settings: TrainingSettings, job_id: str) -> Path:
    """The folder that a job has while it hasn't ended."""
    return settings.work_dir / f"{WORK_PREFIX}{job_id}"


def _identity(payload: JobEventPayload) -> Hashable:
    """What is told once: an epoch by its number, an evaluation, and whatever else says the same."""
    if isinstance(payload, EpochDone | CheckpointWritten):
        return type(payload), payload.epoch
    if isinstance(payload, Evaluation):
        return Evaluation
    identity: Hashable = payload
    return identity
