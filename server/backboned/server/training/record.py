"""The version that a job writes."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from backboned.registry.answers import Answers
from backboned.registry.atomic import TEMPORARY_PREFIX
from backboned.registry.backbone import Backbone
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.registry.manifest import Epoch, EpochMetrics, Manifest
from backboned.registry.signatures import Signer
from backboned.registry.told import library_versions
from backboned.registry.version import VersionWriter
from backboned.registry.weights import StageWeights
from backboned.server.training.datasets import Dataset
from backboned.server.training.epochs import Trained
from backboned.server.training.events import CheckpointWritten
from backboned.server.training.options import TrainingOptions
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.starting_point import StartingPoint


class Record:
    """Writes epochs: a checkpoint and the manifest after each. One that is there already stays as it is.

    Only one at a time may write a version.
    """

    def __init__(
        self, spec: TrainerSpec, backbone: Backbone, options: TrainingOptions, dataset: Dataset, start: StartingPoint
    ) -> None:
        self._start = start
        self._backbone = backbone
        manifest = Manifest(
            model=spec.model,
            version=spec.version,
            backbone=backbone.name,
            task=options.task,
            classes=dataset.classes,
            stages={},
            preprocessing=start.preprocessing,
            epochs=(),
            best_epoch=0,
            complete=False,
            dataset=_description(dataset),
            options=options.to_dict(),
            versions=library_versions(),
        )
        self.folder = CheckpointDirectory(spec.checkpoint_dir).version(spec.model, spec.version)
        for left in self.folder.glob(f"{TEMPORARY_PREFIX}*"):  # what a killed trainer was writing
            left.unlink(missing_ok=True)
        with suppress(BackbonedError):  # there is none yet, or it can't be understood
            manifest = Manifest.read(self.folder)
        if manifest.dataset["fingerprint"] != dataset.fingerprint:
            raise BackbonedError(
                ErrorKind.FAILED_PRECONDITION,
                f"dataset {dataset.location} has changed since the job began, which can't go on with another one",
                field="dataset",
            )
        self._writer = VersionWriter(self.folder, manifest, Signer.of(spec.signing_key))

    @property
    def manifest(self) -> Manifest:
        """As it is on disk, once an epoch has been written."""
        return self._writer.manifest

    def stages(self, trained: Mapping[str, Mapping[str, Tensor]]) -> dict[str, StageWeights]:
        """The weights of the whole chain, with those of the stages that trained in place of what they began from."""
        changed = {
            name: StageWeights.of({k: t.detach().cpu().clone() for k, t in tensors.items()})
            for name, tensors in trained.items()
        }
        return {**self._start.stages, **changed}

    def write(
        self, epoch: int, trained: Trained, stages: Mapping[str, StageWeights], *, best: bool, answers: Answers | None
    ) -> CheckpointWritten:
        """Write an epoch. `stages` are as `stages` makes them. Raises `OSError`."""
        done = trained.done
        if (kept := self._kept(epoch)) is not None:
            return _written(kept, best=best)
        own = self._start.own | set(trained.stages)
        names = tuple(s.name for s in self._backbone.chain if s.name in own and stages[s.name].tensors)
        written = self._writer.write(
            epoch,
            {k: t for name in names for k, t in stages[name].tensors.items()},
            stages={name: weights.digest for name, weights in stages.items()},
            optimizer_state=_on_cpu(trained.optimizer_state),
            loss=done.train_loss,
            metrics=EpochMetrics(done.train_loss, done.train_accuracy, done.val_loss, done.val_accuracy),
            best=best,
            trained=names,
            answers=answers,
        )
        return _written(written, best=best)

    def complete(self) -> None:
        """Say that the version has ended well."""
        self._writer.complete()

    def _kept(self, epoch: int) -> Epoch | None:
        """An epoch that a killed trainer wrote, if it is there still."""
        kept = next((e for e in self.manifest.epochs if e.epoch == epoch), None)
        return kept if kept is not None and (self.folder / kept.file).is_file() else None


def _written(epoch: Epoch, *, best: bool) -> CheckpointWritten:
    return CheckpointWritten(epoch.epoch, epoch.file, epoch.sha256, epoch.size_bytes, epoch.create_time, best)


def _description(dataset: Dataset) -> dict[str, Any]:
    return {
        "folder": dataset.location,
        "fingerprint": dataset.fingerprint,
        "train_images": len(dataset.train),
        "validation_images": len(dataset.validation),
        "test_images": len(dataset.test),
    }


def _on_cpu(value: Any) -> Any:
    """Nested plain values, their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {k: _on_cpu(v) for k, v in value.items()}
    return [_on_cpu(v) for v in value] if isinstance(value, list) else value
