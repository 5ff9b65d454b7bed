from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backboned.registry import BackbonedError, Catalogue, ErrorKind
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import Manifest
from backboned.registry.payload import read_payload
from backboned.registry.recognise import Recogniser
from backboned.registry.version import VersionReader, VersionWeights
from backboned.registry.weights import WeightStore
from backboned.server.training.events import (
    CheckpointWritten,
    DatasetReport,
    EpochDone,
    Evaluation,
    FeatureProgress,
    JobEventPayload,
    LogLine,
)
from backboned.server.training.finetune import finetune
from backboned.server.training.spec import TrainerSpec

Paint = Callable[..., Path]
MakeSpec = Callable[..., TrainerSpec]


class Run:
    """What a job told and wrote."""

    def __init__(self, spec: TrainerSpec, check: Callable[[], None] = lambda: None) -> None:
        self.events: list[JobEventPayload] = []
        self.spec = spec
        finetune(spec, self.events.append, check)

    @property
    def folder(self) -> Path:
        return self.spec.checkpoint_dir / self.spec.model / str(self.spec.version)

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.folder)

    @property
    def epochs(self) -> list[EpochDone]:
        return [e for e in self.events if isinstance(e, EpochDone)]

    @property
    def best(self) -> EpochDone:
        return next(e for e in self.epochs if e.epoch == self.manifest.best_epoch)

    def tensors(self, epoch: int = 1) -> dict[str, torch.Tensor]:
        return dict(read_payload(self.folder / f"epoch-{epoch:04}.pt").tensors)


@pytest.fixture
def colours(tmp_path: Path, paint: Paint) -> Path:
    return paint(tmp_path / "data" / "colours", {"red": 12, "green": 12, "blue": 12})


@pytest.fixture
def read(catalogue: Catalogue, weights_file: Path) -> Callable[[Run], VersionWeights]:
    def make(run: Run) -> VersionWeights:
        weights = WeightStore(catalogue, {"digits": weights_file})
        weights.stages("digits")
        directory = CheckpointDirectory(run.spec.checkpoint_dir)
        return VersionReader(directory, Recogniser(catalogue), weights).read(run.manifest)

    return make


def test_a_job_tells_what_it_does_and_writes_a_version_that_can_be_read(
    colours: Path, make_spec: MakeSpec, read: Callable[[Run], VersionWeights]
) -> None:
    run = Run(make_spec(colours, max_epochs=4, patience=0))
    report, progress = run.events[:2]
    assert isinstance(report, DatasetReport)
    assert report.train_images + report.validation_images == 36
    assert isinstance(progress, FeatureProgress)
    assert [type(e) for e in run.events[-9:]] == [EpochDone, CheckpointWritten] * 4 + [Evaluation]
    assert run.manifest.complete
    assert run.manifest.trained == ("head",)
    assert run.manifest.classes == ("blue", "green", "red")
    assert run.manifest.options["max_epochs"] == 4
    assert len(run.manifest.dataset["fingerprint"]) == 64
    written = [e for e in run.events if isinstance(e, CheckpointWritten)]
    assert [(e.file, e.sha256) for e in written] == [(e.file, e.sha256) for e in run.manifest.epochs]
    assert run.best.val_loss == min(e.val_loss for e in run.epochs)
    assert read(run).shared == ("stem", "layer1", "layer2", "layer3")


def test_a_head_alone_takes_kilobytes(colours: Path, make_spec: MakeSpec) -> None:
    run = Run(make_spec(colours, max_epochs=1))
    assert set(run.tensors()) == {"fc.weight", "fc.bias"}
    assert run.manifest.epochs[0].size_bytes < 20_000


@pytest.mark.parametrize("stages", [(), ("layer3",), ("all",)])
def test_equal_seeds_give_equal_bits_and_other_seeds_others(
    colours: Path, make_spec: MakeSpec, stages: tuple[str, ...]
) -> None:
    first, second, other = (
        Run(make_spec(colours, max_epochs=2, trainable_stages=stages, seed=seed)) for seed in (5, 5, 6)
    )
    for epoch in (1, 2):
        pairs = [(t, second.tensors(epoch)[k]) for k, t in first.tensors(epoch).items()]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert [replace(e, images_per_second=0) for e in first.epochs] == [
        replace(e, images_per_second=0) for e in second.epochs
    ]
    assert not torch.equal(first.tensors()["fc.weight"], other.tensors()["fc.weight"])


def test_only_what_trains_changes_statistics_included(
    colours: Path, make_spec: MakeSpec, read: Callable[[Run], VersionWeights], weights_file: Path
) -> None:
    original = torch.load(weights_file, weights_only=True)
    run = Run(make_spec(colours, max_epochs=2, trainable_stages=("layer2",)))
    stages = read(run).stages
    assert run.manifest.trained == ("layer2", "head")
    for name in ("stem", "layer1", "layer3"):  # layer3 lies above the boundary and passes gradients on
        assert all(torch.equal(t, original[k]) for k, t in stages[name].tensors.items())
    changed = {k for k, t in stages["layer2"].tensors.items() if not torch.equal(t, original[k])}
    assert {k for k in changed if k.endswith("weight")} == {
        k for k in original if k.startswith("layer2") and k.endswith("weight")
    }
    assert not any("running" in k for k in changed)  # BatchNorm keeps its pretrained statistics


