"""What the loader knows of the checkpoint directory, and how that becomes a snapshot. No threads, no clock."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from backboned.registry.adoption import Before
from backboned.registry.directory import CheckpointDirectory, Tombstone
from backboned.registry.errors import BackbonedError
from backboned.registry.look import Drop, Seen, Signature, look_alike, model_of
from backboned.registry.manifest import MANIFEST_NAME, Manifest
from backboned.registry.signatures import signature_path
from backboned.server.serving.budget import Arrival, Footprint
from backboned.server.serving.plan import DropState, Known, KnownDrop, Load, OutOfMemory, Plan, VersionKey
from backboned.server.serving.policy import Policy
from backboned.server.serving.snapshot import KnownModel, KnownVersion, LoadedModel, RefusedFile, Snapshot, State


@dataclass(frozen=True)
class Quarantine:
    """Why a version isn't served; lifted when its manifest, or its file or who signed that, is no longer as it was."""

    reason: str
    manifest: Signature
    file: tuple[Signature | None, ...]


Models = Set[str] | None
"""Some models by name, or all there are."""


@dataclass
class Library:
    """The loader's memory. For the loader's thread only; `snapshot` gives everyone else an immutable copy.

    `measure` tells what a version would take in memory.
    """

    directory: CheckpointDirectory
    measure: Callable[[Manifest], Footprint] = lambda _: {}
    signatures: dict[VersionKey, Signature] = field(default_factory=dict)
    manifests: dict[VersionKey, Manifest] = field(default_factory=dict)
    loaded: dict[VersionKey, LoadedModel] = field(default_factory=dict)
    quarantine: dict[VersionKey, Quarantine] = field(default_factory=dict)
    drops: dict[Path, KnownDrop] = field(default_factory=dict)
    refused: dict[Path, str] = field(default_factory=dict)
    loading: set[VersionKey] = field(default_factory=set)
    fetching: set[str] = field(default_factory=set)
    out: Mapping[VersionKey, OutOfMemory] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    deleted: dict[VersionKey, Tombstone] = field(default_factory=dict)
    _footprints: dict[VersionKey, tuple[Manifest, Footprint]] = field(default_factory=dict)
    _models: dict[str, KnownModel] = field(default_factory=dict)
    _versions: dict[VersionKey, tuple[object, KnownVersion]] = field(default_factory=dict)
    _changed: set[VersionKey] = field(default_factory=set)
    _notable: Set[VersionKey] = frozenset()
    _fetching: bool = False

    def update(self, seen: Seen, now: float, closed: Iterable[Path] = ()) -> None:
        """Take in what one look found: read new manifests, note changed files, forget what is gone.

        `closed` are files that whoever wrote them has closed since the last look. Of a model that can't be looked at,
        nothing is forgotten.
        """
        self.refused = dict(seen.refused)
        for key in self._looked_at(seen):
            before, signature = self.signatures.get(key), seen.versions.get(key)
            if signature is not None:
                if before is not signature and before != signature:
                    self._read_manifest(key, signature)
            elif before is not None and not self._is_out_of_sight(key, seen):
                self._forget(key)
        for key in seen.deleted - self.deleted.keys():
            self.deleted[key] = self.directory.tombstone(*key)
        models = seen.models
        for key, entry in list(self.quarantine.items()):
            if models is not None and key[0] not in models:
                continue
            changed = entry.manifest != self.signatures.get(key) or entry.file != self._file_signature(key)
            if changed and key[0] not in seen.unreadable:
                del self.quarantine[key]
        unseen = {path: known for path, known in self.drops.items() if known.drop.model in seen.unreadable}
        self.drops = unseen | {path: self._drop(path, seen, now) for path in seen.drops}
        for path in self.drops.keys() & set(closed):
            self.drops[path] = replace(self.drops[path], closed=True)

    def known(
        self,
        wanted: frozenset[VersionKey],
        used: Mapping[VersionKey, float] = MappingProxyType({}),
        models: Models = None,
    ) -> Known:
        """What the plan needs to know: also which versions are `wanted`, and when each was `used` last."""
        manifests = {key: manifest for key, manifest in self.manifests.items() if models is None or key[0] in models}
        loaded = {key: model for key, model in self.loaded.items() if models is None or key[0] in models}
        return Known(
            used=used,
            footprint=self._footprint,
            held={key: model.footprint for key, model in loaded.items()},
            manifests=manifests,
            loaded={key: model.sha256 for key, model in loaded.items()},
            quarantined=self.quarantine.keys(),
            drops=self.drops,
            wanted=wanted,
            policies=self.policies,
        )

    def intend(self, todo: Plan, models: Models = None) -> None:
        """Note what is about to be loaded, and what there is no room for."""
        loading = {(a.manifest.model, a.manifest.version) for a in todo.actions if isinstance(a, Load)}
        loading |= set() if models is None else {key for key in self.loading if key[0] not in models}
        # What was loaded on demand and now is being loaded: until it is there, nothing else answers for it.
        coming = {key: told for key, told in self.out.items() if told.arrival is Arrival.ON_DEMAND and key in loading}
        self.loading, self.out, self.fetching = loading, {**coming, **todo.out}, set()
        for key in self._footprints.keys() - self.loading - self.out.keys():
            del self._footprints[key]

    def add(self, model: LoadedModel) -> None:
        """Take in a version that was written and loaded just now, before the next look finds it."""
        key = (model.manifest.model, model.manifest.version)
        signature = Signature.of(self.directory.version(*key) / MANIFEST_NAME)
        if signature is not None:
            self.signatures[key], self.manifests[key], self.loaded[key] = signature, model.manifest, model
            self._changed.add(key)

    def refuse(self, key: VersionKey, reason: str) -> None:
        """Quarantine a version as it is now."""
        self.quarantine[key] = Quarantine(reason, self.signatures[key], self._file_signature(key))

    def settle(self, path: Path, state: DropState, reason: str = "") -> None:
        """Note what a look into a dropped file has found."""
        known = self.drops[path]
        self.drops[path] = replace(known, state=state, reason=reason, attempts=known.attempts + 1)

    def adopted(self, model: str, name: str) -> Manifest | None:
        """The newest version that was adopted from the file of this name."""
        found = [m for k, m in self.manifests.items() if k[0] == model and m.adopted_from == name]
        return max(found, key=lambda m: m.version, default=None)

    def before(self, drop: Drop) -> Before:
        """What was adopted before from the file of this name."""
        gone = (told for told in self._deleted_from(drop) if look_alike(told.adopted_key, drop.key))
        return Before(
            self.adopted(drop.model, drop.path.name),
            {told.sha256 for told in gone},
            {version for model, version in (*self.manifests, *self.deleted) if model == drop.model},
        )

    def unsettled(self) -> set[str]:
        """The models of which there are dropped files to look into."""
        return {known.drop.model for known in self.drops.values() if known.state is DropState.WAITING}

    def snapshot(self, models: Models = None) -> Snapshot:
        """An immutable copy for everyone else, where of nothing but these `models` anything has changed.

        A model, or a version, of which all is as it was is the same object as before.
        """
        told: dict[str, dict[int, KnownVersion]] = {}
        for key in sorted(self._to_tell(models)):
            name, version = key
            versions = told.get(name)
            if versions is None:
                known = self._models.get(name)
                versions = told[name] = {} if known is None else dict(known.versions)
            if (manifest := self.manifests.get(key)) is None:
                versions.pop(version, None)
            else:
                versions[version] = self._version(key, manifest)
        for name, model in self._models.items():
            if name not in told and (models is None or name in models) and model.policy != self._policy(name):
                told[name] = dict(model.versions)
        if told:
            there = self._models | {name: self._model(name, versions) for name, versions in told.items()}
            self._models = {name: model for name, model in sorted(there.items()) if model.versions}
        refused = [*self._refused_versions(), *self._refused_drops()]
        refused += [RefusedFile(self._model_of(p), p, State.QUARANTINED, r) for p, r in sorted(self.refused.items())]
        return Snapshot(MappingProxyType(self._models), tuple(refused))

    def _looked_at(self, seen: Seen) -> Set[VersionKey]:
        """The versions that may not be what they were before this look. A model may have thousands of others."""
        if seen.parts is None:
            return self.signatures.keys() | seen.versions.keys()
        whole = {model for model, version in seen.parts if version is None}
        keys = {(model, version) for model, version in seen.parts if version is not None}
        if whole:
            keys.update(key for known in (self.signatures, seen.versions) for key in known if key[0] in whole)
        return keys

    def _is_out_of_sight(self, key: VersionKey, seen: Seen) -> bool:
        return key[0] in seen.unreadable or self.directory.version(*key) in seen.unseen

    def _to_tell(self, models: Models) -> Set[VersionKey]:
        """The versions of these models of which something else may be to tell than at the last time."""
        notable = self.loaded.keys() | self.quarantine.keys() | self.loading | self.out.keys()
        keys = self._changed | notable | self._notable
        if self.fetching or self._fetching:
            keys |= self.manifests.keys()
        if models is not None:
            keys = {key for key in keys if key[0] in models}
        self._changed -= keys
        self._notable = (self._notable - keys) | (notable & keys)
        self._fetching = bool(self.fetching) or (models is not None and self._fetching)
        return keys

    def _model_of(self, path: Path) -> str:
        return _text(model_of(self.directory.root, path))

    def _model(self, name: str, versions: dict[int, KnownVersion]) -> KnownModel:
        before, policy = self._models.get(name), self._policy(name)
        if before is not None and before.policy == policy and before.versions == versions:
            return before
        return KnownModel(name, MappingProxyType(versions), policy)

    def _policy(self, name: str) -> Policy:
        return self.policies.get(name, Policy())

    def _forget(self, key: VersionKey) -> None:
        del self.signatures[key]
        for known in (self.manifests, self.quarantine, self._footprints, self._versions):
            known.pop(key, None)
        self._changed.add(key)

    def _read_manifest(self, key: VersionKey, signature: Signature) -> None:
        self.signatures[key] = signature
        self.quarantine.pop(key, None)
        self._changed.add(key)
        try:
            self.manifests[key] = Manifest.read(self.directory.version(*key))
        except BackbonedError as error:
            # What serves keeps serving: a manifest that was readable before stays until it is readable again.
            self.refuse(key, error.message)

    def _file_signature(self, key: VersionKey) -> tuple[Signature | None, ...]:
        manifest = self.manifests.get(key)
        path = self.directory.version(*key) / (manifest.best.file if manifest else MANIFEST_NAME)
        try:
            return Signature.of(path), Signature.of(signature_path(path))
        except OSError:
            return (None,)

    def _deleted_from(self, drop: Drop) -> list[Tombstone]:
        return [
            told for key, told in self.deleted.items() if key[0] == drop.model and told.adopted_from == drop.path.name
        ]

    def _drop(self, path: Path, seen: Seen, now: float) -> KnownDrop:
        drop = seen.drops[path]
        known = self.drops.get(path)
        if known is not None and known.drop == drop:
            return known
        if known is None:  # seen for the first time since the start: what was adopted before isn't read again
            adopted = self.adopted(drop.model, path.name)
            gone = any(told.adopted_key == drop.key for told in self._deleted_from(drop))
            if gone or (adopted is not None and adopted.adopted_key == drop.key):
                return KnownDrop(drop, now, DropState.ADOPTED)
        return KnownDrop(drop, now)

    def _version(self, key: VersionKey, manifest: Manifest) -> KnownVersion:
        loading = key in self.loading and (manifest.backbone in self.fetching or "now")
        told = (manifest, self.loaded.get(key), self.quarantine.get(key), loading, self.out.get(key))
        before = self._versions.get(key)
        if before is None or before[0] != told:
            before = self._versions[key] = told, self._known_version(key, manifest)
        return before[1]

    def _known_version(self, key: VersionKey, manifest: Manifest) -> KnownVersion:
        loaded = self.loaded.get(key)
        entry = self.quarantine.get(key)
        if entry is not None:
            return KnownVersion(manifest, State.QUARANTINED, entry.reason, loaded)
        if loaded is not None:
            return KnownVersion(manifest, State.SERVING, loaded=loaded)
        out = self.out.get(key)
        if manifest.backbone in self.fetching:
            return KnownVersion(manifest, State.LOADING, f"the weights of {manifest.backbone} are being fetched")
        state = State.LOADING if key in self.loading else State.AVAILABLE
        return KnownVersion(manifest, state, out.reason if out else "", None, out.arrival if out else None)

    def _footprint(self, key: VersionKey) -> Footprint:
        manifest = self.manifests[key]
        known = self._footprints.get(key)
        if known is None or known[0] is not manifest:
            known = self._footprints[key] = manifest, self.measure(manifest)
        return known[1]

    def _refused_versions(self) -> list[RefusedFile]:
        """Versions whose manifest can't be read: nothing else is known of them."""
        return [
            RefusedFile(key[0], self.directory.version(*key) / MANIFEST_NAME, State.QUARANTINED, entry.reason)
            for key, entry in sorted(self.quarantine.items())
            if key not in self.manifests
        ]

    def _refused_drops(self) -> list[RefusedFile]:
        states = {DropState.WAITING: State.LOADING, DropState.QUARANTINED: State.QUARANTINED}
        return [
            RefusedFile(
                known.drop.model,
                path,
                states[known.state],
                known.reason,
                known.drop.signature.size_bytes,
                known.drop.signature.mtime_ns / 1e9,
            )
            for path, known in sorted(self.drops.items())
            if known.state in states
        ]


def _text(name: str) -> str:
    """A folder's name as text, even where it is none."""
    return name.encode("utf-8", "replace").decode()
