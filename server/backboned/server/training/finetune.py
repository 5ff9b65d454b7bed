"""A job from its spec to its version's report."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from backboned.registry.backbone import Backbone
from backboned.registry.catalogue import Catalogue
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.recognise import Recogniser
from backboned.registry.signatures import Trust
from backboned.registry.version import VersionReader
from backboned.registry.weights import StageWeights, WeightStore
from backboned.server.compute.device import Device
from backboned.server.training.datasets import Access, Dataset, Store, read_dataset
from backboned.server.training.epochs import Trained
from backboned.server.training.events import DatasetReport, JobEventPayload, LogLine, from_json, to_json
from backboned.server.training.feature_cache import FeatureCache
from backboned.server.training.feature_pass import FeaturePass, Parts
from backboned.server.training.frozen_stages import frozen_stages
from backboned.server.training.heads.trainer import HeadTrainer
from backboned.server.training.judging import evaluate
from backboned.server.training.network import Network, last_stages
from backboned.server.training.objective import Objective
from backboned.server.training.options import AUTO_STAGES, TrainingOptions
from backboned.server.training.outputs import Judge
from backboned.server.training.precision import Precision
from backboned.server.training.record import Record
from backboned.server.training.report.photos import Judged
from backboned.server.training.report.writing import write_report
from backboned.server.training.resume import ResumeFile
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.splits import Split, through
from backboned.server.training.stages_trainer import StagesTrainer
from backboned.server.training.starting_point import StartingPoint, warm_start

PROBE_EPOCHS = 10
FRESH_HEAD_FACTOR = 10.0
"""A new head that no probe could be fitted to learns so many times faster than the pretrained stages."""

TOLD_AGAIN = 400
"""Events that a trainer that goes on tells once more: more than a pipe holds."""

NOISE = 1.64
"""Standard errors that a gain must exceed to be none by chance in 19 of 20 cases."""

Emit = Callable[[JobEventPayload], None]
Check = Callable[[], None]


def finetune(spec: TrainerSpec, emit: Emit, check: Check) -> None:
    """Train the version that `spec` asks for: a checkpoint and a manifest after every epoch, and a report at the end.

    Goes on from where an earlier call with the same work folder was ended. `check` is called often; what it raises ends
    the work, and the checkpoints that are written stay. Raises `BackbonedError` and `OSError`. Uses the whole process:
    thread counts, torch's random generators.
    """
    # Each worker of the feature pass has a core to itself. Heads are many small operations: threads that meet after
    # each take ten times as long as one thread where another process wants the cores.
    torch.set_num_threads(1)
    catalogue = Catalogue.installed(spec.plugin_modules)
    backbone = catalogue.get(spec.backbone)
    options = spec.options.validated(backbone)
    store = Store(spec.fetched_dir or spec.work_dir / "fetched")
    dataset = read_dataset(spec.dataset, options, Access(spec.data_roots, spec.remote_data, store, check))
    emit(dataset.report())
    start = _starting_point(spec, catalogue, backbone, options, dataset.classes)
    if start.head_rows:
        emit(LogLine(f"the head keeps {start.head_rows} rows of version {options.warm_start_version}"))
    auto = options.trainable_stages == (AUTO_STAGES,)
    if auto:
        sizes = {name: sum(t.numel() for t in weights.tensors.values()) for name, weights in start.stages.items()}
        options = replace(options, trainable_stages=last_stages(backbone, sizes)).validated(backbone)
    device = Device.choose(spec.device, spec.precision)
    parts, report = _features(spec, device, backbone, options, start, dataset, emit, check)
    job = _Job(spec, backbone, options, start, parts, Precision.of(device), emit, check)
    if options.trainable_stages:
        job.train_stages(auto=auto)
    else:
        job.train_head()
    job.finish(report)


def _starting_point(
    spec: TrainerSpec, catalogue: Catalogue, backbone: Backbone, options: TrainingOptions, classes: tuple[str, ...]
) -> StartingPoint:
    weights = WeightStore(catalogue, spec.weight_files)
    own = weights.stages(backbone.name)
    warm = None
    if options.warm_start_version is not None:
        directory = CheckpointDirectory(spec.checkpoint_dir)
        manifest = warm_start(directory, spec.model, options.warm_start_version, backbone)
        trust = Trust.of(spec.trusted_keys)  # what it begins with goes into a file that is signed
        warm = VersionReader(directory, Recogniser(catalogue), weights, trust).read(manifest)
    return StartingPoint.of(backbone, own, options.task, classes, seed=options.seed, warm=warm)


def _features(  # noqa: PLR0917 - what a job consists of
    spec: TrainerSpec,
    device: Device,
    backbone: Backbone,
    options: TrainingOptions,
    start: StartingPoint,
    dataset: Dataset,
    emit: Emit,
    check: Check,
) -> tuple[Parts, DatasetReport]:
    """The features of all parts, and what there is to say of the dataset now that each image has been looked at."""
    feature_pass = FeaturePass(
        frozen_stages(spec, device, backbone, options, start),
        FeatureCache(spec.cache_dir, limit_bytes=spec.cache_bytes),
        views=options.views,
        workers=spec.threads,
        max_image_pixels=spec.max_image_pixels,
    )
    parts = feature_pass.run(dataset, emit, check)
    report = parts.dataset.report(parts.unreadable, parts.findings)
    if parts.unreadable or parts.findings.duplicates or parts.findings.warnings:
        emit(report)
    if not parts.cached:
        emit(LogLine("the features don't fit into the cache and are computed in every epoch: raise --cache-size"))
    return parts, report


class _Job:
    """Training and its record, once the features are there. For one thread."""

    def __init__(  # noqa: PLR0917 - what a job consists of
        self,
        spec: TrainerSpec,
        backbone: Backbone,
        options: TrainingOptions,
        start: StartingPoint,
        parts: Parts,
        precision: Precision,
        emit: Emit,
        check: Check,
    ) -> None:
        self._spec = spec
        self._backbone = backbone
        self._options = options
        self._start = start
        self._parts = parts
        self._precision = precision
        self._emit, self._check = emit, check
        self._objective = Objective.balanced(options.task, parts.train.targets, len(parts.dataset.classes))
        self._record = Record(spec, backbone, options, parts.dataset, start)
        self._judge = Judge(backbone, options.trainable_stages, precision, parts.train, parts.validation, check=check)
        self._resume = ResumeFile(spec.work_dir)
        for line in self._resume.state.get("told", ()):
            emit(from_json(line))  # a daemon that was killed may not have heard it
        if "best" in self._resume.state and not self._record.manifest.epochs:  # someone has removed them
            self._resume.state = {}

    def train_head(self) -> None:
        """The head alone, on features that lie in the cache."""
        trainer = self._head_trainer(self._start, self._options, self._parts.train, self._parts.validation)
        if trainer.cross_validated:
            self._tell(LogLine("few images train: cross-validation over them chooses the head, not validation"))
        self._follow(trainer, 0, lambda trained: trained.done.best)

    def train_stages(self, *, auto: bool) -> None:
        """The head by itself first, then the stages with it; `auto`: these count only for more than noise."""
        if "head" not in self._resume.state:
            self._probe(auto=auto)
        state = self._resume.state
        probed = state["head"] is not None
        head = StageWeights.of(state["head"]) if probed else self._start.stages[self._backbone.head.name]
        stages = {**self._start.stages, self._backbone.head.name: head}
        network = Network.build(self._backbone, stages, self._options.trainable_stages, self._precision.device)
        trainer = StagesTrainer(
            network,
            self._objective,
            self._options,
            self._parts.train,
            self._parts.validation,
            precision=self._precision,
            head_factor=1.0 if probed or self._start.head_rows else FRESH_HEAD_FACTOR,
        )
        torch.set_num_threads(self._spec.threads)
        rights = state["rights"] if auto and probed else None
        if rights is None:
            self._follow(trainer, 0, lambda trained: trained.done.best)
        else:
            self._follow(trainer, 1, self._beats(rights))
        if rights is not None:
            self._tell_gain(float(rights.mean()))

    def finish(self, report: DatasetReport) -> None:
        """Say that the version is complete, judge it, and write its report."""
        dataset, manifest = self._parts.dataset, self._record.manifest
        stages = self._record.stages(self._resume.state["best"])
        answers = self._judge.answers(manifest.task, len(dataset.classes), stages)
        validation = self._judge.outputs(stages, self._parts.validation)
        test = None if self._parts.test is None else self._judge.outputs(stages, self._parts.test)
        self._record.complete()
        evaluation = evaluate(
            manifest.task, dataset.classes, answers, manifest.best_epoch, validation=validation, test=test
        )
        self._emit(evaluation)
        samples = {s.path: s for s in (*dataset.validation, *dataset.test)}
        write_report(
            self._record.folder,
            manifest=self._record.manifest,
            answers=answers,
            evaluation=evaluation,
            validation=Judged(validation, [s.path for s in dataset.validation]),
            test=None if test is None else Judged(test, [s.path for s in dataset.test]),
            dataset=report,
            read=lambda path: dataset.read(samples[path]),
            max_image_pixels=self._spec.max_image_pixels,
        )

    def _tell(self, payload: JobEventPayload) -> None:
        """Emit it, and keep it for a daemon that is killed before it has read it."""
        self._resume.state["told"] = [*self._resume.state.get("told", ()), to_json(payload)][-TOLD_AGAIN:]
        self._emit(payload)

    def _follow(self, trainer: HeadTrainer | StagesTrainer, before: int, is_best: Callable[[Trained], bool]) -> None:
        """Train to the end, keeping each epoch and then the state to go on from; `before` epochs were kept already."""
        if (kept := self._resume.state.get("trainer")) is not None:
            trainer.load_state_dict(kept)
        for trained in trainer.epochs(self._check):
            epoch = trained.done.epoch + before
            self._keep(epoch, trained, best=is_best(trained))
            self._resume.write(trainer=trainer.state_dict())

    def _keep(self, epoch: int, trained: Trained, *, best: bool) -> None:
        stages = self._record.stages(trained.stages)
        best = best or epoch == 1
        classes = len(self._parts.dataset.classes)
        answers = self._judge.answers(self._options.task, classes, stages) if best else None
        self._tell(replace(trained.done, epoch=epoch, best=best))
        self._tell(self._record.write(epoch, trained, stages, best=best, answers=answers))
        if best:
            self._resume.state["best"] = {name: dict(stages[name].tensors) for name in trained.stages}

    def _probe(self, *, auto: bool) -> None:
        """The best head on what the stages make of images before they train; none if that is too large for memory."""
        network = Network.build(
            self._backbone, self._start.stages, self._options.trainable_stages, self._precision.device
        )
        network.train(False)

        def features(x: Tensor) -> Tensor:
            with torch.no_grad(), self._precision():
                return network.features(x)

        train, validation = (
            through(part, features, self._check) for part in (self._parts.train, self._parts.validation)
        )
        if train is None or validation is None:
            self._resume.write(head=None, rights=None)
            return
        options = replace(
            self._options,
            learning_rate=None,
            weight_decay=None,
            max_epochs=min(self._options.max_epochs, PROBE_EPOCHS),
        )
        trainer = self._head_trainer(self._start, options, train, validation)
        best: Trained | None = None
        for trained in trainer.epochs(self._check):
            if trained.done.best:
                best = trained
        assert best is not None  # the first epoch is the best so far
        self._tell(LogLine(f"the head alone has a validation accuracy of {best.done.val_accuracy:.4f}"))
        if auto:
            self._keep(1, best, best=True)
        head = {k: t.detach().cpu().clone() for k, t in best.stages[self._backbone.head.name].items()}
        self._resume.write(head=head, rights=best.rights)

    def _head_trainer(
        self, start: StartingPoint, options: TrainingOptions, train: Split, validation: Split
    ) -> HeadTrainer:
        head = start.stages[self._backbone.head.name].tensors
        return HeadTrainer(
            self._backbone,
            head,
            self._objective,
            options,
            train,
            validation,
            warm=bool(start.head_rows),
            threads=self._spec.threads,
        )

    def _beats(self, rights: Tensor) -> Callable[[Trained], bool]:
        """Whether an epoch beats a head with these right answers by more than noise, and all those that did before."""

        def beats(trained: Trained) -> bool:
            state, loss = self._resume.state, trained.done.val_loss
            if _gain(rights, trained.rights) <= 0 or loss >= state.get("lowest", math.inf):
                return False
            state["lowest"] = loss
            return True

        return beats

    def _tell_gain(self, probe: float) -> None:
        manifest = self._record.manifest
        best, seconds = manifest.best, manifest.epochs[-1].create_time - manifest.epochs[0].create_time
        names = ", ".join(self._options.trainable_stages)
        if best.epoch == 1:
            text = f"the head alone stays: training {names} too gained no more than noise"
        else:
            text = f"training {names} too: validation accuracy {probe:.4f} → {best.metrics.val_accuracy:.4f}"
        self._tell(LogLine(f"{text}; it took {seconds:.0f} s"))


def _gain(before: Tensor, after: Tensor) -> float:
    """What was gained on the same images beyond the noise: the mean difference less 1.64 of its standard errors."""
    difference = (after - before).double()
    noise = float(difference.std(unbiased=False)) / math.sqrt(len(difference))
    return float(difference.mean()) - NOISE * noise
