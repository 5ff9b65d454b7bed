"""A version of a model: written by a trainer, adopted from a dropped file, read for serving."""

import secrets
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backboned.registry.adoption import Before, adding, keep, same, taken_by_another
from backboned.registry.answers import Answers
from backboned.registry.atomic import TEMPORARY_PREFIX, sync_path, write_atomically
from backboned.registry.backbone import Backbone
from backboned.registry.digest import file_digest
from backboned.registry.directory import CheckpointDirectory, Drop
from backboned.registry.errors import BackbonedError
from backboned.registry.lock import locked
from backboned.registry.manifest import Epoch, EpochMetrics, Manifest
from backboned.registry.payload import Payload, read_payload, refused
from backboned.registry.recognise import Recognised, Recogniser
from backboned.registry.sidecar import Sidecar, read_sidecar, told_by
from backboned.registry.task import class_names
from backboned.registry.weights import StageWeights, WeightStore


@dataclass(frozen=True)
class VersionWeights:
    """A version in memory: its manifest, its backbone, and the weights of every stage of the chain, in order.

    `answers` is what validation has taught about its answers; None for a file that wasn't written by a FineTune.
    """

    manifest: Manifest
    backbone: Backbone
    stages: Mapping[str, StageWeights]
    shared: tuple[str, ...]
    answers: Answers | None = None


class VersionWriter:
    """Writes a version epoch by epoch into its folder: the checkpoint first, the manifest last. For one thread."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self.manifest = manifest

    def write(
        self,
        epoch: int,
        tensors: Mapping[str, Tensor],
        *,
        stages: Mapping[str, str],
        optimizer_state: Mapping[str, Any],
        loss: float,
        metrics: EpochMetrics,
        best: bool,
        trained: tuple[str, ...] | None = None,
        answers: Answers | None = None,
    ) -> Epoch:
        """Write `epoch-NNNN.pt` and then the manifest.

        `stages` has the digests of the whole chain at this epoch, `trained` the names of those that `tensors` are of,
        if these aren't the manifest's.
        """
        name = f"epoch-{epoch:04d}.pt"
        content = {
            "epoch": epoch,
            "model_state_dict": {k: t.detach().cpu().clone() for k, t in tensors.items()},
            "optimizer_state_dict": optimizer_state,
            "loss": float(loss),
            "backbone": self.manifest.backbone,
            "backboned": {
                "model": self.manifest.model,
                "version": self.manifest.version,
                "task": self.manifest.task.value,
                "classes": list(self.manifest.classes),
                "stages": dict(stages),
                "preprocessing": self.manifest.preprocessing.to_dict(),
                **({} if answers is None else {"answers": answers.to_payload()}),
            },
        }
        path = self._folder / name
        write_atomically(path, lambda file: torch.save(content, file))
        record = Epoch(epoch, name, file_digest(path), path.stat().st_size, time.time(), metrics)
        self.manifest = self.manifest.with_epoch(record, best=best, stages=stages, trained=trained)
        self.manifest.write(self._folder)
        return record

    def complete(self) -> None:
        """Say in the manifest that the version has ended well."""
        self.manifest = replace(self.manifest, complete=True)
        self.manifest.write(self._folder)


class VersionReader:
    """Reads versions and adopts dropped files. For one thread at a time."""

    def __init__(self, directory: CheckpointDirectory, recogniser: Recogniser, weights: WeightStore) -> None:
        self._directory = directory
        self._recogniser = recogniser
        self._weights = weights

    def read(self, manifest: Manifest, epoch: int | None = None) -> VersionWeights:
        """The weights of a version's best epoch, or of `epoch`.

        Raises `BackbonedError`: `DATA_LOSS` if the file isn't what the manifest says, `FAILED_PRECONDITION` if the
        backbone's weights aren't to be had, `NOT_FOUND` if no plugin offers the backbone. Raises `OSError` if the file
        can't be read now, which is no fault of the file's.
        """
        record = manifest.best if epoch is None else next(e for e in manifest.epochs if e.epoch == epoch)
        path = self._directory.version(manifest.model, manifest.version) / record.file
        try:
            if path.stat().st_size != record.size_bytes or file_digest(path) != record.sha256:
                raise refused(f"{record.file} is truncated or altered: it doesn't match the sha256 in the manifest")
            payload = read_payload(path, verified=True)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise refused(f"{record.file} can't be read: {error.strerror}") from error
        found = self._recogniser.recognise(payload, manifest.backbone)
        if found.outputs != manifest.task.outputs(len(manifest.classes)):
            raise refused(f"{record.file} has {found.outputs} outputs for {len(manifest.classes)} classes")
        expected = manifest.stages if record.epoch == manifest.best_epoch else _foundations(payload)
        stages = self._assemble(found, expected)
        shared = found.missing or self._shared(found, stages)
        return VersionWeights(manifest, found.backbone, stages, shared, _answers(payload, manifest, found.backbone))

    def adopt(self, drop: Drop, before: Before = Before()) -> VersionWeights | None:  # noqa: B008 - it is immutable
        """Make a dropped file the model's next version: a private copy of it, checked, with a manifest.

        Returns None if it says nothing new against what was adopted `before`, or another daemon has adopted it
        meanwhile. Raises `BackbonedError` with the reason if it can't be used, and `OSError` if it can't be copied;
        then nothing is left behind.
        """
        copy = drop.path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{drop.path.suffix}"
        try:
            with locked(copy):
                return self._adopt(drop, copy, before)
        finally:
            copy.unlink(missing_ok=True)

    def _adopt(self, drop: Drop, copy: Path, before: Before) -> VersionWeights | None:
        shutil.copyfile(drop.path, copy)
        with ThreadPoolExecutor(2) as aside:
            sha256, synced = aside.submit(file_digest, copy), aside.submit(sync_path, copy)
            payload = read_payload(copy)
            sidecar = _told(drop, payload)
            found = self._recogniser.recognise(payload, sidecar.backbone)
            stages = self._assemble(found, _foundations(payload))
        synced.result()
        manifest = _manifest(drop, payload, sidecar, found, stages)
        answers = _answers(payload, manifest, found.backbone)
        best = replace(manifest.best, sha256=sha256.result(), size_bytes=copy.stat().st_size)
        manifest = replace(manifest, epochs=(best,))
        if best.sha256 in before.deleted or (before.previous is not None and same(manifest, before.previous)):
            return None
        with adding(self._directory):
            if taken_by_another(self._directory, drop, manifest, before.versions):
                return None
            manifest = replace(manifest, version=self._directory.reserve(drop.model))
            keep(copy, manifest, self._directory.version(manifest.model, manifest.version))
        shared = found.missing or self._shared(found, stages)
        return VersionWeights(manifest, found.backbone, stages, shared, answers)

    def _assemble(self, found: Recognised, expected: Mapping[str, str]) -> dict[str, StageWeights]:
        """The weights of all stages: the file's own, and for the missing ones those of the backbone, if as expected."""
        stages: dict[str, StageWeights] = {}
        base = self._weights.stages(found.backbone.name) if found.missing else {}
        for stage in found.backbone.chain:
            if stage.name in found.stages:
                stages[stage.name] = StageWeights.of(found.stages[stage.name])
                continue
            weights = stages[stage.name] = base[stage.name]
            digest = expected.get(stage.name, weights.digest)
            if weights.digest != digest:
                raise refused(
                    f"it stands on a stage {stage.name!r} with digest {digest[:12]}…, but the weights of "
                    f"{found.backbone.name} given here have {weights.digest[:12]}…; start the daemon with the weights "
                    "that it was trained on"
                )
        return stages

    def _shared(self, found: Recognised, stages: Mapping[str, StageWeights]) -> tuple[str, ...]:
        """The stages that are those of the backbone's own weights, as far as these are at hand."""
        base = self._weights.loaded(found.backbone.name)
        return tuple(n for n, w in stages.items() if n in base and base[n].digest == w.digest)


