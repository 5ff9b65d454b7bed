"""From names to loaded models: which version is to answer, and why none can."""

import asyncio
from collections.abc import Sequence

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found
from backboned.registry.manifest import check_name
from backboned.server.serving.aliases import LATEST
from backboned.server.serving.calls import Target
from backboned.server.serving.decisions import share
from backboned.server.serving.loader import Loader, not_loaded
from backboned.server.serving.policy import candidates
from backboned.server.serving.records import Records
from backboned.server.serving.snapshot import KnownModel, KnownVersion, LoadedModel, State

_REFRESH_TIMEOUT_SECONDS = 10.0


class Chooser:
    """Finds what calls name. For one event loop."""

    def __init__(self, loader: Loader, records: Records) -> None:
        self._loader = loader
        self._records = records

    def knows(self, model: str) -> bool:
        """Whether there is such a model."""
        return model in self._loader.snapshot.models

    async def choose(self, targets: Sequence[Target]) -> tuple[LoadedModel, ...]:
        """The loaded versions that are to answer; looks at the directory once more before saying no.

        Raises `BackbonedError` for the first target that can't answer.
        """
        for target in targets:
            check_name(target.model)
        try:
            return tuple(map(self._find, targets))
        except BackbonedError as error:
            if error.kind not in (ErrorKind.NOT_FOUND, ErrorKind.UNAVAILABLE):
                raise
        future = asyncio.wrap_future(self._loader.refresh())
        await asyncio.wait([future], timeout=_REFRESH_TIMEOUT_SECONDS)
        future.cancel()
        return tuple(map(self._find, targets))

    def preprocessing(self, target: Target) -> Preprocessing | None:
        """How images for what a call names are prepared; none if it can't answer now."""
        try:
            return self._find(target).manifest.preprocessing
        except BackbonedError:
            return None

    def shadow(self, target: Target, model: LoadedModel) -> LoadedModel | None:
        """What is to see, beside `model`, what a call for `target` asks; only where that was the default's turn."""
        if target.version is not None or target.alias is not None:
            return None
        known = self._loader.snapshot.models.get(target.model)
        return known.shadow if known is not None and known.default is model else None

    def _find(self, target: Target) -> LoadedModel:
        snapshot = self._loader.snapshot
        model = snapshot.models.get(target.model)
        if model is None:
            refused = next((f for f in snapshot.refused if f.model == target.model), None)
            hint = f" ({refused.path.name} is there but {refused.state.value}: {refused.reason})" if refused else ""
            raise not_found("model", target.model, snapshot.models, field="model", hint=hint)
        if target.alias == LATEST:
            if (latest := model.latest) is None:
                raise _why_none(model)
            return latest
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
        if known.loaded is None:
            raise self._why_not(target.model, number, known)
        return known.loaded

    def _by_default(self, model: KnownModel, target: Target) -> LoadedModel:
        """Of the split of traffic, the version whose share the call falls into; the policy's, where there is none."""
        split = self._records.decisions.split(model.name)
        if split:
            number = self._records.aliases.of(model.name).get(share(split, model.name, target.sticky_key))
            known = None if number is None else model.versions.get(number)
            if known is not None and known.loaded is not None:
                return known.loaded
        if (default := model.default) is None:
            raise _why_none(model)
        return default

    def _why_not(self, model: str, number: int, known: KnownVersion) -> BackbonedError:
        if known.state is State.QUARANTINED:
            message = f"{model} version {number} is quarantined: {known.reason}"
            return BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="version")
        self._loader.want(model, number)
        return not_loaded(model, number)


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


def _why_none(model: KnownModel) -> BackbonedError:
    manifests = {v: known.manifest for v, known in model.versions.items()}
    first = next(iter(candidates(manifests, model.policy)), None)
    if first is None:
        what = (
            f"is pinned to version {model.policy.version}, which is gone" if model.policy.version else "has none left"
        )
        message = f"{model.name} has no version that can serve: it {what}; set its policy, or name a version"
        return BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="model")
    chosen = model.versions[first]
    if chosen.state is State.QUARANTINED:
        message = f"{model.name} has no version that can serve; version {first}: {chosen.reason}"
        return BackbonedError(ErrorKind.FAILED_PRECONDITION, message, field="model")
    return not_loaded(model.name, first)
