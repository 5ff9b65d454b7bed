"""Looking at the checkpoint directory: one that is empty is told from one that is gone."""

import time
from collections.abc import Set

from backboned.registry.directory import CheckpointDirectory
from backboned.registry.look import Part, Seen
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.troubles import TroubleKind, Troubles


class Looks:
    """Looks, one after another, and tells what keeps from looking. For the loader's thread; `succeeded` for any.

    A disk that is unmounted leaves an empty folder behind, and that is no reason to stop serving what was on it.
    """

    def __init__(self, directory: CheckpointDirectory, telemetry: ServingTelemetry, troubles: Troubles) -> None:
        self._directory = directory
        self._telemetry = telemetry
        self._troubles = troubles
        self._seen_in: tuple[int, int] | None = None
        self._seen: Seen | None = None
        self.succeeded = False
        """Whether the directory could be looked at since the start."""

    def scope(self, parts: Set[Part]) -> Set[Part] | None:
        """What to look at where only these parts may have changed: also all that is behind links. None: everything."""
        if self._seen is None or self._seen_in is None or self._identity() != self._seen_in:
            return None
        return parts | {(model, None) for model in self._seen.linked}

    def look(self, parts: Set[Part] | None = None) -> Seen | None:
        """What is there; None if that can't be told: then all is as it was.

        Of what isn't in `parts`, a `scope`, it is what the last look found.
        """
        before, self._seen = self._seen, None
        try:
            identity = self._identity()
            if before is None or parts is None:
                seen = self._directory.scan()
            else:
                seen = self._directory.scan_again(before, parts)
            if identity != self._identity():
                return None  # it was changed for another one meanwhile: the next look sees that one alone
        except OSError as error:
            self.failed(f"can't look at the checkpoint directory: {error}")
            return None
        if seen.nothing and self._seen_in not in (None, identity):
            self.failed(f"{self._directory.root} is empty, and not the folder that it was: is its disk mounted?")
            self._seen_in = (0, 0)  # whatever comes, an empty folder isn't it
            return None
        if not seen.nothing:
            self._seen_in = identity
        self._troubles.tell(
            TroubleKind.CHECKPOINT_DIRECTORY,
            *(f"can't look at {m}: {why}" for m, why in seen.unreadable.items()),
            *(f"{path}: {seen.refused[path]}" for path in sorted(seen.unseen)),
        )
        self._seen = seen
        self.succeeded = True
        self._telemetry.scanned(time.time())
        return seen

    def failed(self, message: str) -> None:
        """Tell why a look, or what followed from it, failed."""
        self._troubles.tell(TroubleKind.CHECKPOINT_DIRECTORY, message)

    def _identity(self) -> tuple[int, int]:
        stat = self._directory.root.stat()
        return stat.st_dev, stat.st_ino
