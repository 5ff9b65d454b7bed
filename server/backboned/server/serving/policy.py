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


@dataclass(frozen=True)
class Policy:
    """A model's policy. `version` is the one that PINNED answers with, or that MANUAL was told last.

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
    elif policy.kind is VersionPolicy.MANUAL and policy.version is not None:
        older = [v for v in complete if v < policy.version]
        named = [policy.version] if policy.version in versions else []
        return (*named, *older) or tuple(complete)
    return (*complete, *in_training)


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
    if after == policy.version and policy.kind is not VersionPolicy.LATEST:
        return "it is pinned" if policy.kind is VersionPolicy.PINNED else "it was chosen"
    if policy.kind is VersionPolicy.BEST:
        return "it is the best"
    return "it is the newest" if after > before else f"version {before} can't serve"
