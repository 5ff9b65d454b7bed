"""Which version of a model answers where a call names none: a pure function of what is known of its versions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from backboned.registry.manifest import Manifest


class VersionPolicy(Enum):
    """How the version that answers by default is chosen."""

    LATEST = "LATEST"
    BEST = "BEST"
    PINNED = "PINNED"
    MANUAL = "MANUAL"
    PROMOTE_WHEN_BETTER = "PROMOTE_WHEN_BETTER"
    ROLLBACK_WHEN_WORSE = "ROLLBACK_WHEN_WORSE"


NAMING = frozenset((VersionPolicy.PINNED, VersionPolicy.MANUAL, VersionPolicy.PROMOTE_WHEN_BETTER))
"""These name a version; the others find it."""


@dataclass(frozen=True)
class Policy:
    """A model's policy. `version` is the one that it names: of `NAMING`.

    `rejected` versions, each with the reason, are never chosen unless they are named.
    """

    kind: VersionPolicy = VersionPolicy.LATEST
    version: int | None = None
    rejected: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))


def candidates(versions: Mapping[int, Manifest], policy: Policy) -> tuple[int, ...]:
    """The versions that may answer by default, the one that should first.

    Each of the others stands in while those before it aren't loaded. Only PINNED has no others: it answers with its
    version or not at all.
    """
    newest_first = sorted(versions, reverse=True)
    allowed = [v for v in newest_first if v not in policy.rejected]
    complete = [v for v in allowed if versions[v].complete]
    in_training = [v for v in allowed if not versions[v].complete]
    if policy.kind is VersionPolicy.PINNED:
        return (policy.version,) if policy.version is not None and policy.version in versions else ()
    if policy.kind is VersionPolicy.BEST:
        complete.sort(key=lambda v: _merit(versions[v]), reverse=True)
    elif policy.kind in NAMING and policy.version is not None:
        older = [v for v in complete if v < policy.version]
        named = [policy.version] if policy.version in versions else []
        return (*named, *older) or tuple(complete)
    return (*complete, *in_training)


def shadow(versions: Mapping[int, Manifest], policy: Policy, serving: int) -> int | None:
    """The version that sees what the `serving` one answers, so that they can be compared; None: no other one does.

    Where a version is named, that is the newest that came after it; where the newest serves and is to be called back
    if it is worse, it is the one that would take its place.
    """
    if policy.kind in (VersionPolicy.MANUAL, VersionPolicy.PROMOTE_WHEN_BETTER):
        newer = [v for v in versions if v > serving and versions[v].complete and v not in policy.rejected]
        return max(newer, default=None)
    if policy.kind is VersionPolicy.ROLLBACK_WHEN_WORSE:
        return next((v for v in candidates(versions, policy) if v < serving and versions[v].complete), None)
    return None


def _merit(manifest: Manifest) -> tuple[float, float, int]:
    """Ascending: by accuracy, then by loss, then by age; what was never validated comes last."""
    metrics = manifest.best.metrics
    accuracy = -math.inf if metrics.val_accuracy is None else metrics.val_accuracy
    loss = math.inf if metrics.val_loss is None else metrics.val_loss
    return accuracy, -loss, manifest.version


def why(policy: Policy, before: int, after: int) -> str:
    """Why `after` answers in place of `before`; 0 is none."""
    if before in policy.rejected:
        return f"version {before} was rejected: {policy.rejected[before]}"
    if not after:
        return f"version {before} is gone"
    if after == policy.version and policy.kind in NAMING:
        return "it is pinned" if policy.kind is VersionPolicy.PINNED else "it was chosen"
    if policy.kind is VersionPolicy.BEST:
        return "it is the best"
    return "it is the newest" if after > before else f"version {before} can't serve"
