from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backboned.registry import BackbonedError, Catalogue
from backboned.registry.backbone import Backbone
from backboned.registry.task import Task
from backboned.server.training.calibration import fit_temperature
from backboned.server.training.epochs import Trained
from backboned.server.training.heads.trainer import HeadTrainer
from backboned.server.training.objective import Objective
from backboned.server.training.options import TrainingOptions
from backboned.server.training.splits import Split

MakeSplit = Callable[..., Split]
CLASSES, VIEWS = 3, 2
OPTIONS = TrainingOptions(max_epochs=4, patience=0, batch_size=16)


def nothing() -> None:
    pass


def images(count: int, features: int, seed: int, *, signal: float = 0.2) -> tuple[Tensor, Tensor]:
    """Features `[count, views, features]` of very different sizes, a part of which tells the classes apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, features, generator=torch.Generator().manual_seed(0))
    rows = signal * centres[labels][:, None] + torch.randn(count, VIEWS, features, generator=generator)
    return rows * torch.logspace(-1, 1, features) + 2, labels


def start_of(backbone: Backbone, seed: int = 0) -> dict[str, Tensor]:
    layer, generator = backbone.head.layer, torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, backbone.feature_size, generator=generator) / 100
    return {f"{layer}.weight": weight, f"{layer}.bias": torch.zeros(CLASSES)}


class Case:
    """A head, and images to train and validate it on."""

    def __init__(self, make_split: MakeSplit, name: str = "digits", count: int = 60) -> None:
        self.backbone = Catalogue.installed().get(name)
        self.start = start_of(self.backbone)
        self.make_split = make_split
        self.train = images(count, self.backbone.feature_size, seed=1)
        self.validation = images(30, self.backbone.feature_size, seed=2)

    def trainer(
        self,
        options: TrainingOptions = OPTIONS,
        *,
        cached: bool = True,
        warm: bool = False,
        targets: Tensor | None = None,
    ) -> HeadTrainer:
        rows, labels = self.validation
        labels = labels if targets is None else targets
        return HeadTrainer(
            self.backbone,
            self.start,
            Objective.balanced(Task.SINGLE_LABEL, self.train[1], CLASSES),
            options,
            self.make_split(*self.train, views=VIEWS, cached=cached),
            self.make_split(rows[:, 0], labels, cached=cached),
            warm=warm,
        )

    def logits(self, trained: Trained, rows: Tensor) -> Tensor:
        """What the written head makes of plain features."""
        tensors, layer = trained.stages["head"], self.backbone.head.layer
        return F.linear(rows, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])


@pytest.fixture
def case(make_split: MakeSplit) -> Case:
    return Case(make_split)


def figures(epochs: list[Trained]) -> list[Any]:
    return [(replace(e.done, images_per_second=0), dict(e.optimizer_state), e.rights.tolist()) for e in epochs]


def assert_same(first: list[Trained], second: list[Trained]) -> None:
    assert figures(first) == figures(second)
    for one, other in zip(first, second, strict=True):
        for key, tensor in one.stages["head"].items():
            assert torch.equal(tensor, other.stages["head"][key])


@pytest.mark.parametrize("name", ["digits", "mobilenet_v2"])
@pytest.mark.parametrize("options", [OPTIONS, replace(OPTIONS, learning_rate=1e-2)], ids=["grid", "one rate"])
def test_it_goes_on_from_a_state_with_the_same_bits(make_split: MakeSplit, name: str, options: TrainingOptions) -> None:
    case = Case(make_split, name)
    whole = list(case.trainer(options).epochs(nothing))
    for stop in (1, 3):
        first, kept = case.trainer(options), BytesIO()
        epochs = first.epochs(nothing)
        before = [next(epochs) for _ in range(stop)]
        torch.save(first.state_dict(), kept)
        second = case.trainer(options)
        torch.manual_seed(12345)
        kept.seek(0)
        second.load_state_dict(torch.load(kept, weights_only=True))
        assert_same([*before, *second.epochs(nothing)], whole)


def test_equal_seeds_give_equal_bits_and_others_others(case: Case) -> None:
    first, second, other = (
        list(case.trainer(replace(OPTIONS, seed=seed, learning_rate=1e-2)).epochs(nothing)) for seed in (1, 1, 2)
    )
    assert_same(first, second)
    assert not torch.equal(first[0].stages["head"]["fc.weight"], other[0].stages["head"]["fc.weight"])


@pytest.mark.parametrize("options", [OPTIONS, replace(OPTIONS, learning_rate=1e-2)], ids=["grid", "one rate"])
def test_the_figures_are_those_of_the_head_on_plain_features(case: Case, options: TrainingOptions) -> None:
    for trained in case.trainer(options).epochs(nothing):
        logits, target = case.logits(trained, case.validation[0][:, 0]), case.validation[1]
        assert trained.done.val_accuracy == pytest.approx(float((logits.argmax(1) == target).float().mean()))
        assert trained.rights.tolist() == (logits.argmax(1) == target).float().tolist()
        calibrated = F.cross_entropy(logits / fit_temperature(Task.SINGLE_LABEL, logits, target), target)
        assert trained.done.val_loss == pytest.approx(calibrated.item(), rel=1e-3)


def test_it_learns(case: Case) -> None:
    *_, last = case.trainer(replace(OPTIONS, max_epochs=8)).epochs(nothing)
    assert last.done.val_accuracy > 0.8  # by chance: a third
    assert last.done.train_accuracy > 0.9


def test_validation_has_no_part_in_the_choice_where_few_images_train(case: Case) -> None:
    plain, mixed = case.trainer(), case.trainer(targets=case.validation[1].roll(1))
    assert plain.cross_validated
    for one, other in zip(plain.epochs(nothing), mixed.epochs(nothing), strict=True):
        assert one.optimizer_state == other.optimizer_state
        assert one.done.best == other.done.best
        assert torch.equal(one.stages["head"]["fc.weight"], other.stages["head"]["fc.weight"])
        assert one.done.val_accuracy != other.done.val_accuracy


def test_validation_chooses_where_many_images_train(make_split: MakeSplit) -> None:
    case = Case(make_split, count=1200)
    wrong = case.trainer(targets=case.validation[1].roll(1))
    assert not wrong.cross_validated
    right = [e.done.val_loss for e in case.trainer().epochs(nothing)]
    chosen = [e.optimizer_state["candidate"] for e in case.trainer().epochs(nothing)]
    misled = [e.optimizer_state["candidate"] for e in wrong.epochs(nothing)]
    assert misled != chosen
    assert all(loss < 0.8 for loss in right)


def test_features_that_are_computed_each_time_give_the_same_head(case: Case) -> None:
    options = replace(OPTIONS, learning_rate=1e-2)
    kept, computed = case.trainer(options), case.trainer(options, cached=False)
    for one, other in zip(kept.epochs(nothing), computed.epochs(nothing), strict=True):
        for key, tensor in one.stages["head"].items():
            torch.testing.assert_close(other.stages["head"][key], tensor, atol=1e-5, rtol=1e-5)


def test_what_it_starts_from_is_left_as_it_is(case: Case) -> None:
    before = {k: t.clone() for k, t in case.start.items()}
    list(case.trainer().epochs(nothing))
    list(case.trainer(replace(OPTIONS, learning_rate=0.1), warm=True).epochs(nothing))
    assert all(torch.equal(t, before[k]) for k, t in case.start.items())


def test_a_learned_head_is_begun_from(case: Case) -> None:
    (first,) = case.trainer(replace(OPTIONS, learning_rate=1e-9, max_epochs=1), warm=True).epochs(nothing)
    torch.testing.assert_close(first.stages["head"]["fc.weight"], case.start["fc.weight"], atol=1e-5, rtol=0)
    torch.testing.assert_close(first.stages["head"]["fc.bias"], case.start["fc.bias"], atol=1e-4, rtol=0)


def test_it_stops_when_nothing_gets_better(case: Case) -> None:
    options = replace(OPTIONS, learning_rate=5.0, max_epochs=100, patience=3)
    epochs = list(case.trainer(options).epochs(nothing))
    best = max(e.done.epoch for e in epochs if e.done.best)
    assert len(epochs) == best + 3


def test_features_that_are_not_finite_are_told_as_a_divergence(case: Case) -> None:
    rows, labels = case.train
    case.train = rows.clone(), labels
    case.train[0][0, 0, 0] = torch.inf
    with pytest.raises(BackbonedError, match="not finite in epoch 1") as caught:
        next(case.trainer(replace(OPTIONS, learning_rate=1e-2)).epochs(nothing))
    assert caught.value.field == "options.learning_rate"


@pytest.mark.parametrize("task", [Task.BINARY, Task.MULTI_LABEL])
def test_other_tasks_are_learned_too(make_split: MakeSplit, task: Task) -> None:
    case = Case(make_split)
    (rows, labels), (val_rows, val_labels) = case.train, case.validation

    def targets(values: Tensor) -> Tensor:
        return (values > 0).long() if task is Task.BINARY else torch.stack([values > 0, values == 2], 1).float()

    outputs = task.outputs(2)
    start = {"fc.weight": torch.zeros(outputs, case.backbone.feature_size), "fc.bias": torch.zeros(outputs)}
    trainer = HeadTrainer(
        case.backbone,
        start,
        Objective.balanced(task, targets(labels), 2),
        replace(OPTIONS, task=task),
        make_split(rows, targets(labels), views=VIEWS),
        make_split(val_rows[:, 0], targets(val_labels)),
        warm=False,
    )
    *_, last = trainer.epochs(nothing)
    assert last.done.val_accuracy > 0.85  # by the majority: two thirds
