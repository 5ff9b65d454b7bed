"""`auto`: the last stages train too, and count where more than noise is gained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backboned.registry.manifest import Manifest
from backboned.registry.payload import read_payload
from backboned.server.training.events import EpochDone, Evaluation, JobEventPayload, LogLine
from backboned.server.training.finetune import finetune
from backboned.server.training.spec import TrainerSpec

Paint = Callable[..., Path]
MakeSpec = Callable[..., TrainerSpec]


@pytest.fixture
def colours(tmp_path: Path, paint: Paint) -> Path:
    return paint(tmp_path / "data" / "colours", {"red": 20, "green": 20, "blue": 20})


@pytest.fixture
def short_sighted(weights_file: Path, tmp_path: Path) -> Path:
    """Weights whose last stage makes the same of all images: no head can tell them apart until it is trained."""
    state = torch.load(weights_file, weights_only=True)
    for name in ("body.2.1", "shortcut.1"):
        state[f"layer3.{name}.weight"].zero_()
        state[f"layer3.{name}.bias"].fill_(0.5)
    torch.save(state, tmp_path / "short-sighted.pth")
    return tmp_path / "short-sighted.pth"


def run(spec: TrainerSpec) -> tuple[list[JobEventPayload], Manifest, list[str]]:
    """A job's events, its manifest, and the lines that it told."""
    events: list[JobEventPayload] = []
    finetune(spec, events.append, lambda: None)
    lines = [e.text for e in events if isinstance(e, LogLine)]
    return events, Manifest.read(spec.checkpoint_dir / spec.model / str(spec.version)), lines


def test_the_head_alone_stays_where_nothing_is_gained(colours: Path, make_spec: MakeSpec) -> None:
    spec = make_spec(colours, trainable_stages=("auto",), max_epochs=3)
    events, manifest, lines = run(spec)
    epochs = [e for e in events if isinstance(e, EpochDone)]
    assert epochs[0].trainable_stages == ()
    assert {e.trainable_stages for e in epochs[1:]} == {("layer3",)}
    assert [e.epoch for e in epochs] == list(range(1, len(epochs) + 1))
    assert [e.epoch for e in epochs if e.best] == [1]
    assert manifest.best_epoch == 1
    assert manifest.complete
    assert any(line.startswith("the head alone stays: training layer3 too gained no more than noise") for line in lines)
    folder = spec.checkpoint_dir / spec.model / str(spec.version)
    assert set(read_payload(folder / "epoch-0001.pt").tensors) == {"fc.weight", "fc.bias"}


def test_the_stages_are_taken_where_much_is_gained(colours: Path, make_spec: MakeSpec, short_sighted: Path) -> None:
    spec = make_spec(colours, trainable_stages=("auto",), max_epochs=8, batch_size=8, learning_rate=1e-2, patience=0)
    events, manifest, lines = run(replace(spec, weight_files={"digits": short_sighted}))
    epochs = {e.epoch: e for e in events if isinstance(e, EpochDone)}
    assert epochs[1].val_accuracy < 0.7
    assert manifest.best_epoch > 1
    best = epochs[manifest.best_epoch]
    assert best.val_accuracy > 0.9
    assert any(
        f"training layer3 too: validation accuracy {epochs[1].val_accuracy:.4f} → {best.val_accuracy:.4f}" in line
        for line in lines
    )
    (judged,) = (e for e in events if isinstance(e, Evaluation))
    assert judged.epoch == manifest.best_epoch
    assert judged.validation.accuracy == pytest.approx(best.val_accuracy)
    folder = spec.checkpoint_dir / spec.model / str(spec.version)
    assert any(k.startswith("layer3.") for k in read_payload(folder / f"epoch-{best.epoch:04}.pt").tensors)