def _manifest(
    drop: Drop, payload: Payload, sidecar: Sidecar, found: Recognised, stages: Mapping[str, StageWeights]
) -> Manifest:
    """The manifest of a dropped file, all but its version, digest and size."""
    task, classes = class_names(sidecar.classes, found.outputs, sidecar.task)
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
        preprocessing=sidecar.preprocessing or found.backbone.preprocessing,
        epochs=(record,),
        best_epoch=epoch,
        complete=True,
        trained=tuple(found.stages),
        adopted_from=drop.path.name,
        adopted_key=drop.key,
        versions=library_versions(),
    )


def library_versions() -> dict[str, str]:
    """Versions of torch and of this package, for the manifest."""
    return {"torch": str(torch.__version__), "backboned": distribution_version("backboned")}


def _told(drop: Drop, payload: Payload) -> Sidecar:
    """What stands beside a dropped file; and where that says nothing, what the file says of itself."""
    beside = {k: v for k, v in vars(read_sidecar(drop.path)).items() if v is not None}
    try:
        inside = told_by({k: v for k, v in payload.metadata.items() if k not in beside})
    except (ValueError, BackbonedError) as error:
        raise refused(f"what it says of itself can't be used: {error}") from error
    return replace(inside, **beside)


def _foundations(payload: Payload) -> dict[str, str]:
    """The digests of the stages that a file of our own trainer stands on; of another file nothing is known."""
    stages = payload.metadata.get("stages")
    return {str(k): str(v) for k, v in stages.items()} if isinstance(stages, Mapping) else {}


def _answers(payload: Payload, manifest: Manifest, backbone: Backbone) -> Answers | None:
    """What a file of our own trainer says about its answers.

    None if it says nothing, or if a person has told another task or preprocessing since: then it holds no more.
    """
    told = payload.metadata
    if told.get("answers") is None:
        return None
    answers = Answers.from_payload(told["answers"], classes=len(manifest.classes), feature_size=backbone.feature_size)
    holds = (manifest.task.value, manifest.preprocessing.to_dict()) == (told.get("task"), told.get("preprocessing"))
    return answers if holds else None
