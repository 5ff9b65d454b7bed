"""What a job begins from: the backbone's own weights, or a version of the model; and a new head."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from backboned.registry.backbone import Backbone, Preprocessing
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind, invalid, suggestion
from backboned.registry.manifest import MANIFEST_NAME, Manifest
from backboned.registry.task import Task
from backboned.registry.version import VersionWeights
from backboned.registry.weights import StageWeights

_INITIAL_DEVIATION = 0.01


@dataclass(frozen=True)
class StartingPoint:
    """The weights of the whole chain, the new head among them, and the preprocessing they want.

    `own` has the names of stages whose weights are not the backbone's, the head always among them. `head_rows` is how
    many of the head's outputs are taken over from an older version.
    """

    stages: Mapping[str, StageWeights]
    preprocessing: Preprocessing
    own: frozenset[str]
    head_rows: int = 0

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        weights: Mapping[str, StageWeights],
        task: Task,
        classes: tuple[str, ...],
        *,
        seed: int,
        warm: VersionWeights | None = None,
    ) -> "StartingPoint":
        """Begin from the backbone's `weights`, or from the version `warm`, for `classes` of `task`."""
        head, outputs = backbone.head.name, task.outputs(len(classes))
        if warm is None:
            stages = {**weights, head: _new_head(backbone, weights[head], outputs, seed, {})}
            return cls(stages, backbone.preprocessing, frozenset({head}))
        rows = _kept_rows(warm.manifest, task, classes)
        stages = {**warm.stages, head: _new_head(backbone, warm.stages[head], outputs, seed, rows)}
        own = {head, *(name for name, w in stages.items() if w.digest != weights[name].digest)}
        return cls(stages, warm.manifest.preprocessing, frozenset(own), len(rows))


def warm_start(directory: CheckpointDirectory, model: str, version: int, backbone: Backbone) -> Manifest:
    """The manifest of a version to begin from, without its weights.

    Raises `BackbonedError`: `NOT_FOUND` if there is no such version, `INVALID_ARGUMENT` if it is of another backbone.
    """
    folder, field = directory.version(model, version), "options.warm_start_version"
    if not (folder / MANIFEST_NAME).is_file():
        known = [str(v) for v in directory.versions(model)]
        raise BackbonedError(
            ErrorKind.NOT_FOUND,
            f"{field}: {model} has no version {version} with a checkpoint{suggestion(str(version), known)}",
            field=field,
        )
    manifest = Manifest.read(folder)
    if manifest.backbone != backbone.name:
        raise invalid(f"{field}: version {version} is of {manifest.backbone}, not of {backbone.name}", field=field)
    return manifest


def _kept_rows(old: Manifest, task: Task, classes: tuple[str, ...]) -> dict[int, int]:
    """Rows of the old head by output, where they mean the same."""
    if task is Task.BINARY or old.task is Task.BINARY:
        return {0: 0} if (old.task, old.classes) == (task, classes) else {}
    return {i: old.classes.index(name) for i, name in enumerate(classes) if name in old.classes}


def _new_head(backbone: Backbone, old: StageWeights, outputs: int, seed: int, rows: Mapping[int, int]) -> StageWeights:
    """The head's weights with its layer made new: weights from N(0, 0.01²), biases 0, and `rows` of the old one.

    Small, so that the first steps hardly move what is below; not zero, which a ReLU behind the layer would keep dead.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(old.tensors)
    for key in (f"{backbone.head.layer}.weight", f"{backbone.head.layer}.bias"):
        if key in tensors:
            fresh = torch.zeros(outputs, *tensors[key].shape[1:])
            if fresh.dim() > 1:
                fresh.normal_(0, _INITIAL_DEVIATION, generator=generator)
            for output, row in rows.items():
                fresh[output] = tensors[key][row]
            tensors[key] = fresh
    return StageWeights.of(tensors)
