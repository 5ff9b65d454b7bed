from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backboned.registry import BackbonedError, Catalogue
from backboned.registry.backbone import Backbone, Head, Preprocessing, Stage
from backboned.registry.task import Task
from backboned.registry.weights import StageWeights, seeded_state
from backboned.server.training.epochs import Trained
from backboned.server.training.network import Network
from backboned.server.training.objective import Objective
from backboned.server.training.options import TrainingOptions
from backboned.server.training.precision import Precision
from backboned.server.training.splits import Split
from backboned.server.training.stages_trainer import DEEPER, StagesTrainer

MakeSplit = Callable[..., Split]
CLASSES, IMAGES = 3, 30
RATE = 1e-2
OPTIONS = TrainingOptions(
    trainable_stages=("low", "high"), max_epochs=3, batch_size=8, patience=0, learning_rate=RATE, weight_decay=1e-2
)
STEPWISE = replace(OPTIONS, batch_size=IMAGES, max_epochs=2, max_gradient_norm=0.0, label_smoothing=0.0)
"""One step an epoch."""


class PlainNet(nn.Module):
    """Two convolutions without BatchNorm."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.act, self.pool, self.fc = nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Linear(6, num_classes)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


PLAIN = Backbone(
    "plain",
    PlainNet,
    (Stage.of("low", "low", "act"), Stage.of("high", "high", "act", "pool", flat)),
    Head.at("fc"),
    feature_size=6,
    preprocessing=Preprocessing(8, 8),
)


def nothing() -> None:
    pass


def images(seed: int, count: int = IMAGES, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    colours = torch.eye(3)[labels].view(count, 3, 1, 1)
    return colours + torch.randn(count, 3, side, side, generator=generator), labels


class Case:
    """A network, and images to train and validate it on."""

    def __init__(self, make_split: MakeSplit, backbone: Backbone = PLAIN, side: int = 8) -> None:
        self.backbone = backbone
        state = seeded_state(backbone, seed=1)
        head = backbone.head.layer
        for name in ("weight", "bias"):
            state[f"{head}.{name}"] = state[f"{head}.{name}"][:CLASSES].clone()
        self.stages = {name: StageWeights.of(tensors) for name, tensors in backbone.split(state).items()}
        self.make_split = make_split
        self.train, self.validation = images(1, side=side), images(2, 12, side=side)

    def network(self, options: TrainingOptions = OPTIONS) -> Network:
        return Network.build(self.backbone, self.stages, options.trainable_stages, torch.device("cpu"))

    def trainer(self, options: TrainingOptions = OPTIONS, **more: Any) -> StagesTrainer:
        return StagesTrainer(
            more.pop("network", None) or self.network(options),
            Objective.balanced(Task.SINGLE_LABEL, self.train[1], CLASSES),
            options,
            self.make_split(*self.train),
            self.make_split(*self.validation),
            precision=Precision(torch.device("cpu"), None),
            **more,
        )


@pytest.fixture
def case(make_split: MakeSplit) -> Case:
    return Case(make_split)


def tensors(trained: Trained) -> dict[str, Tensor]:
    return {k: t for stage in trained.stages.values() for k, t in stage.items()}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in tensors.items()}


@pytest.mark.parametrize("name", ["plain", "digits"])
def test_it_goes_on_from_a_state_with_the_same_bits(make_split: MakeSplit, catalogue: Catalogue, name: str) -> None:
    digits = name == "digits"
    case = Case(make_split, catalogue.get("digits"), side=16) if digits else Case(make_split)
    options = replace(OPTIONS, trainable_stages=("layer2", "layer3") if digits else OPTIONS.trainable_stages)
    if digits:
        case.train = torch.randn(IMAGES, 16, 16, 16), case.train[1]
        case.validation = torch.randn(12, 16, 16, 16), case.validation[1]
    whole = list(case.trainer(options).epochs(nothing))
    for stop in (1, 2):
        first, kept = case.trainer(options), BytesIO()
        epochs = first.epochs(nothing)
        before = [next(epochs) for _ in range(stop)]
        torch.save(first.state_dict(), kept)
        second = case.trainer(options)
        torch.manual_seed(12345)
        kept.seek(0)
        second.load_state_dict(torch.load(kept, weights_only=True))
        for mine, theirs in zip([*before, *second.epochs(nothing)], whole, strict=True):
            assert replace(mine.done, images_per_second=0) == replace(theirs.done, images_per_second=0)
            assert torch.equal(mine.rights, theirs.rights)
            assert all(torch.equal(t, tensors(theirs)[k]) for k, t in tensors(mine).items())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("most", [1, 3])
def test_out_of_memory_batches_go_on_in_pieces_with_the_same_result(
    case: Case, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, most: int
) -> None:
    *_, expected = case.trainer().epochs(nothing)
    run, refused, sizes = Network.__call__, [], []

    def short(network: Network, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            if len(x) > most:
                refused.append(len(x))
                raise error
            sizes.append(len(x))
        return run(network, x)

    monkeypatch.setattr(Network, "__call__", short)
    *_, found = case.trainer().epochs(nothing)
    assert max(sizes) <= most
    assert len(refused) <= 3  # what fits is remembered
    assert sum(sizes) >= 3 * IMAGES
    for key, tensor in tensors(expected).items():
        torch.testing.assert_close(tensors(found)[key], tensor, atol=1e-6, rtol=1e-5)
    assert found.done.train_loss == pytest.approx(expected.done.train_loss, rel=1e-5)


def test_an_image_that_alone_is_too_much_ends_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(network: Network, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Network, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError):
        next(case.trainer().epochs(nothing))


def test_another_error_is_not_taken_for_a_lack_of_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(network: Network, x: Tensor) -> Tensor:
        calls.append(len(x))
        raise RuntimeError("shapes don't match")

    monkeypatch.setattr(Network, "__call__", broken)
    with pytest.raises(RuntimeError, match="shapes don't match"):
        next(case.trainer().epochs(nothing))
    assert len(calls) == 1


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_a_moving_average_of_the_weights_is_served(case: Case, decay: float) -> None:
    options = replace(OPTIONS, ema_decay=decay)
    network = case.network()
    average, step = copied(network.trained()), 0

    def follow() -> None:
        nonlocal step, average
        now = copied(network.trained())
        seen.append(now)
        step += 1
        share = min(decay, (1 + step) / (10 + step))
        average = {k: share * t + (1 - share) * now[k] for k, t in average.items()}

    seen: list[dict[str, Tensor]] = []
    trainer = case.trainer(options, network=network)
    first = next(trainer.epochs(follow_only_training(trainer, follow)))
    assert step == 4
    for key, tensor in tensors(first).items():
        torch.testing.assert_close(tensor, average[key], atol=1e-6, rtol=1e-5)
    for key, tensor in network.trained().items():
        assert torch.equal(tensor, seen[-1][key])  # what learns goes on from where it was


def follow_only_training(trainer: StagesTrainer, follow: Callable[[], None]) -> Callable[[], None]:
    """A check that calls `follow` when another step was taken."""
    steps = 0

    def check() -> None:
        nonlocal steps
        if (now := trainer.state_dict()["steps"]) != steps:
            steps = now
            follow()

    return check


def norms(case: Case, most: float) -> list[float]:
    """The norm of the gradients of each step of an epoch."""
    network, seen = case.network(), []
    trainer = case.trainer(replace(OPTIONS, max_gradient_norm=most, max_epochs=1), network=network)

    def keep() -> None:
        gradients = [p.grad.flatten() for p in network.parameters if p.grad is not None]
        seen.append(float(torch.cat(gradients).norm()))

    next(trainer.epochs(follow_only_training(trainer, keep)))
    return seen


def test_gradients_are_clipped_to_the_norm_that_is_given(case: Case) -> None:
    assert min(norms(case, 0.0)) > 1e-2
    assert norms(case, 1e-3) == pytest.approx([1e-3] * 4, rel=1e-2)


def test_training_labels_are_smoothed_and_the_told_loss_is_not(case: Case) -> None:
    network, reference = case.network(), case.network()
    trainer = case.trainer(replace(STEPWISE, label_smoothing=0.3), network=network)
    rows, labels = case.train
    loss = F.cross_entropy(reference(rows), labels, label_smoothing=0.3)
    expected = torch.autograd.grad(loss, reference.parameters)
    found: list[Tensor] = []

    def keep() -> None:
        found.extend(p.grad.clone() for p in network.parameters if p.grad is not None)

    first = next(trainer.epochs(follow_only_training(trainer, keep)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    assert first.done.train_loss == pytest.approx(F.cross_entropy(reference(rows), labels).item(), rel=1e-5)


@pytest.mark.parametrize("head_factor", [1.0, 10.0])
def test_deeper_stages_learn_slower(case: Case, head_factor: float) -> None:
    options = replace(STEPWISE, weight_decay=0.0, ema_decay=0.0)
    first = next(case.trainer(options, head_factor=head_factor).epochs(nothing))
    # The first step of Adam moves each weight by its rate.
    for stage, rate in (("head", RATE * head_factor), ("high", RATE), ("low", RATE * DEEPER)):
        moved = [(t - case.stages[stage].tensors[k]).abs().max() for k, t in first.stages[stage].items()]
        assert max(moved).item() == pytest.approx(rate, rel=1e-2)
    assert first.done.learning_rate == pytest.approx(RATE * head_factor)


def test_biases_do_not_decay_and_weights_do(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(STEPWISE, weight_decay=0.5, ema_decay=0.0)
    decayed = next(case.trainer(options).epochs(nothing))
    plain = next(case.trainer(replace(options, weight_decay=0.0)).epochs(nothing))
    for key, tensor in tensors(decayed).items():
        before = {k: t for s in case.stages.values() for k, t in s.tensors.items()}[key]
        assert torch.equal(tensor, tensors(plain)[key]) == key.endswith("bias")
        rate = RATE * (DEEPER if key.startswith("low") else 1)
        share = 0.5 * rate if key.endswith("weight") else 0.0
        torch.testing.assert_close(tensors(plain)[key] - tensor, share * before, atol=1e-6, rtol=1e-3)


def test_only_what_trains_is_changed_and_the_weights_given_stay(case: Case) -> None:
    before = {name: copied(dict(weights.tensors)) for name, weights in case.stages.items()}
    *_, last = case.trainer(replace(OPTIONS, trainable_stages=("low",))).epochs(nothing)
    assert set(last.stages) == {"low", "head"}
    assert last.done.trainable_stages == ("low",)
    for name, weights in case.stages.items():
        assert all(torch.equal(t, before[name][k]) for k, t in weights.tensors.items())


def test_it_learns(case: Case) -> None:
    *_, last = case.trainer(replace(OPTIONS, max_epochs=15)).epochs(nothing)
    assert last.done.val_accuracy > 0.8  # by chance: a third


def test_what_the_check_raises_ends_it(case: Case) -> None:
    def stop() -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        next(case.trainer().epochs(stop))


def test_a_loss_that_is_not_finite_is_told(case: Case) -> None:
    case.train[0][0, 0, 0, 0] = torch.inf
    with pytest.raises(BackbonedError, match=r"not finite in epoch 1: training diverged with learning_rate 0.01"):
        next(case.trainer().epochs(nothing))
