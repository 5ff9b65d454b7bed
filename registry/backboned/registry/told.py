"""What is told of a checkpoint file: by itself, by what stands beside it, and by the manifest of its version."""

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.metadata import version as distribution_version

import torch

from backboned.registry.answers import Answers
from backboned.registry.backbone import Backbone, Preprocessing
from backboned.registry.errors import BackbonedError
from backboned.registry.look import Drop
from backboned.registry.manifest import Epoch, EpochMetrics, Manifest
from backboned.registry.payload import Payload
from backboned.registry.recognise import Recognised
from backboned.registry.refusal import refused
from backboned.registry.sidecar import Sidecar, read_sidecar, told_by
from backboned.registry.task import Task, class_names
from backboned.registry.weights import StageWeights


def told_of(drop: Drop, payload: Payload, *, signed: bool) -> Sidecar:
    """What stands beside a dropped file; and where that says nothing, what the file says of itself.

    Of a `signed` file only the latter counts, and what stands beside it may say nothing else.
    """
    beside = {k: v for k, v in vars(read_sidecar(drop.path)).items() if v is not None}
    if not signed:
        return replace(told_by_file(payload, set(beside)), **beside)
    inside = told_by_file(payload)
    for what, value in beside.items():
        if value != getattr(inside, what):
            raise refused(
                f"what stands beside it isn't signed, and says {what} that the file doesn't: put them into the file, "
                "and sign it"
            )
    return inside


def told_by_file(payload: Payload, but: Collection[str] = ()) -> Sidecar:
    """What a file says of itself, but for what somebody else knows better."""
    try:
        inside = told_by({k: v for k, v in payload.metadata.items() if k not in but})
    except (ValueError, BackbonedError) as error:
        raise refused(f"what it says of itself can't be used: {error}") from error
    return inside if inside.backbone or "backbone" in but else replace(inside, backbone=payload.backbone)


def manifest_of(
    drop: Drop, payload: Payload, sidecar: Sidecar, found: Recognised, stages: Mapping[str, StageWeights]
) -> Manifest:
    """The manifest of a dropped file, all but its version, digest and size."""
    task, classes, preprocessing = _described(sidecar, found)
    epoch = payload.epoch or 0
    name = f"epoch-{epoch:04d}{drop.path.suffix}"
    record = Epoch(epoch, name, "", 0, time.time(), EpochMetrics(train_loss=payload.loss))
    return Manifest(
        model=drop.model,
        version=0,
        backbone=found.backbone.name,
        task=task,
        classes=classes,
        stages={name: weights.digest for name, weights in stages.items()},
        preprocessing=preprocessing,
        epochs=(record,),
        best_epoch=epoch,
        complete=True,
        trained=tuple(found.stages),
        adopted_from=drop.path.name,
        adopted_key=drop.key,
        versions=library_versions(),
    )


def says_the_same(new: Manifest, old: Manifest) -> bool:
    """Whether two adopted manifests say the same of the same bytes."""
    told = (new.best.sha256, new.task, new.classes, new.preprocessing, new.backbone)
    return told == (old.best.sha256, old.task, old.classes, old.preprocessing, old.backbone)


def check_manifest(manifest: Manifest, inside: Sidecar, found: Recognised, stages: Mapping[str, str]) -> None:
    """Raise `BackbonedError` `DATA_LOSS` if a manifest says otherwise than the signed file that it tells of.

    `inside` is what the file says of itself, and `stages` has the digests of the chain.
    """
    task, classes, preprocessing = _described(inside, found)
    for what, told, signed in (
        ("backbone", manifest.backbone, found.backbone.name),
        ("task", manifest.task, task),
        ("classes", manifest.classes, classes),
        ("preprocessing", manifest.preprocessing, preprocessing),
        ("stages", manifest.stages, stages),
    ):
        if told != signed:
            raise refused(
                f"manifest.json isn't signed, and its {what} is not what the signed file says: bring it back, "
                f"or drop the file as a new one with its {what} in it"
            )


def foundations(payload: Payload) -> dict[str, str]:
    """The digests of the stages that a file of our own trainer stands on; of another file nothing is known."""
    stages = payload.metadata.get("stages")
    return {str(k): str(v) for k, v in stages.items()} if isinstance(stages, Mapping) else {}


def answers_of(payload: Payload, manifest: Manifest, backbone: Backbone) -> Answers | None:
    """What a file of our own trainer says about its answers.

    None if it says nothing, or if a person has told another task or preprocessing since: then it holds no more.
    """
    told = payload.metadata
    if told.get("answers") is None:
        return None
    answers = Answers.from_payload(told["answers"], classes=len(manifest.classes), feature_size=backbone.feature_size)
    holds = (manifest.task.value, manifest.preprocessing.to_dict()) == (told.get("task"), told.get("preprocessing"))
    return answers if holds else None


def library_versions() -> dict[str, str]:
    """Versions of torch and of this package, for the manifest."""
    return {"torch": str(torch.__version__), "backboned": distribution_version("backboned")}


def _described(told: Sidecar, found: Recognised) -> tuple[Task, tuple[str, ...], Preprocessing]:
    """What a file is for: what is told of it, and where nothing is, what its backbone says."""
    task, classes = class_names(told.classes, found.outputs, told.task)
    return task, classes, told.preprocessing or found.backbone.preprocessing
