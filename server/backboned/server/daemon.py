"""The daemon: where its parts are made and put together, started in order, and stopped in the opposite one."""

import asyncio
import fcntl
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from importlib.metadata import version as distribution_version
from pathlib import Path

import torch
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DBAPIError

from backboned.registry.atomic import write_atomically
from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.signatures import Signer, Trust
from backboned.registry.weights import WeightStore
from backboned.server.api.frontends import Frontends, frontends_for
from backboned.server.api.handover import Answering
from backboned.server.api.server import GrpcServer
from backboned.server.api.service import ModelService, Rooms
from backboned.server.collecting import collect_when_idle
from backboned.server.compute.artefacts import ArtefactStore
from backboned.server.compute.compiler import StageCompiler
from backboned.server.compute.device import Device, usable_cores
from backboned.server.compute.stages import StageStore
from backboned.server.config import Config
from backboned.server.database import meaning, open_database
from backboned.server.database_watch import DatabaseWatch
from backboned.server.ops.http import HttpServer, application
from backboned.server.ops.metrics import Metrics
from backboned.server.process import collect_no_more
from backboned.server.serving.admission import Admission
from backboned.server.serving.choose import Chooser
from backboned.server.serving.deletions import Deletions
from backboned.server.serving.engine import Engine
from backboned.server.serving.loader import Loader, LoaderSettings
from backboned.server.serving.outcomes import Outcomes
from backboned.server.serving.plan import Limits
from backboned.server.serving.predictor import Predictor
from backboned.server.serving.prepare import prepare
from backboned.server.serving.promotion import Promoter
from backboned.server.serving.records import Records
from backboned.server.serving.remembered import Memory
from backboned.server.serving.sweep import Sweeper
from backboned.server.serving.versions import Versions
from backboned.server.training.jobs import JobStore
from backboned.server.training.settings import TrainingSettings
from backboned.server.training.standby import Standby
from backboned.server.training.supervisor import JobSupervisor
from backboned.server.training.uploads import UploadStore
from backboned.server.troubles import Troubles

log = logging.getLogger(__name__)

