"""Doing what was planned: reading versions, adopting dropped files, putting them on the device."""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError
from backboned.registry.look import Part
from backboned.registry.manifest import Manifest
from backboned.registry.refusal import IncompleteFile
from backboned.registry.version import VersionReader
from backboned.server.serving.fetching import Fetches
from backboned.server.serving.library import Library
from backboned.server.serving.placing import Placer
from backboned.server.serving.plan import Adopt, DropState, Load, Retire
from backboned.server.serving.room import MEMORY_ERRORS, Room
from backboned.server.serving.telemetry import ServingTelemetry

log = logging.getLogger(__name__)


class Actor:
    """Acts on the library. For the loader's thread. What can't be used is quarantined with the reason."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        library: Library,
        reader: VersionReader,
        placer: Placer,
        *,
        room: Room,
        fetches: Fetches,
        telemetry: ServingTelemetry,
        changed: Callable[[Iterable[Part]], None],
    ) -> None:
        """`changed` is told what to look at again."""
        self._directory = directory
        self._library = library
        self._reader = reader
        self._placer = placer
        self._room = room
        self._fetches = fetches
        self._telemetry = telemetry
        self._changed = changed
        self._held_up: dict[Path, str] = {}

    def held_up(self) -> list[str]:
        """What can't be done now through no fault of a file's, such as for a full disk, and why: it is tried again."""
        if self._held_up:
            there = self._library.drops.keys() | {self._directory.version(*key) for key in self._library.manifests}
            self._held_up = {path: why for path, why in self._held_up.items() if path in there}
        return list(self._held_up.values())

    def retire(self, action: Retire) -> None:
        """Let go of a version."""
        if self._library.loaded.pop(action.key, None) is not None and action.evicted:
            log.info("%s version %d is out of memory: others were asked for later", *action.key)
            self._telemetry.evicted()

    def are_quick(self, actions: Iterable[Load | Adopt]) -> bool:
        """Whether all that is to be loaded is loaded in a moment."""
        return self._placer.are_quick([action.manifest for action in actions if isinstance(action, Load)])

    def act(self, action: Load | Adopt) -> None:
        """Load a version, or look into a dropped file; the library knows what has come of it."""
        started = time.monotonic()
        try:
            result = self._load(action.manifest) if isinstance(action, Load) else self._adopt(action)
        except Exception:  # a defect of ours must not end the loader: what is loaded serves on
            log.exception("the loader failed at %r", action)
            result = "failed"
            self._give_up(action, "an internal error, told in the daemon's log")
        if result:
            self._telemetry.checkpoint_load(result, time.monotonic() - started)

    def _load(self, manifest: Manifest) -> str:
        key = (manifest.model, manifest.version)
        folder = self._directory.version(*key)
        self._held_up.pop(folder, None)
        try:
            if not self._fetches.at_hand(manifest):
                self._library.fetching.add(manifest.backbone)
                return ""
            if not self._room.has_room(manifest):
                return ""
            self._library.loaded[key] = self._placer.place(self._reader.read(manifest))
        except MEMORY_ERRORS:
            self._room.run_short(manifest)
            return ""
        except OSError as error:  # the disk fails, say, which is no fault of the file's: it is tried again
            self._held_up[folder] = f"{manifest.model} version {manifest.version} can't be read: {error}"
            self._library.loading.discard(key)  # nobody who asks for it is to wait
            return ""
        except BackbonedError as error:
            log.warning("%s version %d is not served: %s", *key, error.message)
            self._library.refuse(key, error.message)
            return "quarantined"
        self._library.loading.discard(key)
        log.info("%s version %d, epoch %d, is loaded", *key, manifest.best_epoch)
        return "loaded"

    def _adopt(self, action: Adopt) -> str:
        drop = action.drop
        self._held_up.pop(drop.path, None)
        try:
            version = self._reader.adopt(drop, self._library.before(drop))
        except OSError as error:  # such as a full disk, which is no fault of the file's: it is tried again and again
            reason = f"it can't be adopted yet: {error.strerror or error}"
            self._held_up[drop.path] = f"{drop.path}: {reason}"
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
        self._changed({(drop.model, None)})  # the next look finds it, and makes room, or tells why it can't
        with suppress(BackbonedError, *MEMORY_ERRORS):
            if self._room.fits(version.manifest):
                self._library.add(self._placer.place(version))
        return "adopted"

    def _give_up(self, action: Load | Adopt, reason: str) -> None:
        if isinstance(action, Load):
            self._library.refuse((action.manifest.model, action.manifest.version), reason)
        else:
            self._library.settle(action.drop.path, DropState.QUARANTINED, reason)
