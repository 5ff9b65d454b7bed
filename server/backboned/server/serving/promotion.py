"""Acting on outcomes: a shadow that is better is promoted, a version that is worse is called back."""

import asyncio
import contextlib
import logging

from sqlalchemy.exc import SQLAlchemyError

from backboned.registry.errors import BackbonedError
from backboned.server.serving.comparison import Tally, Verdict
from backboned.server.serving.outcomes import Outcomes
from backboned.server.serving.policy import VersionPolicy
from backboned.server.serving.snapshot import KnownModel
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.serving.versions import Versions

log = logging.getLogger(__name__)

_SECONDS = 0.5
ACTOR = "the daemon, by outcomes"


class Promoter:
    """Looks at the outcomes twice a second. For one event loop."""

    def __init__(self, versions: Versions, outcomes: Outcomes, telemetry: ServingTelemetry) -> None:
        self._versions = versions
        self._outcomes = outcomes
        self._telemetry = telemetry
        self._task: asyncio.Task[None] | None = None
        self._trouble: dict[str, str] = {}

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS)
            for model in list(self._versions.known().values()):
                try:
                    await self._consider(model)
                    self._trouble.pop(model.name, None)
                except Exception as error:  # whatever it is costs no other model its turn; it is tried again
                    if self._trouble.get(model.name) != str(error):
                        known = isinstance(error, BackbonedError | SQLAlchemyError)
                        log.warning("outcomes of %s can't be acted on: %s", model.name, error, exc_info=not known)
                    self._trouble[model.name] = str(error)

    async def _consider(self, model: KnownModel) -> None:
        if model.shadow is None:
            return
        shadow = model.shadow.manifest.version
        tally = self._outcomes.tally(model)
        verdict = tally.verdict
        if verdict is Verdict.OPEN:
            return
        reason = why(tally, model.serving, shadow)
        if model.policy.kind is VersionPolicy.PROMOTE_WHEN_BETTER and verdict is Verdict.BETTER:
            done = await self._versions.promote(model.name, shadow, model.serving, reason, ACTOR)
            result = "promoted"
        elif model.policy.kind is VersionPolicy.PROMOTE_WHEN_BETTER:
            done = await self._versions.reject(model.name, shadow, model.serving, reason, ACTOR)
            result = "rejected"
        elif model.policy.kind is VersionPolicy.ROLLBACK_WHEN_WORSE and verdict is Verdict.BETTER:
            await self._versions.roll_back(model.name, model.serving, reason, ACTOR)
            done, result = True, "rolled_back"
        else:
            return
        if done:
            log.info("%s: %s: %s", model.name, result, reason)
            self._telemetry.decided(model.name, result)


def why(tally: Tally, serving: int, shadow: int) -> str:
    """What the outcomes say, for the journal."""
    gain = tally.gain
    better, worse = (shadow, serving) if gain.value > 0 else (serving, shadow)
    low, high = sorted((abs(gain.low), abs(gain.high)))
    return (
        f"over {tally.shadow.count} outcomes version {better} has {abs(gain.value):.3f} less loss than version {worse} "
        f"({low:.3f} to {high:.3f})"
    )
