"""The loader: a thread that keeps what is loaded in step with the checkpoint directory.

Round after round it looks, plans (`plan.py`), acts, and publishes a snapshot. Reading, checking and warming happen
here, off the request path; readers only ever see one finished snapshot or the next.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence, Set
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from backboned.registry.adoption import remove_abandoned
from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.look import Part
from backboned.registry.recognise import Recogniser
from backboned.registry.signatures import Trust
from backboned.registry.version import VersionReader
from backboned.registry.weights import WeightStore
from backboned.server.compute.stages import LoadedStage, StageStore
from backboned.server.serving.acting import Actor
from backboned.server.serving.agenda import Agenda, Turn
from backboned.server.serving.announce import Announcer
from backboned.server.serving.fetching import Fetches
from backboned.server.serving.library import Library, Models
from backboned.server.serving.looking import Looks
from backboned.server.serving.placing import Placer
from backboned.server.serving.plan import Adopt, Limits, Load, Retire, VersionKey, plan
from backboned.server.serving.records import Records
from backboned.server.serving.room import Room
from backboned.server.serving.snapshot import Snapshot
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.serving.watch import Watcher, WatchMode
from backboned.server.troubles import TroubleKind, Troubles

log = logging.getLogger(__name__)

Path = tuple[LoadedStage, ...]
"""The stages of a model, the head last."""

_HINT_PAUSE_SECONDS = 0.01
_POLL_SECONDS = 1.0
_PUBLISH_SECONDS = 0.02
_PUBLISH_PAUSE = 10.0
"""While a look loads many versions, it shows them every 20 ms, or, where that takes long, a tenth of the time."""

_ROOM_SECONDS = 0.05
_ACT_SECONDS = 0.5
_REST_SECONDS = 0.05
"""What was left to further looks is gone on with so soon: whoever asks meanwhile needs a look at what they ask for."""

_MAX_WANTED = 8


@dataclass(frozen=True)
class LoaderSettings:
    """How often to look (seconds), how changes are noticed, how long to wait for what, how much to keep loaded."""

    scan_interval_seconds: float = 2.0
    watch: WatchMode = "auto"
    limits: Limits = field(default_factory=Limits)


class Loader:
    """Owns the snapshot. `snapshot`, `refresh`, `note_use` and `want` may be called from any thread."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        catalogue: Catalogue,
        weights: WeightStore,
        stages: StageStore,
        *,
        telemetry: ServingTelemetry,
        records: Records,
        troubles: Troubles,
        settings: LoaderSettings,
        trust: Trust | None = None,
        on_loaded: Callable[[Sequence[Path]], None] = lambda _: None,
    ) -> None:
        """The `records` tell which versions are to serve, and which have aliases and so stay loaded.

        `on_loaded` is told the paths of all that is loaded, whenever that has changed, before it serves.
        """
        self._directory = directory
        self._telemetry = telemetry
        self._settings = settings
        self._records = records
        self._troubles = troubles
        self._looks = Looks(directory, telemetry, troubles)
        self._announcer = Announcer(telemetry, records.history)
        self._on_loaded = on_loaded
        self._told: Sequence[Path] = ()
        self._on_cpu = stages.device.device.type == "cpu"
        placer = Placer(stages, catalogue, telemetry)
        self._room = Room(placer, settings.limits.memory_bytes)
        self._library = Library(directory, placer.footprint)
        self._snapshot = Snapshot()
        self._agenda = Agenda()
        self._watcher = Watcher(directory.root, self._agenda, settings.watch)
        self._fetches = Fetches(weights, self._agenda.everything)
        self._actor = Actor(
            directory,
            self._library,
            VersionReader(directory, Recogniser(catalogue), weights, trust),
            placer,
            room=self._room,
            fetches=self._fetches,
            telemetry=telemetry,
            changed=self._agenda.changed,
        )
        self._used: dict[VersionKey, float] = {}
        self._wanted: dict[VersionKey, None] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._publish_at = 0.0
        self._look_at_all_at = 0.0
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    @property
    def snapshot(self) -> Snapshot:
        """What is known and loaded now."""
        return self._snapshot

    @property
    def has_looked(self) -> bool:
        """Whether the directory could be looked at since the start."""
        return self._looks.succeeded

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the action in progress, and wait for it."""
        self._stopping = True
        self._agenda.close()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        self._watcher.stop()
        self._fetches.stop()

    def refresh(self, models: Collection[str] | None = None) -> "Future[Snapshot]":
        """The snapshot after a look, at some models or at all, that begins after this call."""
        return self._agenda.asked(models)

    def note_use(self, model: str, version: int) -> None:
        """Somebody asks for a version: where memory is short, what was asked for last is kept."""
        self._used[model, version] = time.monotonic()

    def want(self, model: str, version: int) -> None:
        """Load a version at the next look, and keep it while it is among the last ones wanted."""
        self.note_use(model, version)
        with self._lock:
            self._wanted.pop((model, version), None)
            self._wanted[model, version] = None
            while len(self._wanted) > _MAX_WANTED:
                del self._wanted[next(iter(self._wanted))]

    def _run(self) -> None:
        if self._on_cpu:
            torch.set_num_threads(1)  # of this thread: the lanes want the cores
        with suppress(OSError):
            remove_abandoned(self._directory)
        while not self._stopping:
            self._watcher.ensure()
            turn = self._agenda.take()
            try:
                pause = self._round(turn)
            except Exception as error:  # a defect of ours must not end the loader: what is loaded serves on
                log.exception("the loader failed")
                self._looks.failed(f"the loader failed: {error!r}")
                pause = self._settings.scan_interval_seconds
            for waiter in turn.waiters:
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(self._snapshot)
            if self._agenda.wait(pause):
                time.sleep(_HINT_PAUSE_SECONDS)  # one look for a burst of events
        self._agenda.close()

    def _round(self, turn: Turn) -> float:
        """One look and all that follows from it; the seconds until the next one is due."""
        now = time.monotonic()
        interval = self._settings.scan_interval_seconds
        if self._watcher.polling:
            interval = min(interval, _POLL_SECONDS)
        parts = self._scope(turn, now)
        if parts is None:
            self._look_at_all_at = now + interval
        seen = self._looks.look(parts)
        if seen is None:
            return interval
        models = seen.models
        self._library.update(seen, time.monotonic(), turn.closed)
        self._library.policies = self._records.decisions.policies()
        now = time.monotonic()
        for key in self._used.keys() - self._library.manifests.keys():
            del self._used[key]
        # Some models alone are planned as if there were room for all: what there is none for waits for a look at all.
        budget = self._room.budget_bytes(now) if models is None else None
        known = self._library.known(self._wanted_versions(), dict(self._used), models)
        todo = plan(known, now=now, limits=replace(self._settings.limits, memory_bytes=budget))
        self._library.intend(todo, models)
        retired = [action for action in todo.actions if isinstance(action, Retire)]
        for each in retired:
            self._actor.retire(each)
        coming = [action for action in todo.actions if not isinstance(action, Retire)]
        if any(isinstance(action, Adopt) for action in coming) or not self._actor.are_quick(coming):
            self._publish(models)  # and let go of what was retired
        self._room.begin(watch=bool(retired) or models is not None)
        if not self._act_on(coming, models, turn):
            self._look_at_all_at = time.monotonic() + _REST_SECONDS
        self._publish(models)
        self._troubles.tell(TroubleKind.LOADING, *self._actor.held_up())
        due = self._look_at_all_at if todo.look_again_at is None else min(self._look_at_all_at, todo.look_again_at)
        pause = max(0.0, due - time.monotonic())
        return min(pause, _ROOM_SECONDS) if self._room.waits else pause

    def _scope(self, turn: Turn, now: float) -> Set[Part] | None:
        """What to look at; None, everything: regularly, and where it matters to all models what is done to one."""
        if turn.parts is None or now >= self._look_at_all_at or self._room.waits or self._library.out:
            return None
        with suppress(OSError):
            return self._looks.scope(turn.parts | {(model, None) for model in self._library.unsettled()})
        return None

    def _act_on(self, actions: Sequence[Load | Adopt], models: Models, turn: Turn) -> bool:
        """Act, in order; whether all is done.

        Versions that are loaded in a moment, such as heads, don't keep anyone waiting: when somebody asks for one of
        them, or a while has passed and there is more to look at, the others are left to further looks.
        """
        ends = time.monotonic() + _ACT_SECONDS
        waiting = deque(actions)
        while waiting and not self._stopping:
            self._actor.act(waiting.popleft())
            now = time.monotonic()
            if waiting and now > self._publish_at:
                self._publish(models, whole=False)
            late = now > ends and bool(turn.waiters or self._agenda.has_more)
            if not (late or self._agenda.waited_for):
                continue
            if any(isinstance(action, Load) for action in waiting) and self._actor.are_quick(waiting):
                for action in waiting:
                    if isinstance(action, Adopt):
                        self._actor.act(action)
                return False
        return True

    def _wanted_versions(self) -> frozenset[VersionKey]:
        pinned = {(m, v) for m, aliases in self._records.aliases.all().items() for v in aliases.values()}
        with self._lock:
            return frozenset(self._wanted) | pinned

    def _publish(self, models: Models, *, whole: bool = True) -> None:
        """Show what is known, of these models anew.

        Where a look isn't at its end, `whole`, only new stages are told of, and no new heads.
        """
        started = time.monotonic()
        paths = tuple(model.path for model in self._library.loaded.values())
        if paths != self._told and (whole or _foundations(paths) - _foundations(self._told)):
            self._told = paths
            self._on_loaded(paths)
        before, self._snapshot = self._snapshot, self._library.snapshot(models)
        self._announcer.publish(before, self._snapshot)
        ended = time.monotonic()
        self._publish_at = ended + max(_PUBLISH_SECONDS, _PUBLISH_PAUSE * (ended - started))


def _foundations(paths: Sequence[Path]) -> set[LoadedStage]:
    return {stage for path in paths for stage in path[:-1]}


def not_loaded(model: str, version: int, reason: str = "") -> BackbonedError:
    """The error for a version that is known and not in memory yet."""
    why = reason or "it is not loaded yet"
    return BackbonedError(
        ErrorKind.UNAVAILABLE, f"{model} version {version} can't answer: {why}; try again", retry_delay_seconds=0.5
    )
