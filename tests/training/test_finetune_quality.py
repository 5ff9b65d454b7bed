"""What a job's version is worth, by the metric that fits its dataset."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backboned.registry.payload import read_payload
from backboned.registry.task import Task
from backboned.server.training.datasets import Access, read_dataset
from backboned.server.training.events import Evaluation, JobEventPayload, Judgement
from backboned.server.training.finetune import finetune
from backboned.server.training.spec import TrainerSpec

Paint = Callable[..., Path]
MakeSpec = Callable[..., TrainerSpec]


def evaluation(spec: TrainerSpec) -> Evaluation:
    """Run a job, and return its judgement of itself."""
    events: list[JobEventPayload] = []
    finetune(spec, events.append, lambda: None)
    (found,) = (e for e in events if isinstance(e, Evaluation))
    return found


def balanced_accuracy(judgement: Judgement) -> float:
    return sum(c.recall for c in judgement.classes) / len(judgement.classes)


def mean_f1(judgement: Judgement) -> float:
    scores = [2 * c.precision * c.recall / max(c.precision + c.recall, 1e-9) for c in judgement.classes]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("stages", [(), ("layer3",)], ids=["head", "stages"])
def test_rare_classes_are_recognised_too(
    tmp_path: Path, paint: Paint, make_spec: MakeSpec, stages: tuple[str, ...]
) -> None:
    folder = paint(tmp_path / "data" / "imbalanced", {"red": 80, "green": 10, "blue": 10})
    found = evaluation(make_spec(folder, trainable_stages=stages, max_epochs=8)).validation
    assert found.majority_accuracy > 0.75
    assert balanced_accuracy(found) > 0.9  # always "red" comes to a third


def test_a_rare_positive_class_is_recognised(tmp_path: Path, paint: Paint, make_spec: MakeSpec) -> None:
    folder = paint(tmp_path / "data" / "pair", {"red": 60, "green": 12})
    spec = make_spec(folder, task=Task.BINARY, learning_rate=1e-2, max_epochs=8)
    found = evaluation(spec).validation
    assert read_payload(spec.checkpoint_dir / "colours" / "1" / "epoch-0001.pt").tensors["fc.weight"].shape[0] == 1
    assert balanced_accuracy(found) > 0.9  # always the same comes to a half
    assert mean_f1(found) > 0.9  # always "red" comes to less than a half


def test_several_labels_are_told_apart(tmp_path: Path, paint: Paint, make_spec: MakeSpec) -> None:
    folder = paint(tmp_path / "data" / "many", {"red": 20, "green": 20, "blue": 20})
    labels = {"red": "warm|colour", "green": "colour", "blue": ""}
    lines = [f"{n}/{i:03}.png,{text}" for n, text in labels.items() for i in range(20)]
    (folder / "labels.csv").write_text("file,labels\n" + "\n".join(lines), encoding="utf-8")
    found = evaluation(make_spec(folder, task=Task.MULTI_LABEL, learning_rate=1e-2, max_epochs=8)).validation
    assert [c.label for c in found.classes] == ["colour", "warm"]
    assert mean_f1(found) > 0.9  # always "colour, not warm" comes to 0.4


def test_a_test_part_is_judged_apart_and_has_no_influence(tmp_path: Path, paint: Paint, make_spec: MakeSpec) -> None:
    folder = paint(tmp_path / "data" / "colours", {"red": 20, "green": 20, "blue": 20})
    first, second = (make_spec(folder, test_fraction=0.25, max_epochs=3) for _ in range(2))
    before = evaluation(first)
    dataset = read_dataset(folder, first.options, Access([folder.parent]))
    contents = [dataset.read(sample) for sample in dataset.test]
    for sample, content in zip(dataset.test, contents[7:] + contents[:7], strict=True):
        (folder / sample.path).write_bytes(content)  # most are of another class now
    after = evaluation(second)
    assert before.test is not None
    assert after.test is not None
    assert before.test.images == len(dataset.test) == 15
    assert before.test.accuracy > 0.9
    assert after.test.accuracy < 0.6
    assert after.validation == before.validation
    for epoch in (1, 2, 3):
        one, other = (
            read_payload(first.checkpoint_dir / "colours" / str(v) / f"epoch-{epoch:04}.pt").tensors for v in (1, 2)
        )
        assert all(torch.equal(t, other[k]) for k, t in one.items())
