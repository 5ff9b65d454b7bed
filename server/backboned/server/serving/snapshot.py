"""What is known and what is loaded, as one immutable value. Readers take a reference; the loader replaces it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from backboned.registry.answers import Answers
from backboned.registry.manifest import Manifest
from backboned.server.compute.stages import LoadedStage
from backboned.server.serving.budget import Arrival, Footprint
from backboned.server.serving.policy import Policy, candidates, shadow


class State(Enum):
    """Where a checkpoint is in its life."""

    AVAILABLE = "AVAILABLE"
    LOADING = "LOADING"
    SERVING = "SERVING"
    QUARANTINED = "QUARANTINED"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One epoch of one version in memory: its path of stages, the head last, and its `answers`, if any, on the device.

    Holding it keeps its stages alive; when the last holder lets go, what nobody else shares is freed. It equals nothing
    but itself.
    """

    manifest: Manifest
    path: tuple[LoadedStage, ...]
    shared: tuple[str, ...]
    answers: Answers | None = None

    @property
    def footprint(self) -> Footprint:
        """Its stages, each with the bytes that it takes now."""
        return {stage.key: stage.held_bytes for stage in self.path}

    def calibrated(self, logits: Tensor) -> Tensor:
        """`[n, outputs]` logits whose probabilities are as often right as they say, as far as that is known."""
        return logits if self.answers is None else logits / self.answers.temperature

    @property
    def sha256(self) -> str:
        """Of the checkpoint file that it was loaded from."""
        return self.manifest.best.sha256


@dataclass(frozen=True)
class KnownVersion:
    """A version on disk: its manifest, and what became of it; `arrival`: when it is loaded, if there is no room now."""

    manifest: Manifest
    state: State
    reason: str = ""
    loaded: LoadedModel | None = None
    arrival: Arrival | None = None

    @property
    def able(self) -> bool:
        """Whether it can answer: at once, or once it is loaded for whoever asks."""
        return self.loaded is not None or self.arrival is Arrival.ON_DEMAND


@dataclass(frozen=True)
class RefusedFile:
    """Something in the directory that can't be used, or isn't yet: `state` is QUARANTINED or LOADING."""

    model: str
    path: Path
    state: State
    reason: str
    size_bytes: int = 0
    create_time: float = 0.0


@dataclass(frozen=True)
class KnownModel:
    """A model: its versions by number, and the policy by which one of them answers by default."""

    name: str
    versions: Mapping[int, KnownVersion]
    policy: Policy = field(default_factory=Policy)

    @cached_property
    def default(self) -> LoadedModel | None:
        """What answers when no version is asked for: of the loaded ones, the first by policy.

        None if the one that should is loaded on demand: then it is to be loaded, and no other one answers for it.
        """
        return self.versions[self.serving].loaded if self.serving else None

    @cached_property
    def latest(self) -> LoadedModel | None:
        """The newest loaded version that is complete, else the newest, whatever the policy."""
        chosen = self.answering(Policy())
        return None if chosen is None else self.versions[chosen].loaded

    @cached_property
    def shadow(self) -> LoadedModel | None:
        """What sees the images that `default` answers, too."""
        loaded = {v: known.manifest for v, known in self.versions.items() if known.loaded is not None}
        number = shadow(loaded, self.policy, self.serving) if self.serving else None
        return None if number is None else self.versions[number].loaded

    @cached_property
    def serving(self) -> int:
        """The number of the version that answers by default, in memory or loaded on demand; 0 if there is none."""
        return self.answering(self.policy) or 0

    def answering(self, policy: Policy) -> int | None:
        """Which version `policy` answers with, in memory or loaded on demand; None: none can."""
        return next(iter(candidates(self._able, policy)), None)

    @cached_property
    def _able(self) -> Mapping[int, Manifest]:
        # What is complete is told by the manifest as it is now: it may have changed since the epoch was loaded.
        return {v: known.manifest for v, known in self.versions.items() if known.able}


@dataclass(frozen=True)
class Snapshot:
    """Everything that is known at one moment."""

    models: Mapping[str, KnownModel] = field(default_factory=lambda: MappingProxyType({}))
    refused: tuple[RefusedFile, ...] = ()