def test_it_stops_when_nothing_gets_better(colours: Path, make_spec: MakeSpec) -> None:
    run = Run(make_spec(colours, max_epochs=200, patience=3, learning_rate=0.5))
    assert len(run.epochs) < 200
    assert len(run.epochs) - run.manifest.best_epoch == 3
    assert run.manifest.complete


def test_a_loss_that_is_not_finite_says_to_lower_the_rate(
    colours: Path, make_spec: MakeSpec, weights_file: Path, tmp_path: Path
) -> None:
    state = torch.load(weights_file, weights_only=True)
    for key in state:
        if key.startswith("layer") and key.endswith("weight"):
            state[key] *= 1e19
    torch.save(state, tmp_path / "huge.pth")
    spec = replace(make_spec(colours, learning_rate=0.5), weight_files={"digits": tmp_path / "huge.pth"})
    with pytest.raises(BackbonedError, match=r"diverged with learning_rate 0.5; lower learning_rate") as caught:
        Run(spec)
    assert caught.value.field == "options.learning_rate"


def test_unreadable_images_are_told_and_left_out(colours: Path, make_spec: MakeSpec) -> None:
    (colours / "red" / "000.png").write_bytes(b"not an image")
    (colours / "blue" / "003.png").write_bytes((colours / "blue" / "003.png").read_bytes()[:200])
    run = Run(make_spec(colours, max_epochs=1))
    report = [e for e in run.events if isinstance(e, DatasetReport)][-1]
    assert sorted(f.path for f in report.unreadable) == ["blue/003.png", "red/000.png"]
    assert report.train_images + report.validation_images == 34


def test_a_class_of_unreadable_images_fails_the_job(colours: Path, make_spec: MakeSpec) -> None:
    for path in (colours / "red").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(BackbonedError, match=r"no training image of class 'red' can be read \(red/.*not an image"):
        Run(make_spec(colours))


def test_features_that_are_computed_each_epoch_give_the_same_head(
    colours: Path, make_spec: MakeSpec, tmp_path: Path
) -> None:
    kept, computed = (
        Run(replace(make_spec(colours, max_epochs=3, learning_rate=1e-2, cache_bytes=b), cache_dir=tmp_path / str(b)))
        for b in (2**30, 0)
    )
    told = LogLine("the features don't fit into the cache and are computed in every epoch: raise --cache-size")
    assert told not in kept.events
    assert told in computed.events
    for epoch in (1, 2, 3):
        for key, tensor in kept.tensors(epoch).items():
            torch.testing.assert_close(computed.tensors(epoch)[key], tensor, atol=1e-5, rtol=1e-5)


def test_a_warm_start_goes_on_from_a_version_and_keeps_the_rows_of_known_classes(
    tmp_path: Path, colours: Path, paint: Paint, make_spec: MakeSpec
) -> None:
    first = Run(make_spec(colours, max_epochs=5, trainable_stages=("layer3",), learning_rate=1e-2))
    more = paint(tmp_path / "data" / "more", {"red": 12, "blue": 12, "yellow": 12})
    second = Run(make_spec(more, max_epochs=1, learning_rate=1e-9, seed=1, warm_start_version=1))
    assert second.manifest.trained == ("layer3", "head")
    assert second.manifest.classes == ("blue", "red", "yellow")
    before, after = first.tensors(first.manifest.best_epoch), second.tensors()
    torch.testing.assert_close(after["fc.weight"][:2], before["fc.weight"][[0, 2]], atol=1e-5, rtol=0)
    assert all(torch.equal(t, before[k]) for k, t in after.items() if k.startswith("layer3"))
    assert LogLine("the head keeps 2 rows of version 1") in second.events


def test_a_warm_start_from_nothing_is_refused(colours: Path, make_spec: MakeSpec) -> None:
    with pytest.raises(BackbonedError, match="colours has no version 7 with a checkpoint") as caught:
        Run(make_spec(colours, warm_start_version=7))
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_what_the_check_raises_ends_it_and_finished_epochs_stay(colours: Path, make_spec: MakeSpec) -> None:
    spec = make_spec(colours, max_epochs=1000, patience=0)
    folder = spec.checkpoint_dir / spec.model / str(spec.version)

    def check() -> None:
        if (folder / "epoch-0003.pt").exists():
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        Run(spec, check)
    manifest = Manifest.read(folder)
    assert [e.epoch for e in manifest.epochs] == [1, 2, 3]
    assert not manifest.complete
