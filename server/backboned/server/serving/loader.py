"""The loader: a thread that keeps what is loaded in step with the checkpoint directory.

Round after round it looks, plans (`plan.py`), acts, and publishes a snapshot. Reading, checking and warming happen
here, off the request path; readers only ever see one finished snapshot or the next.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.manifest import Manifest
from backboned.registry.payload import IncompleteFile
from backboned.registry.recognise import Recogniser
from backboned.registry.version import VersionReader, VersionWeights
from backboned.registry.weights import WeightStore
from backboned.server.compute.canary import Canary
from backboned.server.compute.stages import LoadedStage, StageStore
from backboned.server.serving.announce import Announcer
from backboned.server.serving.library import Library
from backboned.server.serving.plan import Action, Adopt, DropState, Load, VersionKey, plan
from backboned.server.serving.records import Records
from backboned.server.serving.snapshot import LoadedModel, Snapshot
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.serving.watch import Watcher, WatchMode

log = logging.getLogger(__name__)

Path = tuple[LoadedStage, ...]
"""The stages of a model, the head last."""

_HINT_PAUSE_SECONDS = 0.01
_POLL_SECONDS = 1.0
_PUBLISH_SECONDS = 0.02
_MAX_WANTED = 8


@dataclass(frozen=True)
class LoaderSettings:
    """How often to look (seconds), how long to wait for an unfinished file, how much to keep loaded."""

    scan_interval_seconds: float = 2.0
    settle_seconds: float = 5.0
    max_loaded_versions: int = 4
    watch: WatchMode = "auto"


class Loader:
    """Owns the snapshot. `snapshot`, `hint`, `refresh` and `want` may be called from any thread."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        catalogue: Catalogue,
        weights: WeightStore,
        stages: StageStore,
        *,
        telemetry: ServingTelemetry,
        records: Records,
        settings: LoaderSettings,
        on_loaded: Callable[[Sequence[Path]], None] = lambda _: None,
    ) -> None:
        """The `records` tell which versions are to serve, and which have aliases and so stay loaded.

        `on_loaded` is told the paths of all that is loaded, whenever that has changed, before it serves.
        """
        self._directory = directory
        self._weights = weights
        self._stages = stages
        self._telemetry = telemetry
        self._settings = settings
        self._records = records
        self._announcer = Announcer(telemetry, records.history)
        self._on_loaded = on_loaded
        self._told: Sequence[Path] = ()
        self._reader = VersionReader(directory, Recogniser(catalogue), weights)
        self._canary = Canary(stages)
        self._library = Library(directory)
        self._snapshot = Snapshot()
        self._watcher = Watcher(directory.root, self.hint, settings.watch)
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._fetches: dict[str, Future[object]] = {}
        self._wanted: dict[VersionKey, None] = {}
        self._waiters: list[Future[Snapshot]] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._scan_error = ""
        self._published = 0.0
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    @property
    def snapshot(self) -> Snapshot:
        """What is known and loaded now."""
        return self._snapshot

    @property
    def scan_error(self) -> str:
        """Why the directory can't be looked at; empty while it can."""
        return self._scan_error

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the action in progress, and wait for it."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        self._watcher.stop()
        self._fetching.shutdown(wait=False, cancel_futures=True)

    def hint(self) -> None:
        """Something may have changed: look soon."""
        self._wake.set()

    def refresh(self) -> "Future[Snapshot]":
        """The snapshot after a look that begins after this call."""
        future: Future[Snapshot] = Future()
        with self._lock:
            self._waiters.append(future)
        self._wake.set()
        return future

    def want(self, model: str, version: int) -> None:
        """Load a version at the next look, and keep it while it is among the last ones wanted."""
        with self._lock:
            self._wanted.pop((model, version), None)
            self._wanted[model, version] = None
            while len(self._wanted) > _MAX_WANTED:
                del self._wanted[next(iter(self._wanted))]

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            self._watcher.ensure()
            with self._lock:
                waiters, self._waiters = self._waiters, []
            try:
                pause = self._round()
            except Exception as error:  # a defect of ours must not end the loader: what is loaded serves on
                log.exception("the loader failed")
                self._note_scan_error(f"the loader failed: {error!r}")
                pause = self._settings.scan_interval_seconds
            for waiter in waiters:
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(self._snapshot)
            if self._wake.wait(pause):
                time.sleep(_HINT_PAUSE_SECONDS)  # one look for a burst of events
        for waiter in self._waiters:
            waiter.cancel()

    def _round(self) -> float:
        """One look and all that follows from it; the seconds until the next one is due."""
        interval = self._settings.scan_interval_seconds
        if self._watcher.polling:
            interval = min(interval, _POLL_SECONDS)
        try:
            seen = self._directory.scan()
        except OSError as error:
            self._note_scan_error(f"can't look at the checkpoint directory: {error}")
            return interval
        self._note_scan_error("")
        self._telemetry.scanned(time.time())
        self._library.update(seen, time.monotonic())
        self._library.policies = self._records.decisions.policies()
        now = time.monotonic()
        todo = plan(
            self._library.known(self._wanted_versions()),
            now=now,
            settle_seconds=self._settings.settle_seconds,
            max_loaded_versions=self._settings.max_loaded_versions,
        )
        self._library.loading = {(a.manifest.model, a.manifest.version) for a in todo.actions if isinstance(a, Load)}
        self._publish()
        for action in todo.actions:
            if self._stopping:
                break
            self._act(action)
            if time.monotonic() - self._published > _PUBLISH_SECONDS:
                self._publish()
        self._publish()
        return interval if todo.look_again_at is None else max(0.0, min(interval, todo.look_again_at - now))

    def _act(self, action: Action) -> None:
        started = time.monotonic()
        try:
            if isinstance(action, Load):
                result = self._load(action.manifest)
            elif isinstance(action, Adopt):
                result = self._adopt(action)
            else:
                self._library.loaded.pop(action.key, None)
                result = ""
        except Exception:  # a defect of ours must not end the loader: what is loaded serves on
            log.exception("the loader failed at %r", action)
            result = "failed"
            self._give_up(action, "an internal error, told in the daemon's log")
        if result:
            self._telemetry.checkpoint_load(result, time.monotonic() - started)

    def _load(self, manifest: Manifest) -> str:
        key = (manifest.model, manifest.version)
        if not self._weights_at_hand(manifest):
            return ""
        try:
            self._library.loaded[key] = self._place(self._reader.read(manifest))
        except BackbonedError as error:
            log.warning("%s version %d is not served: %s", *key, error.message)
            self._library.refuse(key, error.message)
            return "quarantined"
        self._library.loading.discard(key)
        log.info("%s version %d, epoch %d, is loaded", *key, manifest.best_epoch)
        return "loaded"

    def _place(self, version: VersionWeights) -> LoadedModel:
        """Put a version on the device, and see that it answers."""
        manifest, backbone, device = version.manifest, version.backbone, self._stages.device
        path = self._stages.path(backbone, version.stages)
        answers = None if version.answers is None else version.answers.to(device.device)
        if device.dtype == torch.float32:
            self._canary.check(path, manifest.preprocessing)
            return LoadedModel(manifest, path, version.shared, answers)
        temperature = 1.0 if answers is None else answers.temperature
        agreement = self._canary.compare(
            path, manifest.preprocessing, manifest.task, backbone, version.stages, temperature=temperature
        )
        name = f"{manifest.model} version {manifest.version}"
        log.info("%s in %s and in fp32: %s", name, device.precision, agreement)
        self._telemetry.precision_deviation(manifest.model, agreement.deviation)
        if not agreement.close:
            log.warning("%s runs in fp32: %s is too coarse for it", name, device.precision)
            path = self._stages.path(backbone, version.stages, torch.float32)
            self._canary.check(path, manifest.preprocessing)
        return LoadedModel(manifest, path, version.shared, answers)

    def _adopt(self, action: Adopt) -> str:
        drop = action.drop
        try:
            version = self._reader.adopt(drop, self._library.adopted(drop.model, drop.path.name))
        except OSError as error:  # such as a full disk, which is no fault of the file's: it is tried again and again
            reason = f"it can't be adopted yet: {error.strerror or error}"
            if self._library.drops[drop.path].reason != reason:
                log.warning("%s: %s", drop.path, reason)
            self._library.settle(drop.path, DropState.WAITING, reason)
            return ""
        except BackbonedError as error:
            if isinstance(error, IncompleteFile) and not action.final:
                self._library.settle(drop.path, DropState.WAITING, error.message)
                return ""
            log.warning("%s is quarantined: %s", drop.path, error.message)
            self._library.settle(drop.path, DropState.QUARANTINED, error.message)
            return "quarantined"
        self._library.settle(drop.path, DropState.ADOPTED)
        if version is None:
            return ""
        log.info("%s is adopted as %s version %d", drop.path, drop.model, version.manifest.version)
        try:
            self._library.add(self._place(version))
        except BackbonedError:
            self.hint()  # it is on disk: the next look finds it, and tells why it isn't served
        return "adopted"

    def _give_up(self, action: Action, reason: str) -> None:
        if isinstance(action, Load):
            self._library.refuse((action.manifest.model, action.manifest.version), reason)
        elif isinstance(action, Adopt):
            self._library.settle(action.drop.path, DropState.QUARANTINED, reason)

    def _weights_at_hand(self, manifest: Manifest) -> bool:
        """Whether the version can be read now; weights that must be downloaded first are fetched aside."""
        name = manifest.backbone
        try:
            if set(manifest.trained) >= set(manifest.stages) or self._weights.is_local(name):
                return True
        except BackbonedError:
            return True  # an unknown backbone: reading the version says so
        fetch = self._fetches.get(name)
        if fetch is None:
            log.info("fetching the weights of %s", name)
            self._fetches[name] = fetch = self._fetching.submit(self._weights.stages, name)
            fetch.add_done_callback(lambda _: self.hint())
        if not fetch.done():
            return False
        del self._fetches[name]
        if (error := fetch.exception()) is not None:
            message = error.message if isinstance(error, BackbonedError) else str(error)
            self._library.refuse((manifest.model, manifest.version), message)
            return False
        return True

    def _wanted_versions(self) -> frozenset[VersionKey]:
        pinned = {(m, v) for m, aliases in self._records.aliases.all().items() for v in aliases.values()}
        with self._lock:
            return frozenset(self._wanted) | pinned

    def _publish(self) -> None:
        paths = tuple(model.path for model in self._library.loaded.values())
        if paths != self._told:
            self._told = paths
            self._on_loaded(paths)
        before, self._snapshot = self._snapshot, self._library.snapshot()
        self._published = time.monotonic()
        self._announcer.publish(before, self._snapshot)

    def _note_scan_error(self, message: str) -> None:
        if message and message != self._scan_error:
            log.error("%s; what is loaded serves on", message)
        elif self._scan_error and not message:
            log.info("the checkpoint directory can be looked at again")
        self._scan_error = message


def not_loaded(model: str, version: int) -> BackbonedError:
    """The error for a version that is known and not in memory yet."""
    return BackbonedError(
        ErrorKind.UNAVAILABLE, f"{model} version {version} is not loaded yet; try again", retry_delay_seconds=0.5
    )
