"""Telling metrics and the journal which version of each model serves."""

import logging
from collections.abc import Mapping

from sqlalchemy.exc import SQLAlchemyError

from backboned.server.serving.history import Change, Entry, History
from backboned.server.serving.policy import why
from backboned.server.serving.snapshot import KnownModel, Snapshot
from backboned.server.serving.telemetry import ServingTelemetry

log = logging.getLogger(__name__)


class Announcer:
    """Tells what is new in a snapshot. For the loader's thread.

    What can't be noted in the journal now, because its disk is full, say, is noted once that is possible. A daemon
    that is killed before it could note a change does so after the next start.
    """

    def __init__(self, telemetry: ServingTelemetry, history: History) -> None:
        self._telemetry = telemetry
        self._history = history
        self._noted = dict(history.serving())
        self._told: dict[str, int] = {}
        self._trouble = ""

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
        self._note(now, now.models if self._trouble else changed)

    def _note(self, now: Snapshot, changed: Mapping[str, KnownModel]) -> None:
        entries = []
        for name, model in changed.items():
            previous = self._noted.get(name, 0)
            if model.serving not in (0, previous):  # none of a model that is there: it is being loaded
                reason = why(model.policy, previous, model.serving)
                entries.append(Entry(name, Change.SERVING, model.serving, previous, reason=reason))
        gone = self._noted.keys() - now.models.keys()
        entries += [Entry(name, Change.SERVING, 0, self._noted[name], reason="the model is gone") for name in gone]
        if not entries:
            return
        try:
            self._history.add(*entries)
        except SQLAlchemyError as error:
            trouble = f"the journal can't be written: {error.orig if hasattr(error, 'orig') else error}"
            if trouble != self._trouble:
                log.error("%s", trouble)
            self._trouble = trouble
            return
        self._trouble = ""
        for entry in entries:
            self._noted[entry.model] = entry.version
            if not entry.version:
                del self._noted[entry.model]
