"""A job from its spec to its last checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from backboned.registry.backbone import Backbone
from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.recognise import Recogniser
from backboned.registry.version import VersionReader, VersionWriter, library_versions
from backboned.registry.weights import StageWeights, WeightStore
from backboned.server.compute.device import Device
from backboned.server.compute.stages import StageStore
from backboned.server.training.datasets import Access, Dataset, Store, read_dataset
from backboned.server.training.events import CheckpointWritten, EpochDone, JobEventPayload, LogLine
from backboned.server.training.feature_pass import FeaturePass, check_whole, without
from backboned.server.training.features import Frozen
from backboned.server.training.loop import Split, Trainer
from backboned.server.training.network import Network, boundary
from backboned.server.training.objective import Objective
from backboned.server.training.options import TrainingOptions
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.starting_point import StartingPoint, warm_start

Emit = Callable[[JobEventPayload], None]


def finetune(spec: TrainerSpec, emit: Emit, check: Callable[[], None]) -> None:
    """Train the version that `spec` asks for: a checkpoint and a manifest after every epoch.

    `check` is called often; what it raises ends the work, and the checkpoints that are written stay. Raises
    `BackbonedError` and `OSError`. Uses the whole process: thread counts, torch's random generators.
    """
    catalogue = Catalogue.installed(spec.plugin_modules)
    backbone = catalogue.get(spec.backbone)
    options = spec.options.validated(backbone)
    store = Store(spec.fetched_dir or spec.work_dir / "fetched")
    dataset = read_dataset(spec.dataset, options, Access(spec.data_roots, spec.remote_data, store, check))
    emit(dataset.report())
    start = _starting_point(spec, catalogue, backbone, options, dataset.classes)
    if start.head_rows:
        emit(LogLine(f"the head keeps {start.head_rows} rows of version {options.warm_start_version}"))

    device = Device.choose(spec.device, "fp32")
    dataset, train, validation = _features(spec, device, backbone, options, start, dataset, emit, check)
    objective = Objective.balanced(options.task, train.targets, len(dataset.classes))
    network = Network.build(backbone, start.stages, options.trainable_stages, device.device)
    trainer = Trainer(network, objective, options)
    record = _Record(spec, backbone, options, dataset, start)
    for epoch in trainer.epochs(train, validation, check):
        emit(epoch)
        emit(record.write(epoch, network, trainer.optimizer_state))
    record.complete()


def _starting_point(
    spec: TrainerSpec, catalogue: Catalogue, backbone: Backbone, options: TrainingOptions, classes: tuple[str, ...]
) -> StartingPoint:
    weights = WeightStore(catalogue, spec.weight_files)
    own = weights.stages(backbone.name)
    warm = None
    if options.warm_start_version is not None:
        directory = CheckpointDirectory(spec.checkpoint_dir)
        manifest = warm_start(directory, spec.model, options.warm_start_version, backbone)
        warm = VersionReader(directory, Recogniser(catalogue), weights).read(manifest)
    return StartingPoint.of(backbone, own, options.task, classes, seed=options.seed, warm=warm)


def _features(  # noqa: PLR0917 - what a job consists of
    spec: TrainerSpec,
    device: Device,
    backbone: Backbone,
    options: TrainingOptions,
    start: StartingPoint,
    dataset: Dataset,
    emit: Emit,
    check: Callable[[], None],
) -> tuple[Dataset, Split, Split]:
    """The features of both parts, and the dataset without what can't be read."""
    below = backbone.chain[: boundary(backbone, options.trainable_stages)]
    store = StageStore(device)
    path = tuple(store.get(backbone, stage, start.stages[stage.name]) for stage in below)
    feature_pass = FeaturePass(
        Frozen(path, start.preprocessing, device),
        options,
        folder=spec.work_dir,
        budget_bytes=spec.feature_budget_bytes,
        workers=spec.threads,
        max_image_pixels=spec.max_image_pixels,
    )
    torch.set_num_threads(1)  # each worker of the pass has a core to itself
    train, validation, unreadable = feature_pass.run(dataset, emit, check)
    torch.set_num_threads(spec.threads)
    if unreadable:
        dataset = without(dataset, unreadable)
        emit(dataset.report(unreadable))
        check_whole(dataset, unreadable)
    return dataset, train, validation


class _Record:
    """Writes a job's checkpoints: the tensors of stages that aren't the backbone's own, and the digests of all."""

    def __init__(
        self,
        spec: TrainerSpec,
        backbone: Backbone,
        options: TrainingOptions,
        dataset: Dataset,
        start: StartingPoint,
    ) -> None:
        self._stages = dict(start.stages)
        written = {n for n in start.own | set(options.trainable_stages) if start.stages[n].tensors}
        self._written = tuple(s.name for s in backbone.chain if s.name in written)
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
            trained=self._written,
            dataset=_description(dataset),
            options=options.to_dict(),
            versions=library_versions(),
        )
        self._writer = VersionWriter(
            CheckpointDirectory(spec.checkpoint_dir).version(spec.model, spec.version), manifest
        )

    def write(self, done: EpochDone, network: Network, optimizer_state: Mapping[str, Any]) -> CheckpointWritten:
        for name, tensors in network.tensors():
            self._stages[name] = StageWeights.of({k: t.detach().cpu().clone() for k, t in tensors.items()})
        epoch = self._writer.write(
            done.epoch,
            {k: t for name in self._written for k, t in self._stages[name].tensors.items()},
            stages={name: weights.digest for name, weights in self._stages.items()},
            optimizer_state=_on_cpu(optimizer_state),
            loss=done.train_loss,
            metrics=EpochMetrics(done.train_loss, done.train_accuracy, done.val_loss, done.val_accuracy),
            best=done.best,
        )
        return CheckpointWritten(epoch.epoch, epoch.file, epoch.sha256, epoch.size_bytes, epoch.create_time, done.best)

    def complete(self) -> None:
        self._writer.complete()


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
