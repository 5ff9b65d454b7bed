"""What is changed about models: which version serves, aliases, traffic, what is kept. Each is in the journal."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from backboned.registry.errors import BackbonedError, ErrorKind, invalid, not_found
from backboned.server.serving.aliases import LATEST
from backboned.server.serving.budget import Arrival
from backboned.server.serving.deletions import Deletions
from backboned.server.serving.history import Change, Entry
from backboned.server.serving.loader import Loader, not_loaded
from backboned.server.serving.policy import NAMING, VersionPolicy, candidates
from backboned.server.serving.records import Records
from backboned.server.serving.snapshot import KnownModel, KnownVersion, Snapshot, State

log = logging.getLogger(__name__)

MAX_WEIGHT = 1_000_000

_LOAD_SECONDS = 30.0
_LOOK_SECONDS = 5.0
_PAUSE_SECONDS = 0.05


class Versions:
    """Changes of models. For one event loop; raises `BackbonedError`, and then nothing has been changed.

    Whatever is to serve is loaded first: no call finds it missing.
    """

    def __init__(
        self,
        loader: Loader,
        records: Records,
        deletions: Deletions,
        in_training: Callable[[str, int], Awaitable[bool]],
    ) -> None:
        """`in_training` tells whether a job that hasn't ended writes a version."""
        self._loader = loader
        self._deletions = deletions
        self._aliases = records.aliases
        self._decisions = records.decisions
        self._history = records.history
        self._in_training = in_training
        self._turn = asyncio.Lock()

    async def model(self, name: str) -> KnownModel:
        """The model called `name`; looks at the directory once more before saying no."""
        found = self._loader.snapshot.models.get(name)
        if found is None:
            models = (await self._look(name)).models
            found = models.get(name)
            if found is None:
                raise not_found("model", name, models, field="model")
        return found

    def known(self) -> Mapping[str, KnownModel]:
        """All models by name."""
        return self._loader.snapshot.models

    async def history(self, name: str | None = None) -> list[Entry]:
        """What has changed, of one model or of all, newest first."""
        return await asyncio.to_thread(self._history.entries, name)

    async def choose(self, name: str, kind: VersionPolicy, version: int | None, actor: str) -> KnownModel:
        """Set the policy of a model; those that name a version begin with `version`, or with what serves now."""
        async with self._turn:
            model = await self.model(name)
            if kind not in NAMING:
                if version is not None:
                    raise invalid(f"policy {kind.value} chooses the version itself: leave it out", field="version")
            else:
                version = (model.serving or None) if version is None else version
                if version is None:
                    raise invalid(f"{name} serves no version yet: name one", field="version")
                await self._load(name, version)
            entry = Entry(name, Change.POLICY, version or 0, subject=kind.value, actor=actor)
            await asyncio.to_thread(self._decisions.choose, name, kind, version, journal=[entry])
            return await self._changed(name)

    async def roll_back(self, name: str, expected: int | None, reason: str, actor: str) -> KnownModel:
        """Answer by the version that did before, and don't choose the present one again unless it is named."""
        async with self._turn:
            model = await self.model(name)
            serving = model.serving
            if expected is not None and expected != serving:
                raise BackbonedError(
                    ErrorKind.ABORTED,
                    f"{name} serves version {serving or 'none'}, not {expected}: read it again and retry",
                    field="expected_version",
                )
            served = await asyncio.to_thread(self._history.served, name)
            previous = before(model, served)
            if not serving or previous is None:
                raise BackbonedError(
                    ErrorKind.FAILED_PRECONDITION, f"{name} has no earlier version to go back to", field="model"
                )
            await self._load(name, previous)
            reason = reason or "it was rolled back"
            entry = Entry(name, Change.REJECTED, previous, serving, actor=actor, reason=reason)
            await asyncio.to_thread(self._decisions.reject, name, serving, reason, instead=previous, journal=[entry])
            return await self._changed(name)

    async def promote(self, name: str, version: int, instead_of: int, reason: str, actor: str) -> bool:
        """Answer by `version`, which is better, unless `instead_of` serves no more, or another policy holds."""
        async with self._turn:
            model = await self.model(name)
            if model.serving != instead_of or model.policy.kind is not VersionPolicy.PROMOTE_WHEN_BETTER:
                return False
            await self._load(name, version)
            entry = Entry(name, Change.PROMOTED, version, instead_of, actor=actor, reason=reason)
            await asyncio.to_thread(self._decisions.choose, name, model.policy.kind, version, journal=[entry])
            await self._changed(name)
            return True

    async def reject(self, name: str, version: int, serving: int, reason: str, actor: str) -> bool:
        """Never choose `version`, which is worse, unless `serving` serves no more, or another policy holds."""
        async with self._turn:
            model = await self.model(name)
            if model.serving != serving or model.policy.kind is not VersionPolicy.PROMOTE_WHEN_BETTER:
                return False
            entry = Entry(name, Change.REJECTED, serving, version, actor=actor, reason=reason)
            await asyncio.to_thread(self._decisions.reject, name, version, reason, instead=serving, journal=[entry])
            await self._changed(name)
            return True

    async def set_alias(self, name: str, alias: str, version: int, expected: int | None, actor: str) -> KnownModel:
        """Point an alias."""
        async with self._turn:
            _known(await self.model(name), version)
            previous = self._aliases.of(name).get(alias, 0)
            entry = Entry(name, Change.ALIAS, version, previous, subject=alias, actor=actor)
            await asyncio.to_thread(self._aliases.set, name, alias, version, expected, journal=[entry])
            return await self._changed(name)

    async def delete_alias(self, name: str, alias: str, expected: int | None, actor: str) -> KnownModel:
        """Remove an alias that no traffic goes to."""
        async with self._turn:
            await self.model(name)
            if alias in self._decisions.split(name):
                raise BackbonedError(
                    ErrorKind.FAILED_PRECONDITION, f"traffic of {name} goes to {alias!r}: divide it otherwise first"
                )
            previous = self._aliases.of(name).get(alias, 0)
            entry = Entry(name, Change.ALIAS, 0, previous, subject=alias, actor=actor)
            await asyncio.to_thread(self._aliases.delete, name, alias, expected, journal=[entry])
            return await self._changed(name)

    async def divide(self, name: str, split: Mapping[str, int], actor: str) -> KnownModel:
        """Divide the calls that name no version between aliases by weight; by nothing: not any more."""
        async with self._turn:
            await self.model(name)
            aliases = self._aliases.of(name)
            for alias, weight in split.items():
                if alias == LATEST or alias not in aliases:
                    raise not_found(f"alias of {name}", alias, aliases, field="weights")
                if not 1 <= weight <= MAX_WEIGHT:
                    raise invalid(f"the weight of {alias!r} is {weight}; give 1…{MAX_WEIGHT}", field="weights")
                await self._load(name, aliases[alias])
            text = ", ".join(f"{alias} {weight}" for alias, weight in sorted(split.items()))
            entry = Entry(name, Change.TRAFFIC, subject=text, actor=actor)
            await asyncio.to_thread(self._decisions.divide, name, split, journal=[entry])
            return await self._changed(name)

    async def delete(self, name: str, version: int, actor: str, reason: str = "") -> None:
        """Delete a version and its files, unless it serves, is about to, has an alias or is being trained."""
        async with self._turn:
            model = await self.model(name)
            _known(model, version)
            use = self._use_of(model, version)
            if use or await self._in_training(name, version):
                raise BackbonedError(
                    ErrorKind.FAILED_PRECONDITION,
                    f"version {version} of {name} {use or 'is being trained'}: it is kept",
                    field="version",
                )
            try:
                await asyncio.to_thread(self._deletions.delete, name, version, actor=actor, reason=reason)
            except OSError as error:
                raise BackbonedError(
                    ErrorKind.FAILED_PRECONDITION,
                    f"version {version} of {name} can't be deleted: {error.strerror or error}",
                    field="version",
                ) from error
            await self._look(name)

    async def finish_deletions(self) -> bool:
        """Finish what was being deleted when the daemon was killed, or couldn't be; tells whether nothing is left."""
        async with self._turn:
            return await asyncio.to_thread(self._deletions.finish)

    async def sweep(self, keep: int, max_age_seconds: float) -> None:
        """Delete what is neither among the newest `keep` versions of its model nor younger than the age given.

        A 0 means that this doesn't matter; both: nothing is deleted. What is in use is kept.
        """
        for model in list(self._loader.snapshot.models.values()):
            served = await asyncio.to_thread(self._history.served, model.name)
            spared = {model.serving, before(model, served)}
            for version in expired(model, keep=keep, max_age_seconds=max_age_seconds, now=time.time()):
                in_use = version in spared or self._use_of(model, version)
                if not in_use and not await self._in_training(model.name, version):
                    try:
                        await self.delete(model.name, version, "", "it is older than what is to be kept")
                    except BackbonedError as error:  # a folder that may only be read, say: others may do
                        log.warning("%s", error.message)

    def _use_of(self, model: KnownModel, version: int) -> str:
        """What keeps a version from being deleted; empty if nothing does."""
        manifests = {v: known.manifest for v, known in model.versions.items()}
        pointing = sorted(a for a, v in self._aliases.of(model.name).items() if v == version)
        if version in (model.serving, model.policy.version, *candidates(manifests, model.policy)[:1]):
            return "serves"
        if model.shadow is not None and model.shadow.manifest.version == version:
            return "is compared with the one that serves"
        return f"has the alias {pointing[0]!r}" if pointing else ""

    async def _load(self, name: str, version: int) -> None:
        """See that a version is in memory."""
        deadline = time.monotonic() + _LOAD_SECONDS
        while True:
            known = _known(self._loader.snapshot.models[name], version)
            if known.state is State.QUARANTINED:
                raise BackbonedError(
                    ErrorKind.FAILED_PRECONDITION,
                    f"version {version} of {name} is quarantined: {known.reason}",
                    field="version",
                )
            if known.arrival is Arrival.NEVER:
                raise BackbonedError(
                    ErrorKind.FAILED_PRECONDITION,
                    f"version {version} of {name} can't be loaded: {known.reason}",
                    field="version",
                )
            if known.loaded is not None:
                return
            if time.monotonic() > deadline:
                raise not_loaded(name, version)
            self._loader.want(name, version)
            await self._look(name)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _look(self, name: str) -> Snapshot:
        future = asyncio.wrap_future(self._loader.refresh({name}))
        await asyncio.wait([future], timeout=_LOOK_SECONDS)
        future.cancel()
        return self._loader.snapshot

    async def _changed(self, name: str) -> KnownModel:
        """The model once the loader has taken the change in."""
        await self._look(name)
        return await self.model(name)


