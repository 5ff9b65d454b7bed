"""What to do about a checkpoint directory: a pure function from what is seen and known to actions.

    look → read manifests → plan → act → publish a snapshot

Nothing here touches a disk, a clock or a thread.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from backboned.registry.look import Drop
from backboned.registry.manifest import Manifest
from backboned.server.serving.budget import Arrival, Footprint, Wish, fit
from backboned.server.serving.policy import Policy, candidates, shadow

QUIET_SECONDS = 0.2
"""A dropped file must have stood still so long before it is first looked into, unless its writer has closed it."""

IDLE_SECONDS = 60.0
"""Where memory holds either a version or the one that is to take its place, the old one goes first if nobody has asked
for it so long: whoever asks meanwhile waits for the new one."""

VersionKey = tuple[str, int]


class DropState(Enum):
    """What became of a dropped file."""

    WAITING = "waiting"
    ADOPTED = "adopted"
    QUARANTINED = "quarantined"


@dataclass(frozen=True)
class KnownDrop:
    """A dropped file as it was when last looked at. Times are of a monotonic clock, in seconds.

    `attempts` counts the looks into it since it last changed, at `still_since`; `closed`: since then whoever wrote it
    has closed it, or renamed it to what it is.
    """

    drop: Drop
    still_since: float
    state: DropState = DropState.WAITING
    reason: str = ""
    attempts: int = 0
    closed: bool = False


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
    """Take a version out of memory; `evicted`: for want of room, and not because nobody needs it there."""

    key: VersionKey
    evicted: bool = False


Action = Adopt | Load | Retire


@dataclass(frozen=True)
class OutOfMemory:
    """Why a version that should be in memory isn't, and when it comes."""

    reason: str
    arrival: Arrival


@dataclass(frozen=True)
class Plan:
    """What to do now, in order, and when to look again at the latest (None: at the next regular look).

    `out` tells what there is no room for.
    """

    actions: tuple[Action, ...] = ()
    look_again_at: float | None = None
    out: Mapping[VersionKey, OutOfMemory] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What the loader knows: readable manifests, sha256 of what is loaded, versions that were refused, and policies.

    `used` has the moment at which each version was last asked for, on a monotonic clock. `footprint` tells that of a
    manifest's best epoch, `held` has those of what is loaded.
    """

    manifests: Mapping[VersionKey, Manifest] = field(default_factory=dict)
    loaded: Mapping[VersionKey, str] = field(default_factory=dict)
    quarantined: Set[VersionKey] = frozenset()
    drops: Mapping[Path, KnownDrop] = field(default_factory=dict)
    wanted: Set[VersionKey] = frozenset()
    policies: Mapping[str, Policy] = field(default_factory=dict)
    used: Mapping[VersionKey, float] = field(default_factory=dict)
    footprint: Callable[[VersionKey], Footprint] = lambda _: {}
    held: Mapping[VersionKey, Footprint] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How long (seconds) an unfinished file is waited for, how many versions of a model to keep, in how many bytes."""

    settle_seconds: float = 5.0
    max_loaded_versions: int = 4
    memory_bytes: int | None = None


def plan(known: Known, *, now: float, limits: Limits) -> Plan:
    """The actions that bring what is loaded to what should be: for each model its newest versions and the wanted ones.

    And the version that its policy chooses, with the one that answers until that is loaded, and its shadow.

    Where not all of that fits into memory, what was asked for last is kept, and the rest is loaded when it is asked
    for. A version that is to take another's place is loaded only where both fit, or nobody asks for the other one.

    Room is made first. Versions that are to serve come before others, of each those asked for last, then the newest;
    dropped files come last. What is quarantined isn't loaded; what serves of it, an earlier epoch or an older version,
    serves on.
    """
    desired = _desired(known, limits.max_loaded_versions)
    wishes = _wishes(known, desired, now)
    fitting = fit(wishes, limits.memory_bytes)
    stays = {key for key, kind in fitting.kept if kind == _STAY}
    retire = [Retire(key, evicted=key in desired) for key in sorted(known.loaded) if key not in stays]
    loads = [key for key, kind in fitting.kept if kind == _LOAD]
    loads.sort(key=lambda key: (desired[key].tier > 0, -desired[key].used, -key[1], key[0]))
    out = {
        wish.key[0]: _left_out(wish, fitting.left_out[wish.key], bool(stays & desired[wish.key[0]].stand_ins), limits)
        for wish in wishes
        if wish.key in fitting.left_out and (wish.key[0], _LOAD) not in fitting.kept
    }
    adopt, waits = [], []
    for entry in known.drops.values():
        if entry.state is not DropState.WAITING:
            continue
        deadline = entry.still_since + limits.settle_seconds
        quiet = 0.0 if entry.closed else QUIET_SECONDS
        due = entry.still_since + quiet if entry.attempts == 0 else deadline
        if now >= due:
            adopt.append(Adopt(entry.drop, final=now >= deadline))
        else:
            waits.append(due)
    actions: tuple[Action, ...] = (*retire, *(Load(known.manifests[key]) for key in loads), *adopt)
    return Plan(actions, min(waits, default=None), out)


