"""Telling metrics and the journal which version of each model serves."""

import time
from collections.abc import Mapping

from sqlalchemy.exc import SQLAlchemyError

from backboned.server.serving.history import Change, Entry, History
from backboned.server.serving.policy import why
from backboned.server.serving.snapshot import KnownModel, Snapshot
from backboned.server.serving.telemetry import ServingTelemetry

_WAIT_SECONDS = 0.5
_RETRY_SECONDS = 2.0


class Announcer:
    """Tells what is new in a snapshot. For the loader's thread, which it never keeps for long.

    What can't be noted in the journal now, because its disk is full, say, is noted once that is possible. A daemon
    that is killed before it could note a change does so after the next start.
    """

    def __init__(self, telemetry: ServingTelemetry, history: History) -> None:
        self._telemetry = telemetry
        self._history = history
        self._noted = dict(history.serving())
        self._told: dict[str, int] = {}
        self._try_again_at = 0.0

    def publish(self, before: Snapshot, now: Snapshot) -> None:
        """`now` has taken the place of `before`. A model that is the same object in both has not changed."""
        changed = {name: model for name, model in now.models.items() if before.models.get(name) is not model}
        for name, model in changed.items():
            if model.serving and self._told.get(name) != model.serving:
                self._telemetry.serving_version(name, model.serving)
                self._told[name] = model.serving
        for name in before.models.keys() - now.models.keys():
            self._telemetry.forget_model(name)
            self._told.pop(name, None)
        self._note(now, changed)
        if time.monotonic() >= self._try_again_at:
            try:
                self._history.catch_up(_WAIT_SECONDS)
            except SQLAlchemyError:  # whoever watches the database tells of it
                self._try_again_at = time.monotonic() + _RETRY_SECONDS

    def _note(self, now: Snapshot, changed: Mapping[str, KnownModel]) -> None:
        for name, model in changed.items():
            previous = self._noted.get(name, 0)
            if model.serving not in (0, previous):  # none of a model that is there: it is being loaded
                reason = why(model.policy, previous, model.serving)
                self._history.add(Entry(name, Change.SERVING, model.serving, previous, reason=reason))
                self._noted[name] = model.serving
        for name in self._noted.keys() - now.models.keys():
            self._history.add(Entry(name, Change.SERVING, 0, self._noted.pop(name), reason="the model is gone"))