def before(model: KnownModel, served: Sequence[int]) -> int | None:
    """The version to go back to from the one that serves: the one that did last, of those that still can.

    `served` are those that did, newest first. Without any, the newest complete one that is older.
    """

    def can(version: int) -> bool:
        known = model.versions.get(version)
        return known is not None and known.manifest.complete and known.state is not State.QUARANTINED

    others = [v for v in (*served, *sorted(model.versions, reverse=True)) if v != model.serving]
    usable = [v for v in others if can(v) and v not in model.policy.rejected]
    earlier = [v for v in usable if v in served or v < model.serving]
    return next(iter(earlier), None)


def expired(model: KnownModel, *, keep: int, max_age_seconds: float, now: float) -> list[int]:
    """The versions that are neither among the newest `keep` nor younger than `max_age_seconds`; 0: any may be."""
    if not keep and not max_age_seconds:
        return []
    complete = sorted((v for v, known in model.versions.items() if known.manifest.complete), reverse=True)
    old = complete[keep:] if keep else complete
    return [
        v for v in old if not max_age_seconds or now - model.versions[v].manifest.best.create_time > max_age_seconds
    ]


def _known(model: KnownModel, version: int) -> KnownVersion:
    known = model.versions.get(version)
    if known is None:
        raise not_found(f"version of {model.name}", str(version), [str(v) for v in model.versions], field="version")
    return known