_STAY, _LOAD = 0, 1


@dataclass(frozen=True)
class _Desire:
    """Why a version should be in memory. `tier` 0: it serves, or is to, or someone wants it; 1: as a shadow; 2: as one
    of the newest. `used`: when it was asked for last, it or the one in whose place it stands. `stand_ins`: those that
    answer as long as it doesn't.
    """

    tier: int
    used: float = 0.0
    stand_ins: frozenset[VersionKey] = frozenset()


def _desired(known: Known, max_loaded_versions: int) -> dict[VersionKey, _Desire]:
    """What should be loaded, and why."""
    by_model: dict[str, dict[int, Manifest]] = {}
    unusable = known.quarantined - known.loaded.keys()
    for key, manifest in known.manifests.items():
        if key not in unusable:
            by_model.setdefault(key[0], {})[key[1]] = manifest
    desired: dict[VersionKey, _Desire] = {}
    for model, versions in by_model.items():
        newest = sorted(versions, reverse=True)[:max_loaded_versions]
        desired.update(((model, v), _Desire(2, known.used.get((model, v), 0.0))) for v in newest)
        policy = known.policies.get(model, Policy())
        chosen = [(model, v) for v in candidates(versions, policy)]
        if not chosen:
            continue
        first = chosen[0]
        # A version in training must not push out the one that serves, nor one that isn't loaded yet, and may never be.
        standing = next((key for key in chosen if key in known.loaded), first)
        used = max(known.used.get(first, 0.0), known.used.get(standing, 0.0))
        if (other := shadow(versions, policy, first[1])) is not None:
            desired[model, other] = _Desire(1, used)
        desired[standing] = _Desire(0, used)
        desired[first] = _Desire(0, used, frozenset({standing} & known.loaded.keys()))
    for key in (known.wanted & known.manifests.keys()) - unusable:
        given = desired.get(key, _Desire(0))
        desired[key] = _Desire(0, max(given.used, known.used.get(key, 0.0)), given.stand_ins)
    return desired


_Wish = Wish[tuple[VersionKey, int]]


def _wishes(known: Known, desired: Mapping[VersionKey, _Desire], now: float) -> list[_Wish]:
    """What should stay in memory and what should come, most urgent first."""
    wishes = []
    for key, desire in desired.items():
        idle = now - desire.used > IDLE_SECONDS
        if key in known.loaded:
            wishes.append((desire, key, _STAY, 1 if idle else 0, known.held.get(key, {})))
        if key not in known.quarantined and known.loaded.get(key) != known.manifests[key].best.sha256:
            wishes.append((desire, key, _LOAD, 0 if idle else 1, known.footprint(key)))
    wishes.sort(key=lambda w: (w[0].tier, -w[0].used, w[1][0], w[3], -w[1][1]))
    return [Wish((key, kind), stages) for _, key, kind, _, stages in wishes]


def _left_out(wish: _Wish, needed: int, has_stand_in: bool, limits: Limits) -> OutOfMemory:
    limit = limits.memory_bytes or 0
    size = f"{needed / 1e6:.1f} MB beside what was asked for last"
    arrival = Arrival.LATER if has_stand_in else Arrival.ON_DEMAND
    if wish.size_bytes > limit:
        size, arrival = f"{wish.size_bytes / 1e6:.1f} MB", Arrival.NEVER
    return OutOfMemory(f"it isn't in memory: it needs {size}, and models may take {limit / 1e6:.1f} MB", arrival)
