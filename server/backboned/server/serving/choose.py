"""From names to loaded models: which version is to answer, and why none can."""

import asyncio
import time
from collections.abc import Sequence
from typing import NoReturn, overload

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found
from backboned.registry.manifest import check_name
from backboned.server.serving.aliases import LATEST
from backboned.server.serving.budget import Arrival
from backboned.server.serving.calls import Target
from backboned.server.serving.decisions import share
from backboned.server.serving.loader import Loader, not_loaded
from backboned.server.serving.policy import Policy, candidates
from backboned.server.serving.records import Records
from backboned.server.serving.snapshot import KnownModel, KnownVersion, LoadedModel, Snapshot, State
from backboned.server.serving.telemetry import ServingTelemetry

_PATIENCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.02


class _NotInMemory(BackbonedError):
    """A version that is loaded now that somebody asks for it."""

    def __init__(self, error: BackbonedError) -> None:
        super().__init__(error.kind, error.message, retry_delay_seconds=error.retry_delay_seconds)


class Chooser:
    """Finds what calls name. For one event loop."""

    def __init__(self, loader: Loader, records: Records, telemetry: ServingTelemetry) -> None:
        self._loader = loader
        self._records = records
        self._telemetry = telemetry

    def knows(self, model: str) -> bool:
        """Whether there is such a model."""
        return model in self._loader.snapshot.models

    async def choose(self, targets: Sequence[Target], patience_seconds: float | None = None) -> tuple[LoadedModel, ...]:
        """The loaded versions that are to answer; looks at the directory once more before saying no.

        One that is known and not in memory is loaded meanwhile. Raises `BackbonedError` for the first target that can't
        answer.
        """
        for target in targets:
            check_name(target.model)
        try:
            return self._found(targets, self._loader.snapshot)
        except BackbonedError as error:
            if error.kind not in (ErrorKind.NOT_FOUND, ErrorKind.UNAVAILABLE):
                raise
            cold = isinstance(error, _NotInMemory)
        started = time.monotonic()
        patience = _PATIENCE_SECONDS if patience_seconds is None else min(_PATIENCE_SECONDS, patience_seconds)
        deadline = started + patience
        while True:
            # What a look has loaded for this call is there at its end, even if the next look makes room for others.
            snapshot = await self._look(targets, deadline - time.monotonic())
            try:
                found = self._found(targets, snapshot)
            except _NotInMemory:
                if time.monotonic() + _PAUSE_SECONDS > deadline:
                    raise
                cold = True
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            if cold:
                self._telemetry.cold_call(time.monotonic() - started)
            return found

    def _found(self, targets: Sequence[Target], snapshot: Snapshot) -> tuple[LoadedModel, ...]:
        return tuple(self._find(target, snapshot) for target in targets)

    async def _look(self, targets: Sequence[Target], patience_seconds: float) -> Snapshot:
        future = asyncio.wrap_future(self._loader.refresh({target.model for target in targets}))
        done, _ = await asyncio.wait([future], timeout=max(0.0, patience_seconds))
        future.cancel()
        return future.result() if done else self._loader.snapshot

    def preprocessing(self, target: Target) -> Preprocessing | None:
        """How images for what a call names are prepared; none if it can't answer now."""
        try:
            return self._find(target, self._loader.snapshot).manifest.preprocessing
        except BackbonedError:
            return None

    def shadow(self, target: Target, model: LoadedModel) -> LoadedModel | None:
        """What is to see, beside `model`, what a call for `target` asks; only where that was the default's turn."""
        if target.version is not None or target.alias is not None:
            return None
        known = self._loader.snapshot.models.get(target.model)
        return known.shadow if known is not None and known.default is model else None

    def _find(self, target: Target, snapshot: Snapshot) -> LoadedModel:
        model = snapshot.models.get(target.model)
        if model is None:
            refused = next((f for f in snapshot.refused if f.model == target.model), None)
            hint = f" ({refused.path.name} is there but {refused.state.value}: {refused.reason})" if refused else ""
            raise not_found("model", target.model, snapshot.models, field="model", hint=hint)
        if target.alias == LATEST:
            return self._asked_for(model.latest) or self._load_first(model, Policy())
        number = target.version
        if target.alias is not None:
            aliases = self._records.aliases.of(target.model)
            if target.alias not in aliases:
                raise not_found(f"alias of {target.model}", target.alias, [*aliases, LATEST], field="alias")
            number = aliases[target.alias]
        if number is None:
            return self._by_default(model, target)
        known = model.versions.get(number)
        if known is None:
            versions = [str(v) for v in model.versions]
            raise not_found(f"version of {target.model}", str(number), versions, field="version")
        return self._asked_for(known.loaded) or self._load(target.model, number, known)

    def _by_default(self, model: KnownModel, target: Target) -> LoadedModel:
        """Of the split of traffic, the version whose share the call falls into; the policy's, where there is none."""
        split = self._records.decisions.split(model.name)
        if split:
            number = self._records.aliases.of(model.name).get(share(split, model.name, target.sticky_key))
            known = None if number is None else model.versions.get(number)
            if known is not None and known.loaded is not None:
                return self._asked_for(known.loaded)
            if known is not None and number is not None and known.able:
                self._load(model.name, number, known)
        return self._asked_for(model.default) or self._load_first(model, model.policy)

    @overload
    def _asked_for(self, model: LoadedModel) -> LoadedModel: ...
    @overload
    def _asked_for(self, model: LoadedModel | None) -> LoadedModel | None: ...
    def _asked_for(self, model: LoadedModel | None) -> LoadedModel | None:
        if model is not None:
            self._loader.note_use(model.manifest.model, model.manifest.version)
        return model

    def _load(self, model: str, number: int, known: KnownVersion) -> NoReturn:
        """Have a version loaded, and raise the error for one that isn't yet, or can't be."""
        if known.state is State.QUARANTINED:
            message = f"{model} version {number} is quarantined: {known.reason}"
            raise BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="version")
        if known.arrival is Arrival.NEVER:
            message = f"{model} version {number} can't be loaded: {known.reason}"
            raise BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="version")
        self._loader.want(model, number)
        error = not_loaded(model, number, known.reason)
        soon = known.arrival is not None or (known.state is State.LOADING and not known.reason)
        raise _NotInMemory(error) if soon else error

    def _load_first(self, model: KnownModel, policy: Policy) -> NoReturn:
        """The same for the version that a policy chooses."""
        manifests = {v: known.manifest for v, known in model.versions.items()}
        first = model.answering(policy) or next(iter(candidates(manifests, policy)), None)
        if first is None:
            gone = f"is pinned to version {policy.version}, which is gone" if policy.version else "has none left"
            message = f"{model.name} has no version that can serve: it {gone}; set its policy, or name a version"
            raise BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="model")
        chosen = model.versions[first]
        if chosen.state is State.QUARANTINED:
            message = f"{model.name} has no version that can serve; version {first}: {chosen.reason}"
            raise BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="model")
        self._load(model.name, first, chosen)


def tap_of(model: LoadedModel, stage: str, wanted: bool) -> int | None:
    """The place in the model's path whose pooled output is the embedding: `stage`, or what the head reads, if `wanted`.

    Raises `BackbonedError` for a stage that the model doesn't have.
    """
    names = [s.key.stage for s in model.path[:-1]]
    if stage and stage not in names:
        raise invalid(
            f"{model.manifest.model} has no stage {stage!r} to embed: it stands on {model.path[0].key.backbone}, "
            f"which has {', '.join(names)}",
            field="embedding_stage",
        )
    return names.index(stage) if stage else len(names) - 1 if wanted else None
