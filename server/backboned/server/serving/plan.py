"""What to do about a checkpoint directory: a pure function from what is seen and known to actions.

    look → read manifests → plan → act → publish a snapshot

Nothing here touches a disk, a clock or a thread.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from backboned.registry.directory import Drop
from backboned.registry.manifest import Manifest
from backboned.server.serving.policy import Policy, candidates, shadow

QUIET_SECONDS = 0.2
"""A dropped file must have stood still so long before it is first looked into."""

VersionKey = tuple[str, int]


class DropState(Enum):
    """What became of a dropped file."""

    WAITING = "waiting"
    ADOPTED = "adopted"
    QUARANTINED = "quarantined"


@dataclass(frozen=True)
class KnownDrop:
    """A dropped file as it was when last looked at. Times are of a monotonic clock, in seconds.

    `attempts` counts the looks into it since it last changed, at `still_since`.
    """

    drop: Drop
    still_since: float
    state: DropState = DropState.WAITING
    reason: str = ""
    attempts: int = 0


@dataclass(frozen=True)
class Adopt:
    """Look into a dropped file; on failure, wait for it to be mended unless this look is the `final` one."""

    drop: Drop
    final: bool


@dataclass(frozen=True)
class Load:
    """Load a version's best epoch, in place of whichever of its epochs is loaded."""

    manifest: Manifest


@dataclass(frozen=True)
class Retire:
    """Stop serving a version."""

    key: VersionKey


Action = Adopt | Load | Retire


@dataclass(frozen=True)
class Plan:
    """What to do now, in order, and when to look again at the latest (None: at the next regular look)."""

    actions: tuple[Action, ...] = ()
    look_again_at: float | None = None


@dataclass(frozen=True)
class Known:
    """What the loader knows: readable manifests, sha256 of what is loaded, versions that were refused, and policies."""

    manifests: Mapping[VersionKey, Manifest] = field(default_factory=dict)
    loaded: Mapping[VersionKey, str] = field(default_factory=dict)
    quarantined: Set[VersionKey] = frozenset()
    drops: Mapping[Path, KnownDrop] = field(default_factory=dict)
    wanted: Set[VersionKey] = frozenset()
    policies: Mapping[str, Policy] = field(default_factory=dict)


def plan(known: Known, *, now: float, settle_seconds: float, max_loaded_versions: int) -> Plan:
    """The actions that bring what is loaded to what should be: for each model its newest versions and the wanted ones.

    And the version that its policy chooses, with the one that answers until that is loaded, and its shadow.

    Versions that are to serve come first, then the newest, dropped files last. What is quarantined isn't loaded; what
    serves of it, an earlier epoch or an older version, serves on.
    """
    desired, first = _desired(known, max_loaded_versions)
    retire = [Retire(key) for key in known.loaded if key not in desired]
    load = [
        Load(known.manifests[key])
        for key in sorted(desired - known.quarantined, key=lambda k: (k not in first, -k[1], k[0]))
        if known.loaded.get(key) != known.manifests[key].best.sha256
    ]
    adopt, waits = [], []
    for entry in known.drops.values():
        if entry.state is not DropState.WAITING:
            continue
        deadline = entry.still_since + settle_seconds
        due = entry.still_since + QUIET_SECONDS if entry.attempts == 0 else deadline
        if now >= due:
            adopt.append(Adopt(entry.drop, final=now >= deadline))
        else:
            waits.append(due)
    return Plan((*load, *adopt, *retire), min(waits, default=None))


def _desired(known: Known, max_loaded_versions: int) -> tuple[set[VersionKey], set[VersionKey]]:
    """What should be loaded, and what of it is to answer by default."""
    by_model: dict[str, dict[int, Manifest]] = {}
    usable = {key for key in known.manifests if key not in known.quarantined or key in known.loaded}
    for model, version in usable:
        by_model.setdefault(model, {})[version] = known.manifests[model, version]
    desired, first = set(known.wanted & usable), set[VersionKey]()
    for model, versions in by_model.items():
        desired.update((model, v) for v in sorted(versions, reverse=True)[:max_loaded_versions])
        policy = known.policies.get(model, Policy())
        chosen = [(model, v) for v in candidates(versions, policy)]
        # A version in training must not push out the one that serves…
        first.update(chosen[:1])
        # …nor one that isn't loaded yet, and may never be.
        desired.update([key for key in chosen if key in known.loaded][:1])
        if chosen and (other := shadow(versions, policy, chosen[0][1])) is not None:
            desired.add((model, other))
    return desired | first, first
