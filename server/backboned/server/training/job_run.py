"""One job while it runs: its trainer process, what that tells, and how it ends."""

import asyncio
import logging
import shutil
from contextlib import suppress
from pathlib import Path

from backboned.registry.directory import CheckpointDirectory
from backboned.server.training.events import EpochDone, FeatureProgress, JobEventPayload, JobState, StateChanged
from backboned.server.training.jobs import Job
from backboned.server.training.journal import JobJournal
from backboned.server.training.outcome import Ask, kept_epochs, outcome
from backboned.server.training.settings import TrainingSettings, TrainingTelemetry
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.trainer_process import TrainerProcess

WORK_PREFIX = "job-"
"""Folders of jobs in the work folder begin so."""

_logger = logging.getLogger(__name__)
_KILL_AFTER_SECONDS = 10.0


class JobRun:
    """Runs one job. For the event loop's thread."""

    def __init__(
        self,
        job: Job,
        directory: CheckpointDirectory,
        settings: TrainingSettings,
        journal: JobJournal,
        telemetry: TrainingTelemetry,
    ) -> None:
        self.job = job
        self.ended = asyncio.Event()
        self._directory = directory
        self._settings = settings
        self._journal = journal
        self._telemetry = telemetry
        self._asked: Ask | None = None
        self._stop = asyncio.Event()
        self._rows = 0

    def ask(self, why: Ask) -> None:
        """Ask the trainer to stop; the first reason counts. Returns at once: wait for `ended`."""
        self._asked = self._asked or why
        self._stop.set()

    async def run(self) -> StateChanged:
        """Train, publishing events, and return the final state without publishing it."""
        folder = self._settings.work_dir / f"{WORK_PREFIX}{self.job.id}"
        try:
            await asyncio.to_thread(folder.mkdir, parents=True)
            told, ended = await self._train(folder)
        except Exception as error:  # a full disk, no process to be had: the job fails, the daemon goes on
            _logger.exception("job %s could not be run", self.job.id)
            told, ended = None, f"the job could not be run: {error}"
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        kept = await asyncio.to_thread(kept_epochs, self._directory, self.job.model, self.job.version)
        return outcome(told, ended, self._asked, kept)

    async def _train(self, folder: Path) -> tuple[StateChanged | None, str]:
        process = await TrainerProcess.start(self._spec(folder))
        _logger.info("job %s: trainer process %d started", self.job.id, process.pid)
        stopper = asyncio.create_task(self._stop_when_asked(process))
        told: StateChanged | None = None
        try:
            async for payload in process.events():
                if isinstance(payload, StateChanged):
                    told = payload
                else:
                    await self._journal.publish(self.job.id, payload)
                    self._measure(payload)
            ended = await process.ended()
            if told is None or told.state is JobState.FAILED:
                _logger.warning("job %s: %s; its last words: %s", self.job.id, ended, process.last_words)
            return told, ended
        finally:
            stopper.cancel()
            process.kill()

    async def _stop_when_asked(self, process: TrainerProcess) -> None:
        await self._stop.wait()
        with suppress(TimeoutError):
            await process.stop(_KILL_AFTER_SECONDS)

    def _measure(self, payload: JobEventPayload) -> None:
        if isinstance(payload, EpochDone):
            self._telemetry.training_epoch(
                self.job.model,
                payload.epoch,
                payload.train_loss,
                payload.train_accuracy,
                payload.val_loss,
                payload.val_accuracy,
            )
        elif isinstance(payload, FeatureProgress):
            self._telemetry.feature_images("computed", payload.done - self._rows)
            self._rows = payload.done

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
            feature_budget_bytes=settings.feature_budget_bytes,
            remote_data=settings.remote_data,
            fetched_dir=settings.fetched_dir,
        )