DATABASE_NAME = "backboned.sqlite"
ANSWERS_NAME = "answers.sqlite"
LOCK_NAME = "lock"
COMPILED_NAME = "compiled"
UPLOADS_NAME = "uploads"
SWITCH_SECONDS = 0.0002
_LOOK_PAUSE_SECONDS = 0.2
COMPILED_BYTES = 8 * 2**30
SHARE_OF_MEMORY = 0.6
"""Of the device's memory, for models; the rest is for batches, and on a CPU for everything else."""


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then stop cleanly. Raises `BackbonedError` or `OSError` if it can't start."""
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr
    )
    for name in ("watchdog", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # watchdog calls it an error that an event comes while it stops.
    logging.getLogger("watchdog.observers.inotify").addFilter(
        lambda record: "thread is inactive" not in record.getMessage()
    )
    # watchdog sees a folder twice that is made while it adds the one above, and says so at length.
    warnings.filterwarnings("ignore", "Callback with id .* already exists", RuntimeWarning)
    # A lane asks for the interpreter some ten times an image, and would wait this long each time that calls pour in.
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        asyncio.run(_serve(config))
    except DBAPIError as error:
        if known := meaning(error):
            raise known from error
        raise


class Daemon:
    """All parts of a daemon, wired. Made and used in one event loop."""

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        device = Device.choose(config.device, config.precision)
        self.metrics = Metrics(
            version=distribution_version("backboned"), torch_version=torch.__version__, device=str(device)
        )
        catalogue = Catalogue.installed(config.plugin)
        for broken in catalogue.broken:
            log.warning("plugin %s from %s is broken: %s", broken.name, broken.origin, broken.reason)
        for name in config.weights:
            catalogue.get(name)  # a misspelt name must not wait for the first FineTune
        Signer.of(config.signing_key)  # and neither may a key that can't be used
        trust = Trust.of(config.trusted_key)
        directory = CheckpointDirectory(config.checkpoint_dir.absolute())
        weights = WeightStore(catalogue, config.weights)
        self._stages = StageStore(device)
        self.engine = Engine(
            device,
            self.metrics,
            partial(prepare, max_pixels=config.max_image_pixels),
            max_batch_size=config.max_batch_size,
            threads=config.engine_threads,
        )
        self._compiler = StageCompiler(
            device,
            ArtefactStore(config.state_dir.absolute() / COMPILED_NAME, limit_bytes=COMPILED_BYTES),
            plugins=config.plugin,
            concurrency=self.engine.lanes + 1,
            largest_batch=config.max_batch_size,
            enabled=config.compile == "auto",
        )
        memory_bytes = _memory_for_models(config, device)
        self.troubles = Troubles()
        self._database_watch = DatabaseWatch(database, config.state_dir.absolute() / DATABASE_NAME, self.troubles)
        records = Records.of(database)
        self.loader = Loader(
            directory,
            catalogue,
            weights,
            self._stages,
            telemetry=self.metrics,
            records=records,
            troubles=self.troubles,
            settings=LoaderSettings(
                config.scan_interval_seconds,
                config.watch,
                Limits(config.settle_seconds, config.max_loaded_versions, memory_bytes),
            ),
            trust=trust,
            on_loaded=self._compiler.consider,
        )
        admission = Admission(
            config.max_queued_images, config.max_queued_bytes, self.engine.seconds_to_clear, self.engine.taken
        )
        chooser = Chooser(self.loader, records, self.metrics)
        self._memory = Memory.open(config.state_dir / ANSWERS_NAME, config.remember_answers, self.troubles)
        outcomes = Outcomes(self._memory, lambda: self.loader.snapshot, self.metrics)
        self.predictor = Predictor(chooser, self.engine, admission, outcomes, self.metrics)
        self.uploads = UploadStore(config.state_dir.resolve() / UPLOADS_NAME, config.upload_quota)
        self._standby = Standby(config.plugin, enabled=config.trainer_standby == "auto")
        self.jobs = JobSupervisor(
            JobStore(database),
            directory=directory,
            catalogue=catalogue,
            weights=weights,
            settings=_training_settings(config, self.uploads),
            telemetry=self.metrics,
            standby=self._standby,
            before_success=self._see_version,
        )
        deletions = Deletions(database, directory, self.troubles)
        self.versions = Versions(self.loader, records, deletions, self.jobs.writes)
        rooms = Rooms(
            catalogue,
            weights,
            directory,
            self.loader,
            records,
            self.versions,
            self.predictor,
            outcomes,
            self.jobs,
            self.uploads,
        )
        count = _frontends(config, device)
        frontends = Frontends(
            count,
            Answering(self.predictor.predict, chooser.preprocessing, partial(self.metrics.predict_phase, "decode")),
            folder=config.state_dir.absolute() / "frontends",
            max_message_bytes=config.max_message_bytes,
            max_image_pixels=config.max_image_pixels,
        )
        self.grpc = GrpcServer(
            ModelService(rooms, max_message_bytes=config.max_message_bytes),
            max_message_bytes=config.max_message_bytes,
            frontends=frontends if count else None,
        )
        self._promoter = Promoter(self.versions, outcomes, self.metrics)
        self._sweeper = Sweeper(self.versions, config.keep_versions, config.keep_days)
        self.metrics.watch_queue(self.engine.depth)
        self.metrics.watch_drift(outcomes.recent.shifts)
        self.metrics.watch_stages(self._stages.loaded, memory_bytes)
        self.metrics.watch_compiler(not self._compiler.unavailable, self._compiler.compiled, self._compiler.pending)
        self.metrics.watch_troubles(self.troubles.has)
        self.http = HttpServer(application(self.metrics.registry, self._not_ready, self.troubles))
        self._opening: asyncio.Task[None] | None = None
        self._not_ready_reason: str | None = "starting: models are being loaded"

    async def start(self) -> dict[str, str]:
        """Start all parts: health first, gRPC once the models on disk are loaded. Returns the two addresses."""
        http_host, http_port = await self.http.start(self._config.host, self._config.http_port)
        self.grpc.launch()
        self.engine.start()
        self._memory.start()
        self._database_watch.start()
        first_look = asyncio.wrap_future(self.loader.refresh())
        self.loader.start()
        await asyncio.gather(first_look, asyncio.to_thread(self.uploads.open))
        await self.versions.finish_deletions()
        self._compiler.start()
        await self.jobs.start()
        grpc_port = await self.grpc.start(self._config.host, self._config.grpc_port)
        if self.loader.has_looked:
            self.grpc.set_serving(True)
        else:
            self._opening = asyncio.create_task(self._serve_once_looked())
        self._sweeper.start()
        self._promoter.start()
        self._not_ready_reason = None
        host = f"[{http_host}]" if ":" in http_host else http_host
        return {"grpc": f"{host}:{grpc_port}", "http": f"http://{host}:{http_port}"}

    async def stop(self) -> None:
        """Say that no more is served, finish what is under way within the drain time, and stop all parts."""
        self._not_ready_reason = "stopping"
        if self._opening is not None:
            self._opening.cancel()
        self.grpc.set_serving(False)
        drain = self._config.drain_seconds
        await asyncio.gather(self._sweeper.stop(), self._promoter.stop())
        await asyncio.gather(self.grpc.stop(drain), self.jobs.stop(drain))
        self._standby.close()
        self.uploads.close()
        await asyncio.gather(*(asyncio.to_thread(part.stop) for part in (self.loader, self.engine, self._compiler)))
        await asyncio.gather(*(asyncio.to_thread(part.stop) for part in (self._memory, self._database_watch)))
        await self.http.stop()

    async def _see_version(self, model: str, _: int) -> None:
        """Wait until the loader has looked at a version that was just completed."""
        await asyncio.wrap_future(self.loader.refresh({model}))

    async def _serve_once_looked(self) -> None:
        """Say that calls can be answered once it is known what there is to answer with."""
        while True:
            await asyncio.sleep(_LOOK_PAUSE_SECONDS)
            if self.loader.has_looked:
                return self.grpc.set_serving(True)

    def _not_ready(self) -> str | None:
        if self._not_ready_reason or self.loader.has_looked:
            return self._not_ready_reason
        return "the checkpoint directory could not be looked at yet"


async def _serve(config: Config) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    for folder in (config.checkpoint_dir, config.state_dir):
        folder.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        stack.enter_context(_locked(config.state_dir))
        database = open_database(config.state_dir / DATABASE_NAME)
        stack.callback(database.dispose)
        daemon = Daemon(config, database)
        stack.push_async_callback(daemon.stop)
        starting, told = asyncio.create_task(daemon.start()), asyncio.create_task(stopping.wait())
        await asyncio.wait((starting, told), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            log.info("stopping before all models are loaded")
            return
        addresses = starting.result()
        collect_no_more()
        if config.ready_file is not None:
            content = json.dumps(addresses) + "\n"
            write_atomically(config.ready_file, lambda file: file.write(content.encode()))
            stack.callback(config.ready_file.unlink, missing_ok=True)
        sys.stdout.write(f"backboned is ready: gRPC on {addresses['grpc']}, HTTP on {addresses['http']}\n")
        sys.stdout.flush()
        collecting = asyncio.create_task(collect_when_idle(daemon.engine.depth))
        await told
        collecting.cancel()
        log.info("stopping: finishing what is under way")


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Hold the state folder: two daemons on one would take each other's jobs for their own."""
    with (state_dir / LOCK_NAME).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BackbonedError(
                ErrorKind.FAILED_PRECONDITION,
                f"another daemon uses the state folder {state_dir}: stop it, or give this one its own by --state-dir",
            ) from error
        yield


def _frontends(config: Config, device: Device) -> int:
    if config.frontends == "auto":
        return frontends_for(usable_cores(), device.device.type)
    return int(config.frontends)


def _memory_for_models(config: Config, device: Device) -> int:
    if config.model_memory == "auto":
        return int(SHARE_OF_MEMORY * device.memory_bytes())
    return int(config.model_memory)


def _training_settings(config: Config, uploads: UploadStore) -> TrainingSettings:
    threads = config.training_threads or os.cpu_count() or 1
    return TrainingSettings(
        work_dir=config.state_dir.absolute() / "work",
        cache_dir=config.state_dir.absolute() / "features",
        cache_bytes=config.cache_size,
        compiled_dir=config.state_dir.absolute() / COMPILED_NAME if config.compile == "auto" else None,
        precision=config.precision,
        data_roots=tuple(root.absolute() for root in config.data_root),
        remote_data=config.remote_data,
        fetched_dir=config.state_dir.absolute() / "fetched",
        uploads=uploads.datasets_folder,
        weight_files={name: file.absolute() for name, file in config.weights.items()},
        plugin_modules=config.plugin,
        device=config.device,
        threads=threads,
        max_queued_jobs=config.max_queued_jobs,
        max_image_pixels=config.max_image_pixels,
        signing_key=config.signing_key,
        trusted_keys=config.trusted_key,
    )
